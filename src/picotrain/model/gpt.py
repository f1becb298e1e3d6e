"""The model itself: embedding, blocks, head."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain import shape
from picotrain.config.schema import ModelConfig
from picotrain.model import loss
from picotrain.model.attention import Attention
from picotrain.model.cache import KVCache, LayerCache
from picotrain.model.compiling import set_up_compiler
from picotrain.model.features import ResidualScalars, Smear, previous_ids
from picotrain.model.kernels import Attend, Case, Choice, Kernel, Names, Sdpa, default_kernels, select
from picotrain.model.layers import MLP, Linear, rms_norm, rotary_angles, softcap, take
from picotrain.model.loss import HeadLoss, losses_and_slopes
from picotrain.model.masks import attention_mask


class Block(nn.Module):
    """One layer. It knows neither its index nor its window, so that all layers share one compiled code."""

    def __init__(self, dims: shape.Dims, eps: float, qk_scale: float = 1.0, value_gate: bool = False):
        super().__init__()
        self.eps = eps
        self.attn = Attention(dims, eps, qk_scale, value_gate)
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


class GPT(nn.Module):
    """The model of a config, for `vocab_size` ids and rows of up to `seq_len` tokens.

    Its weights hold nothing meaningful until `init_weights` or a checkpoint has filled them. For inference only,
    `model.to(model.compute_dtype)` and `model.cast()` give the same numbers without casting weights at every call.
    """

    cos: Tensor  # (seq_len, 1, D / 2), fp32
    sin: Tensor

    def __init__(self, model: ModelConfig, vocab_size: int, seq_len: int, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dims = dims = shape.dims(model)
        self.vocab_size, self.seq_len, self.compute_dtype = vocab_size, seq_len, compute_dtype
        self.eps, self.logit_softcap = model.norm_eps, model.logit_softcap
        self.windows = shape.windows(model, seq_len)
        rows = shape.pad_vocab(vocab_size)
        self.embed = nn.Embedding(rows, dims.width, _weight=torch.empty(rows, dims.width))
        with_values = shape.value_embedding_layers(model)
        self.blocks = nn.ModuleList(Block(dims, model.norm_eps, model.qk_scale, i in with_values) for i in range(dims.depth))
        self.head = Linear(dims.width, rows)
        values_width = dims.n_kv_heads * dims.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(rows, values_width, _weight=torch.empty(rows, values_width)) for i in with_values}
        )
        self.residual_scalars = ResidualScalars(dims.depth) if model.residual_scalars else None
        self.smear = Smear(dims.width) if model.smear else None
        angles = rotary_angles(seq_len, dims.head_dim, model.rope_theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._kernels: tuple[Kernel, Kernel] | None = None  # None: those of the device that rows come on
        self._attends: dict[tuple[int, torch.device], Attend] = {}
        self._derive = losses_and_slopes
        self._compiled = False

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

    def num_parameters(self) -> int:
        """All weights, padding of the vocabulary included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def cast(self) -> GPT:
        """This model for many small calls: its matrices cast once, in memory of their own; all else is shared. Not for training.

        A call that reads one token casts as many numbers as it multiplies, so generating without this takes twice as long.
        """
        if self.embed.weight.dtype == self.compute_dtype:
            return self
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        shared |= {id(self._kernels): self._kernels, id(self._attends): {}}
        for weight in self.parameters():
            if weight.dim() > 1:
                shared[id(weight)] = nn.Parameter(weight.to(self.compute_dtype), requires_grad=False)
        return copy.deepcopy(self, shared)

    def choose_kernels(self, forced: Names, kept: Names) -> tuple[Choice, Choice]:
        """Choose kernels for full rows on the device that the weights are on, and use them; see `picotrain.model.kernels.select`."""
        dims, device = self.dims, self.embed.weight.device
        heads = (dims.n_heads, dims.n_kv_heads, dims.head_dim)
        cases = [Case(*heads, self.seq_len, window, self.compute_dtype, device) for window in sorted(set(self.windows))]
        full, windowed = select(cases, forced, kept)
        self.use_kernels(full.kernel, windowed.kernel)
        return full, windowed

    def use_kernels(self, full: Kernel, windowed: Kernel) -> None:
        """Compute the attention of full rows by these kernels: of layers that see the whole row, and of those with a window.

        Calls with a cache, with `wanted` or of shorter rows keep to torch's own choice and to masks.
        """
        self._kernels, self._attends = (full, windowed), {}

    def compile_blocks(self) -> None:
        """Compile the blocks and the loss in place: one code for all layers, and no name changes.

        Shapes are static: a batch of another shape compiles once more. Calls with a cache stay uncompiled, because
        there every token has another shape.
        """
        set_up_compiler()
        for block in self.blocks:
            block.compile(dynamic=False)
        self._derive = torch.compile(losses_and_slopes, dynamic=False)
        self._compiled = True

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab_size), or the cross-entropy loss in nats where there are targets; both fp32.

        ids, targets: (B, T) int64. A target of -1 is ignored: its loss is 0 and the mean is over the others.
        reduction "none" gives losses (B, T). With a cache the ids follow the tokens in it, and their keys and values
        are added. last_only: logits of the last position only, (B, 1, vocab_size).
        """
        hidden = self.hidden(ids, cache)  # (B, T, C)
        if targets is None:
            return self.logits(hidden[:, -1:] if last_only else hidden)
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        chunk_bytes = loss.LOGIT_CHUNK_BYTES.get(hidden.device.type, loss.LOGIT_CHUNK_BYTES_DEFAULT)
        chunk_tokens = max(1, chunk_bytes // (4 * self.head.weight.size(0)))
        if reduction == "mean" and torch.is_grad_enabled():
            return HeadLoss.apply(flat, self.head.weight, flat_targets, self._loss_of_chunk, chunk_tokens)
        chunks = zip(flat.split(chunk_tokens), flat_targets.split(chunk_tokens), strict=True)
        losses = torch.cat([F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none") for h, t in chunks])
        return losses.view(targets.shape) if reduction == "none" else losses.sum() / (flat_targets >= 0).sum().clamp(min=1)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C) after the last norm, in compute_dtype; what `logits` takes.

        wanted: int64 (B, W), the positions among the T whose hidden states are asked for: then (B, W, C). All others stop at
        the last block's keys and values, and nothing is computed that is not looked at. Without a window (the last block
        has none) and with an empty cache only. The ids of a row may be padded on the right: nothing before sees them.
        """
        start = 0 if cache is None else cache.length
        end = start + ids.size(1)
        limit = self.seq_len if cache is None else cache.max_len
        if end > limit:
            raise ValueError(f"{end} tokens, but there is room for {limit}")
        full_rows = cache is None and wanted is None and end == self.seq_len
        make = self._attend if full_rows else lambda w, device: Sdpa(attention_mask(start, ids.size(1), w, device))
        attends = {window: make(window, ids.device) for window in set(self.windows)}
        before = None  # the ids before these, where they are not simply the ids' own
        if self.smear is not None and cache is not None and start:
            before = torch.cat((cache.ids[:, start - 1 : start], ids[:, :-1]), dim=1)
        return self._run(ids, self.cos[start:end], self.sin[start:end], attends, cache, wanted, before)

    def branches(self, ids: Tensor, positions: Tensor, visible: Tensor, key_positions: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, T, C) of tokens that go on from the S tokens in `cache` along several branches at once.

        ids, positions: int64 (B, T); visible: bool (B, T, S + T), the cached and new tokens that each sees (itself
        among them); key_positions: int64 (B, S + T). Positions are those of the rotary embedding, below seq_len.
        """
        distance = positions[:, :, None] - key_positions[:, None]  # (B, T, S + T)
        masks = {w: (visible if w >= self.seq_len else visible & (distance < w))[:, None] for w in set(self.windows)}
        attends = {window: Sdpa(mask) for window, mask in masks.items()}
        before = None
        if self.smear is not None:
            before = previous_ids(ids, positions, visible, key_positions, torch.cat((cache.ids[:, : cache.length], ids), dim=1))
        return self._run(ids, self.cos[positions], self.sin[positions], attends, cache, None, before)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> fp32 logits (..., vocab_size): those of the padding are cut off."""
        return softcap(self.head(hidden).float(), self.logit_softcap)[..., : self.vocab_size]

    def _run(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        attends: Mapping[int, Attend],
        cache: KVCache | None,
        wanted: Tensor | None,
        before: Tensor | None,
    ) -> Tensor:
        """The blocks: ids (B, T) -> (B, T, C). cos and sin (T, 1, D / 2) or (B, T, 1, D / 2); attends by attention window;
        before: the id one position before each (B, T), -1: none; None: as they stand.
        """
        x = self._embedded(ids, before)
        if cache is not None:
            cache.ids[:, cache.length : cache.length + ids.size(1)] = ids
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        layer_caches = [None] * len(self.blocks) if cache is None else cache.layers
        eager = self._compiled and (cache is not None or wanted is not None)
        embedding = x.view_as(x)  # a tensor of its own: else the first block, which has it twice, would be compiled apart
        last = len(self.blocks) - 1
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for i, (block, window, layer_cache) in enumerate(zip(self.blocks, self.windows, layer_caches, strict=True)):
                values = self.value_embeds[str(i)](ids).to(x.dtype) if str(i) in self.value_embeds else None
                scalars = self.residual_scalars
                mix = (scalars.stream[i], scalars.embedding[i], embedding) if scalars is not None else None
                if wanted is None or i < last:
                    x = block(x, cos, sin, attends[window], layer_cache, None, values, mix)
                else:
                    up_to = torch.arange(ids.size(1), device=ids.device) <= wanted[..., None]  # (B, W, T)
                    x = block(x, cos, sin, Sdpa(up_to[:, None]), layer_cache, wanted, values, mix)
        return rms_norm(x, self.eps)

    def _attend(self, window: int, device: torch.device) -> Attend:
        """The attention of full rows, made once: a kernel may prepare something for it."""
        key = (window, device)
        if key not in self._attends:
            full, windowed = self._kernels or default_kernels(device.type, self.seq_len, window)
            with torch.inference_mode(False):  # the first call may be an evaluation's, and training keeps what it makes
                self._attends[key] = (full if window >= self.seq_len else windowed)(self.seq_len, window, device)
        return self._attends[key]

    def _embedded(self, ids: Tensor, before: Tensor | None) -> Tensor:
        """What enters the first block: (B, T) -> (B, T, C)."""
        x = rms_norm(self.embed(ids).to(self.compute_dtype), self.eps)
        if self.smear is None:
            return x
        if before is None:
            previous = F.pad(x, (0, 0, 1, -1))  # each token's forerunner; the first has none
        else:
            previous = rms_norm(self.embed(before.clamp(min=0)).to(x.dtype), self.eps) * (before >= 0)[..., None]
        return self.smear(x, previous)

    def _loss_of_chunk(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._derive(logits, targets, self.logit_softcap, self.vocab_size)
