"""The timer of a GPU: CUDA's events, and one copy of a step's values to pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from picotrain.monitor.timing import HostTimer, Timer, Values


class EventTimer:
    """CUDA: moments are events in the stream. All values of a step go to the host in one copy, to pinned memory."""

    late = True

    def __init__(self, event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True), pin_memory: bool = True):
        self._event, self._pin_memory = event, pin_memory

    def mark(self) -> Any:
        event = self._event()
        event.record()
        return event

    def elapsed_s(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1000

    def collect(self, values: Values) -> tuple[Values, torch.Tensor | None]:
        scalars = _scalars(values)
        if not scalars:
            return values, None
        packed = torch.stack([scalar.detach().to(torch.float64).reshape(()) for scalar in scalars])  # fp64 holds counts of tokens exactly
        return values, torch.empty(packed.shape, dtype=packed.dtype, pin_memory=self._pin_memory).copy_(packed, non_blocking=True)

    def fetch(self, collected: tuple[Values, torch.Tensor | None], there: Any) -> Values:
        there.synchronize()
        values, packed = collected
        return values if packed is None else _filled(values, iter(packed.tolist()))


def build(device: torch.device) -> Timer:
    """The timer of a device."""
    return EventTimer() if device.type == "cuda" else HostTimer()


def _scalars(values: Values) -> list[torch.Tensor]:
    """Every scalar tensor among the values, in order."""
    found = []
    for value in values.values():
        found += [value] if isinstance(value, torch.Tensor) else _scalars(value) if isinstance(value, Mapping) else []
    return found


def _filled(values: Values, numbers: Iterator[float]) -> dict[str, Any]:
    """The values with each tensor replaced by the next of the numbers, of its kind."""
    filled = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            number = next(numbers)
            filled[key] = number if value.is_floating_point() else int(number)
        else:
            filled[key] = _filled(value, numbers) if isinstance(value, Mapping) else value
    return filled
