"""Which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(start: int, tokens: int, window: int, device: torch.device) -> Tensor | None:
    """Which keys 0 .. start + tokens - 1 each query start .. start + tokens - 1 sees: itself and the `window - 1` before it.

    Boolean (tokens, start + tokens), true where it sees; None where the kernel's own causality says the same.
    """
    end = start + tokens
    if end <= window and (start == 0 or tokens == 1):
        return None
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (distance >= 0) & (distance < window)
