"""The cross-entropy of the head, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The loss holds fp32 logits of this many bytes at a time: on a CPU about what its cache holds, on an accelerator
# enough to fill it.
LOGIT_CHUNK_BYTES = {"cpu": 32 * 2**20}
LOGIT_CHUNK_BYTES_DEFAULT = 2**30


def losses_and_slopes(logits: Tensor, targets: Tensor, cap: float | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of soft-capped logits, fp32 (N,), and its derivative by the logits, (N, V) in their dtype.

    logits (N, V) are used up; targets (N,) >= 0. With s = sigmoid(2z / cap) the soft-cap is 2 cap s - cap: the softmax
    does not see the constant, the derivative is 4 s (1 - s), and a sigmoid takes a third of the time of a tanh.
    """
    y = logits.float()
    if cap is not None:
        s = (y * (2 / cap)).sigmoid_()
        y = s * (2 * cap)
    y[:, vocab_size:] = -math.inf
    log_p = F.log_softmax(y, dim=-1)
    target = targets[:, None]
    own = log_p.gather(1, target)  # (N, 1)
    slopes = log_p.exp_().scatter_(1, target, own.exp() - 1)
    if cap is not None:
        slopes.mul_(torch.addcmul(s, s, s, value=-1)).mul_(4)
    return -own[:, 0], slopes.to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden states (N, C) under a head (V, C), a chunk of tokens at a time.

    The derivative is formed in the forward pass, while a chunk's logits are at hand: logits of all tokens never exist,
    and none is computed twice (as in Liger's fused linear cross-entropy, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,  # (N,); -1: ignored
        derive: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],  # `losses_and_slopes` but for its last arguments
        chunk_tokens: int,
    ) -> Tensor:
        shares = (targets >= 0) / (targets >= 0).sum().clamp(min=1)  # (N,), each token's share of the mean
        w = weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = torch.zeros((), device=hidden.device)
        for h, d_h, target, share in zip(*(t.split(chunk_tokens) for t in (hidden, d_hidden, targets, shares)), strict=True):
            losses, slopes = derive(h @ w.T, target.clamp(min=0))
            share_column = share[:, None].to(h.dtype)
            loss += losses @ share
            torch.mul(slopes @ w, share_column, out=d_h)
            d_weight += slopes.T @ (h * share_column)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0].to(d_hidden.dtype), d_weight * grads[0], None, None, None
