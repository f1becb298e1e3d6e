"""model.kind=llama: the architecture of Llama and, with qk_norm, of Qwen3, from one dial, its depth. The section; no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool

from picotrain.contracts import Model
from picotrain.errors import Problem
from picotrain.section import Number, PositiveFloat, Size
from picotrain.shape import Dims, Kept, Parameters, default_width, head_problems, pad_vocab, windows

if TYPE_CHECKING:
    import torch

    from picotrain.models.llama.module import Llama

TIMED = ("width", "mlp_width", "n_kv_heads", "qk_norm", "tie_embeddings")  # keys that decide the time of a step, beside depth and head_dim


class LlamaConfig(Model):
    """A Llama from one dial, its depth."""

    kind: Literal["llama"] = "llama"
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2), Number]  # rotary embeddings turn pairs of features
    width: Size | None = None  # null: 64 x depth, rounded up to a multiple of head_dim
    mlp_width: Size | None = None  # null: 8/3 x width, rounded up to a multiple of 64, or of 256 from width 1,024 on
    n_kv_heads: Size | None = None  # null: as many as query heads (no grouped-query attention)
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "L"  # repeated over layers; S = half of seq_len; last layer L
    norm_eps: PositiveFloat = 1e-5
    rope_theta: Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False), Number] = 10_000.0
    qk_norm: StrictBool = False  # norms with weights on each head's queries and keys, before they are rotated (Qwen3)
    tie_embeddings: StrictBool = False  # the head is the embedding's table

    def _problems(self) -> list[Problem]:
        return head_problems(self.dims(), self.n_kv_heads)

    @property
    def features(self) -> tuple[str, ...]:
        return (self.kind, *(["qk_norm"] if self.qk_norm else []))

    @property
    def bench_keys(self) -> tuple[str, ...]:
        changed = [key for key in TIMED if getattr(self, key) != type(self).model_fields[key].default]
        return (f"model.kind={self.kind}", *(f"model.{key}={str(getattr(self, key)).lower()}" for key in changed))

    def dims(self) -> Dims:
        """The MLP has three matrices: at 8/3 of the width it holds as much as one of two matrices at four times the width."""
        width = self.width or default_width(self.depth, self.head_dim)
        n_heads = width // self.head_dim
        multiple = 256 if width >= 1024 else 64
        mlp_width = self.mlp_width or math.ceil(8 * width / (3 * multiple)) * multiple
        return Dims(self.depth, width, n_heads, self.n_kv_heads or n_heads, self.head_dim, mlp_width)

    def parameters(self, vocab_size: int) -> Parameters:
        d, table = self.dims(), pad_vocab(vocab_size) * self.dims().width
        attention = d.width * d.head_dim * (2 * d.n_heads + 2 * d.n_kv_heads)
        return Parameters(
            embedding=0 if self.tie_embeddings else table,
            matrices=d.depth * (attention + 3 * d.width * d.mlp_width),
            head=table,
            scalars=d.depth * (2 * d.width + 2 * d.head_dim * self.qk_norm) + d.width,
        )

    def windows(self, seq_len: int) -> tuple[int, ...]:
        return windows(self.window_pattern, self.depth, seq_len)

    def kept(self) -> Kept:
        """A layer keeps: what enters its norms, and what leaves them before and after their weights; queries, keys and values, the
        attention's result; the gate, the same after silu, the other half and their product. Outside: what enters the last norm, and
        what leaves it before its weights."""
        d = self.dims()
        c, a, k, f = d.width, d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim, d.mlp_width
        normed = (a + k) * self.qk_norm
        return Kept(
            norms=2 * c + normed,
            values=4 * c + normed + 2 * a + 4 * f,
            keys_values=2 * k,
            matmuls=c + a + 2 * k + 2 * f,
            widest=2 * f,  # three at the gate, where one of the values above is gone
            model_norms=c,
            model_values=c,
        )

    def build(self, vocab_size: int, seq_len: int, dtype: torch.dtype) -> Llama:
        from picotrain.models.llama.module import Llama

        return Llama(self, vocab_size, seq_len, dtype)
