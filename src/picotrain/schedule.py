"""The learning-rate factor by step: 1 at the peak, the same for every parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable

from picotrain.config.schema import ScheduleConfig


def build(schedule: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """The factor for step s in 0..num_steps-1. Warmup rises linearly over the first steps and is never 0."""
    shape = {"trapezoid": _trapezoid, "cosine": _cosine, "constant": _constant}[schedule.kind]
    warmup = schedule.warmup_steps

    def factor(step: int) -> float:
        return min((step + 1) / warmup if warmup else 1.0, shape(step, num_steps, schedule))

    return factor


def _constant(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    return 1.0


def _trapezoid(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Flat, then linear down to final_fraction, which the step after the last one would reach."""
    warmdown = schedule.warmdown_fraction * num_steps
    if num_steps - step >= warmdown:
        return 1.0
    progress = (num_steps - step) / warmdown  # 1 at the corner, 0 at the end
    return progress + (1 - progress) * schedule.final_fraction


def _cosine(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """Half a cosine from the end of the warmup to num_steps (SGDR, arXiv:1608.03983)."""
    span = max(num_steps - schedule.warmup_steps, 1)
    progress = min(max(step - schedule.warmup_steps, 0) / span, 1.0)
    return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
