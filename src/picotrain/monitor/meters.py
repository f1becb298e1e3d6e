"""Small measuring instruments: a smoothed loss, the pace of the run, model FLOPs utilisation."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any


class Smoother:
    """Exponential moving average without the pull towards its start at zero (Adam's correction, Kingma & Ba 2015, section 3).

    m_t = beta m_{t-1} + (1 - beta) x_t; the value is m_t / (1 - beta^t).
    """

    def __init__(self, beta: float = 0.9):
        self.beta = beta
        self._mean = 0.0
        self._count = 0

    @property
    def value(self) -> float | None:
        """The smoothed value; None before the first update."""
        return self._mean / (1 - self.beta**self._count) if self._count else None

    def update(self, x: float) -> float:
        """Take in one value and return the smoothed one."""
        self._mean = self.beta * self._mean + (1 - self.beta) * x
        self._count += 1
        return self._mean / (1 - self.beta**self._count)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._count = float(state.get("mean", 0.0)), int(state.get("count", 0))


class Pace:
    """Seconds per step, as the median of the recent ones; the first step, which compiles and warms up, does not count."""

    def __init__(self, window: int = 50):
        self._recent_s: deque[float] = deque(maxlen=window)
        self._first = True

    def update(self, dt_s: float) -> None:
        if not self._first:
            self._recent_s.append(dt_s)
        self._first = False

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps will take, evaluations and saves not included; None before the second step."""
        return statistics.median(self._recent_s) * steps_left if self._recent_s else None


def mfu(flops_per_token: float, tokens: float, seconds: float, peak_flops: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B): FLOPs per second over the peak of all `devices`.

    `peak_flops` is the dense bf16 peak of one device; None where it is unknown.
    """
    if not peak_flops or seconds <= 0:
        return None
    return flops_per_token * tokens / seconds / (peak_flops * devices)
