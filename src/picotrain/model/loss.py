"""The cross-entropy of the head, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The loss holds fp32 logits of this many bytes at a time: on a CPU about what its cache holds, on an accelerator
# enough to fill it.
LOGIT_CHUNK_BYTES = {"cpu": 32 * 2**20}
LOGIT_CHUNK_BYTES_DEFAULT = 2**30


# exp of logits that are capped at this needs no maximum to stay within fp32: e^60 x 2^18 ids is 3e31, e^-60 is 9e-27.
BOUNDED = 60.0


def losses_and_slopes(logits: Tensor, targets: Tensor, cap: float | None, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of soft-capped logits z, fp32 (N,), and its derivative by z, which is slopes / totals: slopes (N, V) in the dtype
    of logits, totals fp32 (N, 1).

    logits (N, V) are overwritten. targets (N,) >= 0. With s = sigmoid(2z / cap) the soft-cap is y = cap (2s - 1), and dy/dz = 4 s (1 - s).
    A sigmoid takes a third of the time of a tanh. Up to BOUNDED the softmax needs no maximum. So one pass forms e = exp(y), their sum
    `totals`, and e dy/dz. Dividing by the sum would be a second pass. The caller scales its rows anyway, so it divides there.
    """
    target, columns = targets[:, None], torch.arange(logits.size(1), device=logits.device)
    y, own = logits.float(), logits.gather(1, target).float()  # (N, V), (N, 1)
    bend = own_bend = None  # dy/dz
    if cap is not None:
        s, own_s = (y * (2 / cap)).sigmoid_(), torch.sigmoid(own * (2 / cap))
        y, own = (s * 2 - 1).mul_(cap), (own_s * 2 - 1) * cap
        bend, own_bend = torch.addcmul(s, s, s, value=-1).mul_(4), 4 * own_s * (1 - own_s)
    if cap is None or cap > BOUNDED:
        peak = y[:, :vocab_size].amax(dim=1, keepdim=True)
        y, own = y - peak, own - peak
    e = y.exp_()
    if vocab_size < logits.size(1):
        e.masked_fill_(columns >= vocab_size, 0)
    totals = e.sum(dim=1, keepdim=True)
    own_slopes = own.exp() - totals
    if bend is not None and own_bend is not None:
        e, own_slopes = e.mul_(bend), own_slopes * own_bend
    slopes = e.to(logits.dtype).scatter_(1, target, own_slopes.to(logits.dtype))
    return (totals.log() - own)[:, 0], slopes, totals


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden states (N, C) under a head (V, C), a chunk of tokens at a time.

    The derivative is formed in the forward pass, while a chunk's logits are at hand. So the logits of all tokens never exist at
    once, and none is computed twice. Liger's fused linear cross-entropy does the same (arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,  # (N,); -1: ignored
        derive: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],  # `losses_and_slopes` with its last arguments bound
        chunk_tokens: int,
    ) -> Tensor:
        shares = (targets >= 0) / (targets >= 0).sum().clamp(min=1)  # (N,), each token's share of the mean
        w = weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = torch.zeros((), device=hidden.device)
        for h, d_h, target, share in zip(*(t.split(chunk_tokens) for t in (hidden, d_hidden, targets, shares)), strict=True):
            losses, slopes, totals = derive(h @ w.T, target.clamp(min=0))
            loss += losses @ share
            scale = (share[:, None] / totals).to(h.dtype)
            torch.mul(slopes @ w, scale, out=d_h)
            d_weight += slopes.T @ (h * scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0].to(d_hidden.dtype), d_weight * grads[0], None, None, None
