"""Causal self-attention, and which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picotrain import shape
from picotrain.model.cache import LayerCache
from picotrain.model.kernels import Attend
from picotrain.model.layers import Linear, rms_norm, rotate, take


def attention_mask(start: int, tokens: int, window: int, device: torch.device) -> Tensor | None:
    """Which keys 0 .. start + tokens - 1 each query start .. start + tokens - 1 sees: itself and the `window - 1` before it.

    Boolean (tokens, start + tokens), true where it sees; None where a kernel's own causality says the same.
    """
    end = start + tokens
    if end <= window and (start == 0 or tokens == 1):
        return None
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads than query heads it is grouped-query (arXiv:2305.13245)."""

    def __init__(self, dims: shape.Dims, eps: float):
        super().__init__()
        self.head_dim, self.eps = dims.head_dim, eps
        self.q = Linear(dims.width, dims.n_heads * dims.head_dim)
        self.k = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.v = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.o = Linear(dims.n_heads * dims.head_dim, dims.width)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        if wanted is None:
            q = rotate(self.q(x).view(heads), cos, sin)
        else:
            q = rotate(self.q(take(x, wanted)).view(*wanted.shape, -1, self.head_dim), cos[wanted], sin[wanted])
        q = rms_norm(q, self.eps).transpose(1, 2)  # (B, H, T, D), or W for T
        k = rms_norm(rotate(self.k(x).view(heads), cos, sin), self.eps).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, start + T, D)
        y = attend(q, k, v, scale=None)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)
