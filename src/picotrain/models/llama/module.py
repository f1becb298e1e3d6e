"""Llama: embedding, blocks, head.

    ids -> embed -> [x + attn(norm(x)), x + mlp(norm(x))] per block -> norm -> head -> logits

With windows off it is, definition by definition, Llama of `transformers` (arXiv:2302.13971, grouped queries arXiv:2305.13245), and
Qwen3 with qk_norm: RMSNorm with weights, rotary positions, a gated MLP, no biases and no soft-cap. The names of its parameters are
the names in a checkpoint.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain import shape
from picotrain.model.cache import LayerCache
from picotrain.model.decoder import Decoder
from picotrain.model.kernels import Attend
from picotrain.model.layers import Linear, rms_norm, rotate, take
from picotrain.models.llama import LlamaConfig


class RMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, in the dtype of x; not initialised (the model does that)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)  # rounded before the weight, as in transformers


class Attention(nn.Module):
    """Causal self-attention with rotary positions; with fewer key/value heads than query heads it is grouped-query."""

    def __init__(self, dims: shape.Dims, eps: float, qk_norm: bool):
        super().__init__()
        self.head_dim, self.scale = dims.head_dim, dims.head_dim**-0.5
        self.q = Linear(dims.width, dims.n_heads * dims.head_dim)
        self.k = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.v = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.o = Linear(dims.n_heads * dims.head_dim, dims.width)
        self.q_norm = RMSNorm(dims.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(dims.head_dim, eps) if qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, W, C) with `wanted`."""
        asking = x if wanted is None else take(x, wanted)  # (B, T, C), or W for T
        q = self.q(asking).view(*asking.shape[:2], -1, self.head_dim)  # (B, T, H, D), or W for T
        k = self.k(x).view(*x.shape[:2], -1, self.head_dim)  # (B, T, H_kv, D)
        v = self.v(x).view(k.shape).transpose(1, 2)  # (B, H_kv, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, cos, sin) if wanted is None else rotate(q, cos[wanted], sin[wanted])
        q, k = q.transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, start + T, D)
        y = attend(q, k, v, self.scale)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """down(silu(gate(x)) up(x)): SwiGLU (arXiv:2002.05202)."""

    def __init__(self, dims: shape.Dims):
        super().__init__()
        self.gate = Linear(dims.width, dims.mlp_width)
        self.up = Linear(dims.width, dims.mlp_width)
        self.down = Linear(dims.mlp_width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer. It knows neither its index nor its window, so that all layers share one compiled code."""

    def __init__(self, dims: shape.Dims, eps: float, qk_norm: bool):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(dims.width, eps), Attention(dims, eps, qk_norm)
        self.mlp_norm, self.mlp = RMSNorm(dims.width, eps), MLP(dims)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        y = self.attn(self.attn_norm(x), cos, sin, attend, cache, wanted)
        x = (x if wanted is None else take(x, wanted)) + y  # (B, T, C), or W for T
        return x + self.mlp(self.mlp_norm(x))


class Llama(Decoder):
    """The model of a config, for `vocab_size` ids and rows of up to `seq_len` tokens."""

    def __init__(self, model: LlamaConfig, vocab_size: int, seq_len: int, compute_dtype: torch.dtype = torch.float32):
        dims = model.dims()
        super().__init__(dims, model.windows(seq_len), model.rope_theta, vocab_size, seq_len, compute_dtype)
        self.sin.neg_()  # `rotate` turns clockwise, and Llama the other way
        self.blocks = nn.ModuleList(Block(dims, model.norm_eps, model.qk_norm) for _ in range(dims.depth))
        self.norm = RMSNorm(dims.width, model.norm_eps)
        self.head = None if model.tie_embeddings else Linear(dims.width, shape.pad_vocab(vocab_size))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, on the CPU, so that a seed gives the same ones on every device.

        As GPT's: embedding normal, std 1; head normal, std 0.001 (the first loss is ln(vocab_size)); o and down zero (every block
        starts as the identity); all other matrices uniform with std 1 / sqrt(width). Norms: one. A table that is embedding and head has
        std 1 / width: a token's logit of itself is then 1, and the first loss stays ln(vocab_size).
        """
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / self.dims.width)
        for name, parameter in self.named_parameters():
            weight = torch.zeros(parameter.shape)
            if name == "embed.weight":
                weight.normal_(0, 1 if self.head is not None else 1 / self.dims.width, generator=generator)
            elif name == "head.weight":
                weight.normal_(0, 0.001, generator=generator)
            elif parameter.dim() == 1:
                weight.fill_(1.0)
            elif not name.endswith(("attn.o.weight", "mlp.down.weight")):
                weight.uniform_(-bound, bound, generator=generator)
            parameter.copy_(weight)

    def group_of(self, name: str, parameter: nn.Parameter) -> str:
        """A table that is embedding and head learns as the head."""
        return "head" if self.head is None and name == "embed.weight" else super().group_of(name, parameter)

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def enter(self, ids: Tensor, before: Tensor | None) -> Tensor:
        return self.embed(ids).to(self.compute_dtype)

    def leave(self, x: Tensor) -> Tensor:
        return self.norm(x)
