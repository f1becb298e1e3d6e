"""Attention by blocks of queries, in plain matmuls: for CPUs, where it is up to three times as fast as SDPA's kernel.

A block of BLOCK queries looks only at the keys that one of them may see. Causality halves the work, and a window bounds it.
The softmax works in fp32, on scores in the dtype of q. Probabilities are kept for the backward, in the dtype of q.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries; of 64, 128 and 256 the one that is never much slower than the best (docs/log.md, 2026-11-25)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v, where a query sees itself and the `window - 1` keys before it.

    q (B, H, T, D), k and v (B, H_kv, T, D) with H a multiple of H_kv; returns (B, H, T, D).
    """
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = _Blocked.apply(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), window, scale)  # (B H, T, D)
    return y.view(q.shape)


def _spans(tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block: its last key is its last query's own."""
    return [(a, min(a + BLOCK, tokens), max(0, a - window + 1)) for a in range(0, tokens, BLOCK)]


def _transposed(x: Tensor) -> Tensor:
    """(N, S, D) -> (N, D, S) in a layout that bmm takes as it is: it would copy a slice, column by column."""
    return x.contiguous().mT


# torch.compile sees one call for the forward and one for the backward. Unrolled, they were eleven of the 27 kernels of a model, and the
# step was no faster for them (docs/log.md, 2026-11-25: start-up). Compiled code is kept under these names, whatever the functions do.
# So rename them when you change how many tensors they return, or their shapes.
_LIBRARY = torch.library.Library("picotrain", "DEF")
_LIBRARY.define("blocked(Tensor q, Tensor k, Tensor v, int window, float scale) -> (Tensor, Tensor[])")
_LIBRARY.define(
    "blocked_backward(Tensor d_y, Tensor q, Tensor k, Tensor v, Tensor[] kept, int window, float scale) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "blocked", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    """y and the probabilities of each block."""
    y, kept = torch.empty_like(q), []
    for a, b, first in _spans(q.size(1), window):
        s = torch.bmm(q[:, a:b] * scale, _transposed(k[:, first:b]))  # (N, b - a, b - first)
        # To add -inf is several times as fast as masked_fill_.
        s[:, :, a - first :] += q.new_full((b - a, b - a), -math.inf).triu_(1)  # keys after the query
        if (left := b - window - first) > 0:  # keys that have left the window of the block's last query
            s[:, :, :left] += q.new_full((b - a, left), -math.inf).tril_(a - window - first)
        p = torch.softmax(s, dim=-1)
        y[:, a:b] = torch.bmm(p, v[:, first:b])
        kept.append(p)
    return y, kept


@torch.library.impl(_LIBRARY, "blocked_backward", "CompositeExplicitAutograd")
def _backward(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], window: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros(x.shape, device=x.device) for x in (k, v))  # sums over blocks: fp32
    for p, (a, b, first) in zip(kept, _spans(q.size(1), window), strict=True):
        d_block = d_y[:, a:b]
        d_v[:, first:b] += torch.bmm(p.mT, d_block)
        d_p = torch.bmm(d_block, _transposed(v[:, first:b]))
        d_s = torch.ops.aten._softmax_backward_data(d_p, p, -1, q.dtype)  # p (d_p - sum(p d_p)) in one pass
        d_q[:, a:b] = torch.bmm(d_s, k[:, first:b])
        d_k[:, first:b] += torch.bmm(d_s.mT, q[:, a:b])
    return d_q.mul_(scale), d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype)


@torch.library.register_fake("picotrain::blocked")
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(q), [q.new_empty(q.size(0), b - a, b - first) for a, b, first in _spans(q.size(1), window)]


@torch.library.register_fake("picotrain::blocked_backward")
def _backward_shapes(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


# What each operator does, for readers who look inside.
INSIDE = {torch.ops.picotrain.blocked.default: _forward, torch.ops.picotrain.blocked_backward.default: _backward}


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        y, kept = torch.ops.picotrain.blocked(q, k, v, window, scale)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.window, ctx.scale = window, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        return *torch.ops.picotrain.blocked_backward(grads[0], q, k, v, kept, ctx.window, ctx.scale), None, None
