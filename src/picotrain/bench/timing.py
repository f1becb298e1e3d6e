"""Time on a device without waiting for it, and the memory of a process."""

from __future__ import annotations

import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    with suppress(OSError, IndexError):  # of this program alone: what getrusage says may be that of the one which has started it
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Points in a device's time. On CUDA an event in its stream, so that taking one does not make the host wait."""

    def __init__(self, device: str):
        self._cuda, self._mps = device == "cuda", device == "mps"

    def mark(self) -> Any:
        """Now: when all that was asked of the device so far is done."""
        if self._mps:
            torch.mps.synchronize()
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to another; waits for the second."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
