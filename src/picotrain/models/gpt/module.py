"""The model itself: embedding, blocks, head.

    ids -> embed -> norm -> [x + attn(norm(x)), x + mlp(norm(x))] per block -> norm -> head -> soft-cap -> logits

With windows off it is NanoChat of `transformers`: rotary positions and then a norm on queries and keys, ReLU-squared MLP, RMSNorm
without weights (also after the embedding), no biases, an untied head. A tanh caps the logits. The names of its parameters are
the names in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain import shape
from picotrain.model.cache import LayerCache
from picotrain.model.decoder import Decoder
from picotrain.model.kernels import Attend
from picotrain.model.layers import Linear, rms_norm, take
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.attention import Attention
from picotrain.models.gpt.features import ResidualScalars, Smear


class MLP(nn.Module):
    """down(relu(up(x))^2), four times as wide as the model (Primer, arXiv:2109.08668)."""

    def __init__(self, dims: shape.Dims):
        super().__init__()
        self.up = Linear(dims.width, dims.mlp_width)
        self.down = Linear(dims.mlp_width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer. It knows neither its index nor its window, so that all layers share one compiled code."""

    def __init__(self, dims: shape.Dims, eps: float, qk_scale: float = 1.0, gate_channels: int = 0):
        super().__init__()
        self.eps = eps
        self.attn = Attention(dims, eps, qk_scale, gate_channels)
        self.mlp = MLP(dims)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        cache: LayerCache | None = None,
        wanted: Tensor | None = None,
        values: Tensor | None = None,  # (B, T, H_kv D)
        mix: tuple[Tensor, Tensor, Tensor] | None = None,  # factors of x and of the embedding, (), and the embedding (B, T, C)
    ) -> Tensor:
        if mix is not None:
            of_stream, of_embedding, embedding = mix
            x = of_stream.to(x.dtype) * x + of_embedding.to(x.dtype) * embedding
        y = self.attn(rms_norm(x, self.eps), cos, sin, attend, cache, wanted, values)
        x = (x if wanted is None else take(x, wanted)) + y  # (B, T, C), or W for T
        return x + self.mlp(rms_norm(x, self.eps))


class GPT(Decoder):
    """The model of a config, for `vocab_size` ids and rows of up to `seq_len` tokens."""

    def __init__(self, model: GPTConfig, vocab_size: int, seq_len: int, compute_dtype: torch.dtype = torch.float32):
        dims = model.dims()
        super().__init__(dims, model.windows(seq_len), model.rope_theta, vocab_size, seq_len, compute_dtype)
        self.eps, self.logit_softcap = model.norm_eps, model.logit_softcap
        rows = shape.pad_vocab(vocab_size)
        with_values, channels = model.value_embedding_layers(), model.gate_channels()
        self.blocks = nn.ModuleList(
            Block(dims, model.norm_eps, model.qk_scale, channels if i in with_values else 0) for i in range(dims.depth)
        )
        self.head = Linear(dims.width, rows)
        values_width = dims.n_kv_heads * dims.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(rows, values_width, _weight=torch.empty(rows, values_width)) for i in with_values}
        )
        self.residual_scalars = ResidualScalars(dims.depth) if model.residual_scalars else None
        self.smear = Smear(channels) if model.smear else None
        self.looks_back = model.smear

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, on the CPU, so that a seed gives the same ones on every device (as nanochat does).

        Embedding: normal, std 1. Head: normal, std 0.001 (the first loss is ln(vocab_size)). q, k, v, up and value embeddings:
        uniform with std 1 / sqrt(width). o and down: zero (every block starts as the identity). Gates and smear: zero. Residual
        scalars: 1 for the stream, 0.1 for the embedding.
        """
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / self.dims.width)
        for name, parameter in self.named_parameters():
            weight = torch.zeros(parameter.shape)
            if name == "embed.weight":
                weight.normal_(0, 1, generator=generator)
            elif name == "head.weight":
                weight.normal_(0, 0.001, generator=generator)
            elif name.startswith("residual_scalars."):
                weight.fill_(1.0 if name.endswith(".stream") else 0.1)
            elif not name.endswith(("attn.o.weight", "mlp.down.weight", "attn.value_gate.weight")) and not name.startswith("smear."):
                weight.uniform_(-bound, bound, generator=generator)
            parameter.copy_(weight)

    def group_of(self, name: str, parameter: nn.Parameter) -> str:
        """Value embeddings are tables, and all of smear is scalars: its gate is a vector."""
        return {"value_embeds": "embed", "smear": "scalars"}.get(name.partition(".")[0]) or super().group_of(name, parameter)

    def head_weight(self) -> Tensor:
        return self.head.weight

    def enter(self, ids: Tensor, before: Tensor | None) -> Tensor:
        x = rms_norm(self.embed(ids).to(self.compute_dtype), self.eps)
        if self.smear is None:
            return x
        if before is None:
            previous = F.pad(x, (0, 0, 1, -1))  # each token's forerunner; the first has none
        else:
            previous = rms_norm(self.embed(before.clamp(min=0)).to(x.dtype), self.eps) * (before >= 0)[..., None]
        return self.smear(x, previous)

    def extras(self, ids: Tensor, x: Tensor) -> Iterator[tuple[Any, ...]]:
        embedding = x.view_as(x)  # a tensor of its own: the first block gets x twice, and would else be compiled apart
        scalars = self.residual_scalars
        for i in range(len(self.blocks)):
            values = self.value_embeds[str(i)](ids).to(x.dtype) if str(i) in self.value_embeds else None
            mix = (scalars.stream[i], scalars.embedding[i], embedding) if scalars is not None else None
            yield values, mix

    def leave(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)
