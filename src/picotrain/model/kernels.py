"""Which kernel computes causal attention over whole rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from picotrain.model.blocked import blocked_attention
from picotrain.model.masks import attention_mask

BLOCKED_TOKENS = 2048  # of a window at most, on a CPU: beyond, the probabilities that `blocked_attention` keeps outweigh all else


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v, where a query sees itself and the `window - 1` keys before it.

    q (B, H, T, D), k and v (B, H_kv, T, D) with H a multiple of H_kv; returns (B, H, T, D).
    """
    tokens = q.size(2)
    if q.device.type == "cpu" and min(window, tokens) <= BLOCKED_TOKENS:
        return blocked_attention(q, k, v, window, scale)
    mask = attention_mask(0, tokens, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1))
