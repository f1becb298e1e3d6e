"""schedule.kind=trapezoid: the peak rate, then a straight fall."""

from __future__ import annotations

from typing import Literal

from picotrain.contracts import Schedule
from picotrain.section import Fraction


class TrapezoidConfig(Schedule):
    kind: Literal["trapezoid"] = "trapezoid"
    warmdown_fraction: Fraction = 0.0  # the share of steps at the end over which the rate falls
    final_fraction: Fraction = 0.0  # the rate at the last step over the peak rate

    def shape(self, step: int, num_steps: int) -> float:
        """Flat, then linear down to final_fraction, which the step after the last one would reach."""
        warmdown = self.warmdown_fraction * num_steps
        if num_steps - step >= warmdown:
            return 1.0
        progress = (num_steps - step) / warmdown  # 1 at the corner, 0 at the end
        return progress + (1 - progress) * self.final_fraction
