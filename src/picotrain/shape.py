"""Dimensions, parameters, FLOPs, and the rules that scale batch and learning rates. Plain arithmetic, no torch.

The reference point of the scaling rules is depth 12 (width 768, vocabulary 32,768) at a data:parameter
ratio of 12 and a batch of 2^19 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from picotrain.errors import Problem

REFERENCE_WIDTH = 768
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_PARAMS = 12 * 12 * 768**2 + 32_768 * 768  # matrices and head at depth 12
DEFAULT_RATIO = 12.0  # training tokens per matrix or head parameter
MOST_SHRINK = 0.1  # of a matrix by one step's decay; one that shrinks faster forgets what it learned within ten steps


@dataclass(frozen=True)
class Dims:
    """The dimensions of a model."""

    depth: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_width: int


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part. The data:parameter ratio counts `scaling`: matrices and head. A table that is embedding and head at once
    counts as the head."""

    embedding: int
    matrices: int
    head: int
    value_embeds: int = 0
    scalars: int = 0  # vectors: residual scalars, smear, norms with weights

    @property
    def total(self) -> int:
        return self.embedding + self.matrices + self.head + self.value_embeds + self.scalars

    @property
    def scaling(self) -> int:
        return self.matrices + self.head


@dataclass(frozen=True)
class Kept:
    """What a model keeps of a token from the forward to the backward, in values. A tensor that two operators keep counts once."""

    norms: int  # of a layer: what enters norms, which work in fp32 where they are made of operators
    values: int  # of a layer: all else, in the compute dtype
    keys_values: int  # of a layer: keys and values, by the heads that there are
    matmuls: int  # of a layer: results of matmuls with weights, but for the last one, which nothing keeps
    widest: int  # of a layer: gradients that are alive together where most are, in its backward
    model_norms: int = 0  # outside of the layers
    model_values: int = 0


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by parameter group, and the decay of the matrices. `scalar_lr` is for residual scalars and smear."""

    matrix_lr: float
    embed_lr: float
    head_lr: float
    weight_decay: float
    scalar_lr: float = 0.0


def default_width(depth: int, head_dim: int) -> int:
    """64 x depth, rounded up to a whole number of heads."""
    return math.ceil(64 * depth / head_dim) * head_dim


def windows(pattern: str, depth: int, seq_len: int) -> tuple[int, ...]:
    """Each layer's attention window by a pattern that repeats: L sees the whole row, S half of it; the last layer is always L."""
    sizes = [seq_len if pattern[i % len(pattern)] == "L" else seq_len // 2 for i in range(depth)]
    return (*sizes[:-1], seq_len)


def head_problems(d: Dims, n_kv_heads: int | None) -> list[Problem]:
    """What is wrong with a width that is no whole number of heads, or with key-value heads that do not divide the query heads."""
    if d.width % d.head_dim:
        below = d.width // d.head_dim * d.head_dim
        nearest = f"{below} or {below + d.head_dim}" if below else str(d.head_dim)
        return [Problem("model.width", f"must be a multiple of model.head_dim={d.head_dim}, not {d.width}", f"nearest: {nearest}")]
    if n_kv_heads and d.n_heads % n_kv_heads:
        rule = f"must divide the {d.n_heads} heads (width {d.width} / head_dim {d.head_dim}), and {n_kv_heads} does not"
        valid = ", ".join(str(n) for n in range(1, d.n_heads + 1) if d.n_heads % n == 0)
        return [Problem("model.n_kv_heads", rule, f"valid: {valid}")]
    return []


def default_seq_len(depth: int) -> int:
    """Tokens per row when the config leaves it open: 512 for models that train on a laptop, else 2,048."""
    return 512 if depth < 12 else 2048


def pad_vocab(vocab_size: int) -> int:
    """Rows of the embedding and the head: the vocabulary rounded up to 64, which matmul kernels prefer."""
    return math.ceil(vocab_size / 64) * 64


def flops_per_token(d: Dims, params: Parameters, layer_windows: tuple[int, ...], seq_len: int) -> int:
    """Training FLOPs per token, forward and backward.

    6 per matmul parameter (2 forward, 4 backward; the embedding is a look-up) plus 12 x heads x head_dim x
    min(window, seq_len) per layer for QK^T and AV, not halved for causality (PaLM, arXiv:2204.02311, appendix B).
    """
    attention = sum(12 * d.n_heads * d.head_dim * min(w, seq_len) for w in layer_windows)
    return 6 * params.scaling + attention


def derive_batch_tokens(params: Parameters, seq_len: int) -> int:
    """Tokens per step from the model's size: 2^19 x (D / D_ref)^0.383, rounded to a power of two, at least one row.

    The exponent is from "Power Lines" (arXiv:2505.13738), where the optimal batch grows with the training tokens D.
    D is taken at the default data:parameter ratio whatever the horizon, so that runs of different length of
    one model share their batch. Not studied here: models below depth 8.
    """
    ideal = REFERENCE_BATCH_TOKENS * (params.scaling / REFERENCE_PARAMS) ** 0.383
    return max(2 ** round(math.log2(ideal)), seq_len)


def scale_rates(base: Rates, width: int, batch_tokens: int, total_tokens: int, orthogonal: bool = False) -> Rates:
    """Learning rates given at the reference point, moved to this width, batch and horizon.

    * Every rate grows with sqrt(batch / 2^19): the square-root rule for Adam (arXiv:2205.10287).
    * Matrices fall with 1 / width, as in the maximal update parametrization (arXiv:2203.03466, table 8); embedding
      and head fall with 1 / sqrt(width), nanochat's empirical rule.
    * The rate of orthogonal updates (Muon's) of matrices stays as it is. These updates have the same spectral norm at every width, and
      that parametrization wants just this (arXiv:2310.17813). nanochat assumes the square-root rule for the batch. Here the rate of
      2^19 tokens was also the best of five at 2^12 (docs/log.md, 2026-11-23).
    * Weights are a moving average of their updates over some share of the training. Decay keeps that share: lr x decay x steps is the
      same at every width, batch and horizon (arXiv:2405.13698, where decay grows with the width as the rate falls with it). A
      matrix shrinks by at most MOST_SHRINK a step, so short runs have less decay.
    """
    batch_scale = math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)
    width_scale = REFERENCE_WIDTH / width
    matrix_scale = 1.0 if orthogonal else batch_scale * width_scale
    matrix_lr = base.matrix_lr * matrix_scale
    steps_ratio = (DEFAULT_RATIO * REFERENCE_PARAMS / REFERENCE_BATCH_TOKENS) / (total_tokens / batch_tokens)
    weight_decay = min(base.weight_decay * steps_ratio / matrix_scale, MOST_SHRINK / matrix_lr)
    return Rates(
        matrix_lr=matrix_lr,
        embed_lr=base.embed_lr * batch_scale * math.sqrt(width_scale),
        head_lr=base.head_lr * batch_scale * math.sqrt(width_scale),
        scalar_lr=base.scalar_lr * batch_scale,
        weight_decay=weight_decay,
    )
