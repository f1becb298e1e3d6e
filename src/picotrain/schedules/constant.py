"""schedule.kind=constant: the peak rate from the warm-up to the end."""

from __future__ import annotations

from typing import Literal

from picotrain.contracts import Schedule


class ConstantConfig(Schedule):
    kind: Literal["constant"] = "constant"

    def shape(self, step: int, num_steps: int) -> float:
        return 1.0
