"""The small parts: a linear layer that casts, the norm, rotary positions, the soft-cap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T in the dtype of x, whatever the dtype of W; not initialised (the model does that)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467), without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary_angles(seq_len: int, head_dim: int, theta: float) -> Tensor:
    """The angle by which pair i of a head is turned at each position: position x theta^(-2i / D). (seq_len, 1, D / 2), fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): turn each pair (x_i, x_{i + D/2}) clockwise by its angle, as NanoChat does.

    x (B, T, H, D), cos and sin (T, 1, D / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def take(x: Tensor, wanted: Tensor) -> Tensor:
    """The positions `wanted` (B, W) of x (B, T, C): (B, W, C)."""
    return x.gather(1, wanted[..., None].expand(-1, -1, x.size(-1)))


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap x tanh(logits / cap) (Gemma 2, arXiv:2408.00118)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
