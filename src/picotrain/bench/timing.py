"""Time on a device without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Points in a device's time. On CUDA an event in its stream, so that taking one does not make the host wait."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def mark(self) -> Any:
        """Now: when all that was asked of the device so far is done."""
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
