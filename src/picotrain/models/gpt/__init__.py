"""model.kind=gpt: NanoChat's GPT from one dial, its depth, with the options of today's fastest recipes. The section; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool

from picotrain.contracts import Model
from picotrain.errors import Problem
from picotrain.section import Number, PositiveFloat, Size
from picotrain.shape import Dims, Kept, Parameters, default_width, head_problems, pad_vocab, windows

if TYPE_CHECKING:
    import torch

    from picotrain.models.gpt.module import GPT

FEATURES = ("value_embeds", "residual_scalars", "smear")


class GPTConfig(Model):
    """A GPT from one dial, its depth."""

    kind: Literal["gpt"] = "gpt"
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2), Number]  # rotary embeddings turn pairs of features
    width: Size | None = None  # null: 64 x depth, rounded up to a multiple of head_dim
    n_kv_heads: Size | None = None  # null: as many as query heads (no grouped-query attention)
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "L"  # repeated over layers; S = half of seq_len; last layer L
    logit_softcap: PositiveFloat | None = 15.0  # null: off
    norm_eps: PositiveFloat = 1e-6
    rope_theta: Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False), Number] = 10_000.0
    # What the fastest recipes add (picotrain.models.gpt.features); the plain model, which export knows, has none of it.
    value_embeds: StrictBool = False  # a table of values by token in every other layer
    residual_scalars: StrictBool = False  # learned factors of residual stream and embedding at each layer
    smear: StrictBool = False  # a gated share of the token before
    qk_scale: PositiveFloat = 1.0  # factor of the attention logits

    def _problems(self) -> list[Problem]:
        return head_problems(self.dims(), self.n_kv_heads)

    @property
    def label(self) -> str:
        return f"d{self.depth}"

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(feature for feature in FEATURES if getattr(self, feature))

    @property
    def bench_keys(self) -> tuple[str, ...]:
        own_width = self.width and self.width != default_width(self.depth, self.head_dim)
        return (*(f"model.{feature}=true" for feature in self.features), *([f"model.width={self.width}"] if own_width else []))

    def dims(self) -> Dims:
        """The MLP is four times as wide as the model."""
        width = self.width or default_width(self.depth, self.head_dim)
        n_heads = width // self.head_dim
        return Dims(self.depth, width, n_heads, self.n_kv_heads or n_heads, self.head_dim, 4 * width)

    def parameters(self, vocab_size: int) -> Parameters:
        """Norms carry no weights and there are no biases."""
        d, rows = self.dims(), pad_vocab(vocab_size)
        attention = d.width * d.head_dim * (2 * d.n_heads + 2 * d.n_kv_heads)
        tables, gate = len(self.value_embedding_layers()), self.gate_channels()
        return Parameters(
            embedding=rows * d.width,
            matrices=d.depth * (attention + 2 * d.width * d.mlp_width) + tables * gate * d.n_kv_heads,
            head=rows * d.width,
            value_embeds=tables * rows * d.n_kv_heads * d.head_dim,
            scalars=2 * d.depth * self.residual_scalars + (gate + 1) * self.smear,
        )

    def windows(self, seq_len: int) -> tuple[int, ...]:
        return windows(self.window_pattern, self.depth, seq_len)

    def gate_channels(self) -> int:
        """How many channels of a hidden state the gates of value embeddings and smear look at: a few are as good as all."""
        return min(32, self.dims().width)

    def value_embedding_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings: every other one, the last among them."""
        return tuple(range((self.depth - 1) % 2, self.depth, 2)) if self.value_embeds else ()

    @property
    def logit_cap(self) -> float | None:
        return self.logit_softcap

    def kept(self) -> Kept:
        """A layer keeps the inputs of its two norms and of the norms of queries and keys. It keeps the outputs of the first two, queries,
        keys and values, the attention's result, and the MLP's hidden values before and after the square.

        Outside of layers the inputs of the first and the last norm are kept. So are the embedding, where a layer or smear looks at it
        again, and value embeddings with their gates."""
        d = self.dims()
        c, a, k, f = d.width, d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim, d.mlp_width
        return Kept(
            norms=2 * c + a + k,
            values=2 * c + 2 * a + 2 * f + c * self.residual_scalars,
            keys_values=2 * k,
            matmuls=c + a + 2 * k + f,
            widest=2 * f,
            model_norms=2 * c,
            model_values=c * (self.smear + self.residual_scalars) + len(self.value_embedding_layers()) * (k + self.gate_channels()),
        )

    def build(self, vocab_size: int, seq_len: int, dtype: torch.dtype) -> GPT:
        from picotrain.models.gpt.module import GPT

        return GPT(self, vocab_size, seq_len, dtype)
