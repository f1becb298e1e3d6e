"""When a step began and ended, and how its values reach the host without stopping a GPU.

A GPU computes behind the host's back: the host queues a step and goes on. A clock of the host then tells when a step was queued or
waited for, not when it was computed, and `float(loss)` is queued like any other work, behind the step after it. Events stand in the
same queue and are stamped by the GPU itself, so they tell both: how long a step took, and that its values are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Values = Mapping[str, Any]  # of a step: numbers, scalars on a device, and mappings of such


class Timer(Protocol):
    """What a monitor asks of the device that computes the steps."""

    late: bool  # whether a step's values are waited for when the next step is queued, and not at once

    def mark(self) -> Any:
        """A moment in the device's work: when all that was queued before it is done."""
        ...

    def elapsed_s(self, first: Any, second: Any) -> float:
        """Seconds between two moments that have passed."""
        ...

    def collect(self, values: Values) -> Any:
        """Begin to bring values to the host."""
        ...

    def fetch(self, collected: Any, there: Any) -> Values:
        """What `collect` began with, on the host; waits until the moment `there`, marked after it, and no longer."""
        ...


class HostTimer:
    """A device that the host waits for: a CPU, which computes in the host's own time, and MPS, where asking for a value waits."""

    late = False

    def __init__(self, now_s: Callable[[], float] = time.perf_counter):
        self.mark = now_s

    def elapsed_s(self, first: float, second: float) -> float:
        return second - first

    def collect(self, values: Values) -> Values:
        return {**values, "loss": float(values["loss"])}  # what follows it in the step is there soon after

    def fetch(self, collected: Values, there: float) -> Values:
        return collected
