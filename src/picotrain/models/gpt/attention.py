"""Causal self-attention, and which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picotrain import shape
from picotrain.model.cache import LayerCache
from picotrain.model.kernels import Attend
from picotrain.model.layers import Linear, rms_norm, rotate, take


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads than query heads it is grouped-query (arXiv:2305.13245)."""

    def __init__(self, dims: shape.Dims, eps: float, qk_scale: float = 1.0, gate_channels: int = 0):
        super().__init__()
        self.head_dim, self.eps = dims.head_dim, eps
        self.scale = qk_scale * dims.head_dim**-0.5
        self.q = Linear(dims.width, dims.n_heads * dims.head_dim)
        self.k = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.v = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.o = Linear(dims.n_heads * dims.head_dim, dims.width)
        self.value_gate = Linear(gate_channels, dims.n_kv_heads) if gate_channels else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        cache: LayerCache | None,
        wanted: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, W, C) with `wanted`. values: value embeddings (B, T, H_kv D)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        if wanted is None:
            q = rotate(self.q(x).view(heads), cos, sin)
        else:
            q = rotate(self.q(take(x, wanted)).view(*wanted.shape, -1, self.head_dim), cos[wanted], sin[wanted])
        q = rms_norm(q, self.eps).transpose(1, 2)  # (B, H, T, D), or W for T
        k = rms_norm(rotate(self.k(x).view(heads), cos, sin), self.eps).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v(x).view(heads)  # (B, T, H_kv, D)
        if self.value_gate is not None and values is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, H_kv), 1 at first
            v = v + gate[..., None] * values.view(heads)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, start + T, D)
        y = attend(q, k, v, self.scale)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)
