"""schedule.kind=cosine: half a cosine from the end of the warm-up to num_steps (SGDR, arXiv:1608.03983)."""

from __future__ import annotations

import math
from typing import Literal

from picotrain.contracts import Schedule
from picotrain.section import Fraction


class CosineConfig(Schedule):
    kind: Literal["cosine"] = "cosine"
    final_fraction: Fraction = 0.0  # the rate at the last step over the peak rate

    def shape(self, step: int, num_steps: int) -> float:
        span = max(num_steps - self.warmup_steps, 1)
        progress = min(max(step - self.warmup_steps, 0) / span, 1.0)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
