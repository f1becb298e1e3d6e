"""Attention by blocks of queries is the attention of a dense mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picotrain.model.blocked import BLOCK, blocked_attention
from picotrain.model.masks import attention_mask


def inputs(tokens: int, heads: int = 4, kv_heads: int = 4, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, head_dim), (2, kv_heads, tokens, head_dim), (2, kv_heads, tokens, head_dim)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """By definition: a mask of T x T."""
    distance = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
    visible = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


def with_gradients(attention, tensors: list[Tensor], window: int, scale: float) -> list[Tensor]:
    y = attention(*tensors, window, scale)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("tokens", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0, 2.0])
def test_blocks_of_queries_attend_as_a_dense_mask_says(tokens, share, kv_heads):
    tensors, window = inputs(tokens, kv_heads=kv_heads), max(1, round(share * tokens))
    found, expected = (with_gradients(f, tensors, window, 0.3) for f in (blocked_attention, dense))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [200, 40])
def test_in_bf16_it_is_as_near_to_the_truth_as_torchs_own_kernel(window):
    tensors = inputs(200, head_dim=64)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    truth = with_gradients(dense, [half.detach().float().requires_grad_() for half in halves], window, 0.125)
    for exact, ours, torchs in zip(
        truth, with_gradients(blocked_attention, halves, window, 0.125), with_gradients(dense, halves, window, 0.125), strict=True
    ):
        assert (ours.float() - exact).norm() < 2 * (torchs.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("window", [2 * BLOCK + 37, 40])
def test_blocks_of_queries_are_one_call_forward_and_one_back_to_the_compiler(window):
    ops = torch.ops.picotrain
    q, k, v = (tensor.detach()[:, :2].flatten(0, 1) for tensor in inputs(2 * BLOCK + 37))
    torch.library.opcheck(ops.blocked.default, (q, k, v, window, 0.3))
    y, kept = ops.blocked(q, k, v, window, 0.3)
    torch.library.opcheck(ops.blocked_backward.default, (torch.ones_like(y), q, k, v, kept, window, 0.3))


def test_the_mask_is_none_where_causality_says_the_same():
    assert attention_mask(0, 8, 8, torch.device("cpu")) is None
    assert attention_mask(0, 8, 4, torch.device("cpu")) is not None
