"""The model: a decoder-only GPT as one plain nn.Module.

    ids -> embed -> norm -> [x + attn(norm(x)), x + mlp(norm(x))] per block -> norm -> head -> soft-cap -> logits

With windows off it is, definition by definition, NanoChat of `transformers`: rotary positions and then a norm on queries
and keys, ReLU-squared MLP, RMSNorm without weights (also after the embedding), no biases, an untied head whose logits
are capped by a tanh. The names of its parameters are the names in a checkpoint.

Precision: weights are fp32; `Linear` casts its weight, and `GPT` the embedding's output, to `compute_dtype`. Logits and
loss are fp32. There is no autocast. Shapes: B rows, T tokens, C width, H heads, D head_dim, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain import shape
from picotrain.config.schema import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the names of train.precision

# The loss holds fp32 logits of this many bytes at a time: on a CPU about what its cache holds, on an accelerator
# enough to fill it.
LOGIT_CHUNK_BYTES = {"cpu": 32 * 2**20}
LOGIT_CHUNK_BYTES_DEFAULT = 2**30


class Linear(nn.Linear):
    """y = x W^T in the dtype of x, whatever the dtype of W; not initialised (see `GPT.init_weights`)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467), without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary_angles(seq_len: int, head_dim: int, theta: float) -> Tensor:
    """The angle by which pair i of a head is turned at each position: position x theta^(-2i / D). (seq_len, 1, D / 2), fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): turn each pair (x_i, x_{i + D/2}) clockwise by its angle, as NanoChat does.

    x (B, T, H, D), cos and sin (T, 1, D / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def take(x: Tensor, wanted: Tensor) -> Tensor:
    """The positions `wanted` (B, W) of x (B, T, C): (B, W, C)."""
    return x.gather(1, wanted[..., None].expand(-1, -1, x.size(-1)))


def attention_mask(start: int, tokens: int, window: int, device: torch.device) -> Tensor | None:
    """Which keys 0 .. start + tokens - 1 each query start .. start + tokens - 1 sees: itself and the `window - 1` before it.

    Boolean (tokens, start + tokens), true where it sees; None where the kernel's own causality says the same.
    """
    end = start + tokens
    if end <= window and (start == 0 or tokens == 1):
        return None
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads than query heads it is grouped-query (arXiv:2305.13245)."""

    def __init__(self, dims: shape.Dims, eps: float):
        super().__init__()
        self.head_dim, self.eps = dims.head_dim, eps
        self.grouped = dims.n_kv_heads < dims.n_heads
        self.q = Linear(dims.width, dims.n_heads * dims.head_dim)
        self.k = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.v = Linear(dims.width, dims.n_kv_heads * dims.head_dim)
        self.o = Linear(dims.n_heads * dims.head_dim, dims.width)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        if wanted is None:
            q = rotate(self.q(x).view(heads), cos, sin)
        else:
            q = rotate(self.q(take(x, wanted)).view(*wanted.shape, -1, self.head_dim), cos[wanted], sin[wanted])
        q = rms_norm(q, self.eps).transpose(1, 2)  # (B, H, T, D), or W for T
        k = rms_norm(rotate(self.k(x).view(heads), cos, sin), self.eps).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, start + T, D)
        causal = mask is None and x.size(1) > 1  # a single query sees every key
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)


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

    def __init__(self, dims: shape.Dims, eps: float):
        super().__init__()
        self.eps = eps
        self.attn = Attention(dims, eps)
        self.mlp = MLP(dims)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        y = self.attn(rms_norm(x, self.eps), cos, sin, mask, cache, wanted)
        x = (x if wanted is None else take(x, wanted)) + y  # (B, T, C), or W for T
        return x + self.mlp(rms_norm(x, self.eps))


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap x tanh(logits / cap) (Gemma 2, arXiv:2408.00118)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


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


class LayerCache:
    """Keys and values (B, H_kv, max_len, D) of one layer; the first `length` positions are filled."""

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.empty(size, dtype=dtype, device=device)
        self.v = torch.empty(size, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in k and v (B, H_kv, T, D); return all keys and values so far."""
        start, end = self.length, self.length + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """The keys and values of `batch` rows of up to `max_len` tokens (at most the model's seq_len), so that each is computed once.

    `more`: room for so many further tokens, of `GPT.branches`, whose positions are not their places in the cache.
    """

    def __init__(self, model: GPT, batch: int, max_len: int, more: int = 0):
        if max_len > model.seq_len:
            raise ValueError(f"a cache of {max_len} tokens for a model of {model.seq_len}")
        self.max_len = max_len + more
        size = (batch, model.dims.n_kv_heads, self.max_len, model.dims.head_dim)
        self.layers = [LayerCache(size, model.compute_dtype, model.embed.weight.device) for _ in model.blocks]

    @property
    def length(self) -> int:
        """How many tokens are in."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        for layer in self.layers:
            layer.length = 0


class GPT(nn.Module):
    """The model of a config, for `vocab_size` ids and rows of up to `seq_len` tokens.

    Its weights hold nothing meaningful until `init_weights` or a checkpoint has filled them. For inference only,
    `model.to(model.compute_dtype)` gives the same numbers without casting weights at every call.
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
        self.blocks = nn.ModuleList(Block(dims, model.norm_eps) for _ in range(dims.depth))
        self.head = Linear(dims.width, rows)
        angles = rotary_angles(seq_len, dims.head_dim, model.rope_theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._derive = losses_and_slopes
        self._compiled = False

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, on the CPU, so that a seed gives the same ones on every device (as nanochat does).

        Embedding: normal, std 1. Head: normal, std 0.001 (the first loss is ln(vocab_size)). q, k, v and up: uniform
        with std 1 / sqrt(width). o and down: zero (every block starts as the identity).
        """
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / self.dims.width)
        for name, parameter in self.named_parameters():
            weight = torch.zeros(parameter.shape)
            if name == "embed.weight":
                weight.normal_(0, 1, generator=generator)
            elif name == "head.weight":
                weight.normal_(0, 0.001, generator=generator)
            elif not name.endswith(("attn.o.weight", "mlp.down.weight")):
                weight.uniform_(-bound, bound, generator=generator)
            parameter.copy_(weight)

    def num_parameters(self) -> int:
        """All weights, padding of the vocabulary included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_blocks(self) -> None:
        """Compile the blocks and the loss in place: one code for all layers, and no name changes.

        Shapes are static: a batch of another shape compiles once more. Calls with a cache stay uncompiled, because
        there every token has another shape.
        """
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
        chunk_bytes = LOGIT_CHUNK_BYTES.get(hidden.device.type, LOGIT_CHUNK_BYTES_DEFAULT)
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
        masks = {window: attention_mask(start, ids.size(1), window, ids.device) for window in set(self.windows)}
        return self._run(ids, self.cos[start:end], self.sin[start:end], masks, cache, wanted)

    def branches(self, ids: Tensor, positions: Tensor, visible: Tensor, key_positions: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, T, C) of tokens that go on from the S tokens in `cache` along several branches at once.

        ids, positions: int64 (B, T); visible: bool (B, T, S + T), the cached and new tokens that each sees (itself
        among them); key_positions: int64 (B, S + T). Positions are those of the rotary embedding, below seq_len.
        """
        distance = positions[:, :, None] - key_positions[:, None]  # (B, T, S + T)
        masks = {w: (visible if w >= self.seq_len else visible & (distance < w))[:, None] for w in set(self.windows)}
        return self._run(ids, self.cos[positions], self.sin[positions], masks, cache, None)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> fp32 logits (..., vocab_size): those of the padding are cut off."""
        return softcap(self.head(hidden).float(), self.logit_softcap)[..., : self.vocab_size]

    def _run(
        self, ids: Tensor, cos: Tensor, sin: Tensor, masks: Mapping[int, Tensor | None], cache: KVCache | None, wanted: Tensor | None
    ) -> Tensor:
        """The blocks: ids (B, T) -> (B, T, C). cos and sin (T, 1, D / 2) or (B, T, 1, D / 2); masks by attention window."""
        x = rms_norm(self.embed(ids).to(self.compute_dtype), self.eps)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        layer_caches = [None] * len(self.blocks) if cache is None else cache.layers
        eager = self._compiled and (cache is not None or wanted is not None)
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            *first, last = zip(self.blocks, self.windows, layer_caches, strict=True)
            for block, window, layer_cache in first:
                x = block(x, cos, sin, masks[window], layer_cache)
            block, window, layer_cache = last
            if wanted is None:
                x = block(x, cos, sin, masks[window], layer_cache)
            else:
                seen = torch.arange(ids.size(1), device=ids.device) <= wanted[..., None]  # (B, W, T)
                x = block(x, cos, sin, seen[:, None], layer_cache, wanted)
        return rms_norm(x, self.eps)

    def _loss_of_chunk(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._derive(logits, targets, self.logit_softcap, self.vocab_size)
