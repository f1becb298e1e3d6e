"""What every model offers to the rest of the program, and what decoder-only transformers share.

    ids -> enter -> block per layer -> leave -> logits

An architecture gives the three steps (`picotrain.models`). The rest is here: kernels, windows, the key-value cache, branches for
CORE, compiling, the loss. Shapes: B rows, T tokens, C width, H heads, D head_dim, V padded vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain import shape
from picotrain.model import loss
from picotrain.model.cache import KVCache
from picotrain.model.compiling import set_up_compiler
from picotrain.model.kernels import Attend, Case, Choice, Kernel, Names, Sdpa, default_kernels, select
from picotrain.model.layers import rotary_angles, softcap
from picotrain.model.loss import HeadLoss, losses_and_slopes
from picotrain.model.masks import attention_mask


class LanguageModel(nn.Module):
    """What training, evaluation and sampling need of a model, and no more. Its weights mean nothing until `init_weights` or a checkpoint
    has filled them."""

    vocab_size: int
    seq_len: int  # the longest row
    compute_dtype: torch.dtype = torch.float32

    def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Logits (B, T, vocab_size), or the cross-entropy loss in nats where there are targets; both fp32.

        ids, targets: (B, T) int64. A target of -1 is ignored: its loss is 0 and the mean is over the others. reduction "none" gives
        losses (B, T).
        """
        raise NotImplementedError

    def init_weights(self, seed: int) -> None:
        """Draw all weights on the CPU, so that a seed gives the same ones on every device."""
        raise NotImplementedError

    def group_of(self, name: str, parameter: nn.Parameter) -> str:
        """The parameter group: "embed", "head", "scalars" or "matrices". It decides learning rate and decay."""
        top = name.partition(".")[0]
        return top if top in ("embed", "head") else "matrices" if parameter.dim() == 2 else "scalars"

    def num_parameters(self) -> int:
        """All weights, padding of the vocabulary included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def cast(self) -> LanguageModel:
        """This model for many small calls; see `Decoder.cast`."""
        return self

    def choose_kernels(self, forced: Names, kept: Names) -> tuple[Choice, Choice] | None:
        """Choose the kernels of attention and use them; None: the model makes its attention itself."""
        return None

    def compile_blocks(self) -> None:
        """Compile in place, so that no name changes."""
        set_up_compiler()
        self.compile(dynamic=False)


class Decoder(LanguageModel):
    """A decoder-only transformer. `dims`, `windows` and `theta` (of rotary positions) decide what all layers share.

    A subclass makes `blocks`, whose calls `_run` shows, and the methods below `_run`. For inference only,
    `model.to(model.compute_dtype)` and `model.cast()` give the same numbers without casting weights at every call.
    """

    cos: Tensor  # (seq_len, 1, D / 2), fp32
    sin: Tensor
    blocks: nn.ModuleList
    embed: nn.Embedding
    logit_softcap: float | None = None
    looks_back = False  # whether `enter` wants the id before each token

    def __init__(self, dims: shape.Dims, windows: tuple[int, ...], theta: float, vocab_size: int, seq_len: int, compute_dtype: torch.dtype):
        super().__init__()
        self.dims, self.windows = dims, windows
        self.vocab_size, self.seq_len, self.compute_dtype = vocab_size, seq_len, compute_dtype
        rows = shape.pad_vocab(vocab_size)
        self.embed = nn.Embedding(rows, dims.width, _weight=torch.empty(rows, dims.width))
        angles = rotary_angles(seq_len, dims.head_dim, theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._kernels: tuple[Kernel, Kernel] | None = None  # None: those of the device that rows come on
        self._attends: dict[tuple[int, torch.device], Attend] = {}
        self._derive = losses_and_slopes
        self._compiled = False

    # ------------------------------------------------------------ what an architecture gives

    def enter(self, ids: Tensor, before: Tensor | None) -> Tensor:
        """What enters the first block: ids (B, T) -> (B, T, C) in compute_dtype.

        before: (B, T), the id one position before each, -1 where there is none. None: the ids stand one after the other, or this model
        does not look at them."""
        raise NotImplementedError

    def extras(self, ids: Tensor, x: Tensor) -> Iterator[tuple[Any, ...]]:
        """What each block gets beside; x: what enters the first."""
        for _ in self.blocks:
            yield ()

    def leave(self, x: Tensor) -> Tensor:
        """The last norm: (B, T, C) -> (B, T, C)."""
        raise NotImplementedError

    def head_weight(self) -> Tensor:
        """The output matrix (V, C)."""
        raise NotImplementedError

    # ------------------------------------------------------------ calls

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """As in `LanguageModel`. With a cache the ids follow the tokens in it, and their keys and values are added to it. last_only: give
        the logits of the last position only, (B, 1, vocab_size)."""
        hidden = self.hidden(ids, cache)  # (B, T, C)
        if targets is None:
            return self.logits(hidden[:, -1:] if last_only else hidden)
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        chunk_bytes = loss.LOGIT_CHUNK_BYTES.get(hidden.device.type, loss.LOGIT_CHUNK_BYTES_DEFAULT)
        chunk_tokens = max(1, chunk_bytes // (4 * self.head_weight().size(0)))
        if reduction == "mean" and torch.is_grad_enabled():
            return HeadLoss.apply(flat, self.head_weight(), flat_targets, self._loss_of_chunk, chunk_tokens)
        chunks = zip(flat.split(chunk_tokens), flat_targets.split(chunk_tokens), strict=True)
        losses = torch.cat([F.cross_entropy(self.logits(h), t, ignore_index=-1, reduction="none") for h, t in chunks])
        return losses.view(targets.shape) if reduction == "none" else losses.sum() / (flat_targets >= 0).sum().clamp(min=1)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C) after the last norm, in compute_dtype; what `logits` takes.

        wanted: int64 (B, W), positions among the T. Only their hidden states are returned: (B, W, C). All other positions stop at
        the last block's keys and values, so nothing is computed that is not looked at. It works where the last block has no window
        and the cache is empty. The ids of a row may be padded on the right: nothing before sees them.
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
        if self.looks_back and cache is not None and start:
            before = torch.cat((cache.ids[:, start - 1 : start], ids[:, :-1]), dim=1)
        return self._run(ids, self.cos[start:end], self.sin[start:end], attends, cache, wanted, before)

    def branches(self, ids: Tensor, positions: Tensor, visible: Tensor, key_positions: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, T, C) of tokens that go on from the S tokens in `cache` along several branches at once.

        ids, positions: int64 (B, T). visible: bool (B, T, S + T), true for the cached and new tokens that a token sees, itself
        included. key_positions: int64 (B, S + T). Positions are those of the rotary embedding, below seq_len.
        """
        distance = positions[:, :, None] - key_positions[:, None]  # (B, T, S + T)
        masks = {w: (visible if w >= self.seq_len else visible & (distance < w))[:, None] for w in set(self.windows)}
        attends = {window: Sdpa(mask) for window, mask in masks.items()}
        before = None
        if self.looks_back:
            before = previous_ids(ids, positions, visible, key_positions, torch.cat((cache.ids[:, : cache.length], ids), dim=1))
        return self._run(ids, self.cos[positions], self.sin[positions], attends, cache, None, before)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> fp32 logits (..., vocab_size). The logits of the padding are cut off."""
        found = F.linear(hidden, self.head_weight().to(hidden.dtype)).float()
        return softcap(found, self.logit_softcap)[..., : self.vocab_size]

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
        """The blocks: ids (B, T) -> (B, T, C). cos and sin (T, 1, D / 2) or (B, T, 1, D / 2); attends by attention window."""
        x = self.enter(ids, before)
        if cache is not None:
            cache.ids[:, cache.length : cache.length + ids.size(1)] = ids
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        layer_caches = [None] * len(self.blocks) if cache is None else cache.layers
        eager = self._compiled and (cache is not None or wanted is not None)
        last = len(self.blocks) - 1
        layers = zip(self.blocks, self.windows, layer_caches, self.extras(ids, x), strict=True)
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for i, (block, window, layer_cache, extras) in enumerate(layers):
                if wanted is None or i < last:
                    x = block(x, cos, sin, attends[window], layer_cache, None, *extras)
                else:
                    up_to = torch.arange(ids.size(1), device=ids.device) <= wanted[..., None]  # (B, W, T)
                    x = block(x, cos, sin, Sdpa(up_to[:, None]), layer_cache, wanted, *extras)
        return self.leave(x)

    def _loss_of_chunk(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._derive(logits, targets, self.logit_softcap, self.vocab_size)

    # ------------------------------------------------------------ how it computes

    def choose_kernels(self, forced: Names, kept: Names) -> tuple[Choice, Choice]:
        """Choose kernels for full rows on the device that the weights are on, and use them; see `picotrain.model.kernels.select`."""
        dims, device = self.dims, self.embed.weight.device
        heads = (dims.n_heads, dims.n_kv_heads, dims.head_dim)
        cases = [Case(*heads, self.seq_len, window, self.compute_dtype, device) for window in sorted(set(self.windows))]
        full, windowed = select(cases, forced, kept)
        self.use_kernels(full.kernel, windowed.kernel)
        return full, windowed

    def use_kernels(self, full: Kernel, windowed: Kernel) -> None:
        """Compute the attention of full rows by these kernels: the first for layers that see the whole row, the second for those with
        a window.

        Calls with a cache, with `wanted` or of shorter rows use torch's own choice and masks.
        """
        self._kernels, self._attends = (full, windowed), {}

    def _attend(self, window: int, device: torch.device) -> Attend:
        """The attention of full rows, made once: a kernel may prepare something for it."""
        key = (window, device)
        if key not in self._attends:
            full, windowed = self._kernels or default_kernels(device.type, self.seq_len, window)
            with torch.inference_mode(False):  # the first call may be an evaluation's, and training keeps what it makes
                self._attends[key] = (full if window >= self.seq_len else windowed)(self.seq_len, window, device)
        return self._attends[key]

    def compile_blocks(self) -> None:
        """Compile the blocks and the loss in place. All layers share one code, and no name changes.

        Shapes are static, so a batch of another shape compiles once more. Calls with a cache stay uncompiled, because each of
        their tokens has another shape.
        """
        set_up_compiler()
        for block in self.blocks:
            block.compile(dynamic=False)
        self._derive = torch.compile(losses_and_slopes, dynamic=False)
        self._compiled = True

    @torch.no_grad()
    def cast(self) -> Decoder:
        """This model for many small calls, not for training. Its matrices are cast once, in memory of their own. All else is shared.

        A call that reads one token casts as many numbers as it multiplies. So generating without this takes twice as long.
        """
        if self.embed.weight.dtype == self.compute_dtype:
            return self
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        shared |= {id(self._kernels): self._kernels, id(self._attends): {}}
        for weight in self.parameters():
            if weight.dim() > 1:
                shared[id(weight)] = nn.Parameter(weight.to(self.compute_dtype), requires_grad=False)
        return copy.deepcopy(self, shared)


def previous_ids(ids: Tensor, positions: Tensor, visible: Tensor, key_positions: Tensor, key_ids: Tensor) -> Tensor:
    """The id one position before each token, among the keys it sees; -1 where there is none. Shapes as in `Decoder.branches`;
    key_ids int64 (B, S + T)."""
    before = visible & (key_positions[:, None] == positions[:, :, None] - 1)  # (B, T, S + T)
    found, place = before.max(dim=-1)
    return torch.where(found, key_ids.gather(1, place), torch.full_like(ids, -1))
