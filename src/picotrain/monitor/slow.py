"""Steps that suddenly take much longer than the others: said once, with what is likely to be the reason."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import deque
from typing import NamedTuple

from picotrain import hardware
from picotrain.text import brief

FACTOR = 3.0  # times the median of the steps before
LOST_S = 1.0  # that steps in a row must cost before they are worth a word: a single short one is nothing
RECOVERED_S = 300.0  # of usual steps after which the next slow ones are said again
FEWEST = 5  # steps that make a median
SWAPPED = 100  # pages read back from disk in a step: memory has run out


class SlowSteps:
    """Looks at every step; a few microseconds each."""

    def __init__(self, on_cpu: bool, window: int = 50):
        self._on_cpu = on_cpu
        self._usual_s: deque[float] = deque(maxlen=window)
        self._usual_cores: deque[float] = deque(maxlen=window)  # CPU seconds a second
        self._used = _Used.now()
        self._begun = self._used  # of the slow steps in a row so far, if there are any
        self._lost_s = self._waited_s = 0.0  # by them
        self._quiet_s = RECOVERED_S  # of usual steps since slow ones were said

    def update(self, dt_s: float, data_wait_s: float, saving: bool) -> str:
        """Take in a step; what is to be said of it, else ""."""
        before, self._used = self._used, _Used.now()
        usual_s = statistics.median(self._usual_s) if len(self._usual_s) >= FEWEST else math.inf
        if dt_s < FACTOR * usual_s:
            self._usual_s.append(dt_s)
            self._usual_cores.append(self._used.cores_since(before))
            self._lost_s = self._waited_s = 0.0
            self._quiet_s += dt_s
            return ""
        self._begun = self._begun if self._lost_s else before
        self._lost_s, self._waited_s = self._lost_s + dt_s - usual_s, self._waited_s + data_wait_s
        if self._lost_s < LOST_S:
            return ""
        said, self._quiet_s = self._quiet_s < RECOVERED_S, 0.0
        return "" if said else f"a step takes {brief(dt_s)} instead of {brief(usual_s)}: {self._reason(saving)}"

    def _reason(self, saving: bool) -> str:
        load, cores = hardware.load(), hardware.cores()
        told = "" if load is None else f" (load {load:.1f} on {cores} cores)"
        if self._waited_s > 0.5 * self._lost_s:
            return "the text comes too slowly, see data_wait_ms and `picotrain bench loader`"
        if self._used.faults - self._begun.faults > SWAPPED:
            return "memory is short, and what was put on disk is read back"
        if saving:
            return "a checkpoint is being written"
        if not self._on_cpu:
            return f"not seen from here: heat, a power limit or another process on the GPU, see nvidia-smi{told}"
        if self._used.cores_since(self._begun) < 0.8 * statistics.median(self._usual_cores) or (load or 0) > 1.5 * cores:
            return f"other processes take the cores{told}"
        return f"the cores are slower: heat, a power limit, or other guests of a virtual machine's host{told}"


class _Used(NamedTuple):
    """What this process has used so far."""

    wall_s: float
    cpu_s: float  # of all threads
    faults: int  # pages that had to be read from disk

    @classmethod
    def now(cls) -> _Used:
        return cls(time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt)

    def cores_since(self, before: _Used) -> float:
        """Cores that it has kept busy on average."""
        return (self.cpu_s - before.cpu_s) / max(self.wall_s - before.wall_s, 1e-9)
