"""The learning-rate factor by step."""

from __future__ import annotations

import pytest

from picotrain.contracts import Schedule
from picotrain.schedules.constant import ConstantConfig
from picotrain.schedules.cosine import CosineConfig
from picotrain.schedules.trapezoid import TrapezoidConfig


def factors(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule.factor(step, num_steps) for step in range(num_steps)]


def test_a_trapezoid_warms_up_holds_and_falls_to_its_final_fraction():
    found = factors(TrapezoidConfig(warmup_steps=10, warmdown_fraction=0.5, final_fraction=0.1), 100)
    assert [found[s] for s in (0, 4, 9, 10, 49, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert found[75] == pytest.approx(0.5 + 0.5 * 0.1)
    assert found[99] == pytest.approx(0.02 + 0.98 * 0.1)
    assert found[50:] == sorted(found[50:], reverse=True)


def test_a_cosine_is_half_way_in_the_middle():
    found = factors(CosineConfig(warmup_steps=20), 120)
    assert found[70] == pytest.approx(0.5)
    assert found[19] == 1.0
    assert 0 < found[119] < 0.001


def test_a_constant_rate_stays():
    assert set(factors(ConstantConfig(), 10)) == {1.0}


@pytest.mark.parametrize(
    "schedule", [TrapezoidConfig(warmup_steps=3, warmdown_fraction=1.0), CosineConfig(warmup_steps=3), ConstantConfig(warmup_steps=3)]
)
def test_no_step_trains_at_a_rate_of_zero_or_above_the_peak(schedule: Schedule):
    assert all(0 < factor <= 1 for factor in factors(schedule, 7))
