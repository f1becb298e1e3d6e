"""The learning-rate factor by step."""

from __future__ import annotations

import pytest

from picotrain import schedule
from picotrain.config.schema import ScheduleConfig


def test_a_trapezoid_warms_up_holds_and_falls_to_its_final_fraction():
    section = ScheduleConfig(kind="trapezoid", warmup_steps=10, warmdown_fraction=0.5, final_fraction=0.1)
    factor = schedule.build(section, 100)
    assert [factor(s) for s in (0, 4, 9, 10, 49, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert factor(75) == pytest.approx(0.5 + 0.5 * 0.1)
    assert factor(99) == pytest.approx(0.02 + 0.98 * 0.1)
    falling = [factor(s) for s in range(50, 100)]
    assert falling == sorted(falling, reverse=True)


def test_a_cosine_is_half_way_in_the_middle():
    factor = schedule.build(ScheduleConfig(kind="cosine", warmup_steps=20), 120)
    assert factor(70) == pytest.approx(0.5)
    assert factor(19) == 1.0
    assert 0 < factor(119) < 0.001


def test_a_constant_rate_stays():
    factor = schedule.build(ScheduleConfig(kind="constant"), 10)
    assert {factor(s) for s in range(10)} == {1.0}


@pytest.mark.parametrize(("kind", "warmdown"), [("trapezoid", 1.0), ("cosine", 0.0), ("constant", 0.0)])
def test_no_step_trains_at_a_rate_of_zero_or_above_the_peak(kind: str, warmdown: float):
    factor = schedule.build(ScheduleConfig(kind=kind, warmup_steps=3, warmdown_fraction=warmdown), 7)
    assert all(0 < factor(s) <= 1 for s in range(7))
