"""What a training step keeps in memory beside weights and optimizer state, counted in bytes from the model's dimensions.

The counts are of the tensors that autograd saves, each storage once; a test lists them and holds the counts against the list.

Letters: N tokens of a micro-batch, C width, A and K the widths of queries and of keys, F that of the MLP, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from picotrain import hardware, shape
from picotrain.config.schema import Config

ATTENTION_BLOCK = 128  # queries of a block where attention is made of plain matmuls (picotrain.model.blocked.BLOCK; a test compares)
LOGIT_CHUNK_BYTES = {"cpu": 32 * 2**20}  # of fp32 logits (picotrain.model.loss; a test compares)
LOGIT_CHUNK_BYTES_DEFAULT = 2**30
CAP_WITHOUT_MAXIMUM = 60.0  # picotrain.model.loss.BOUNDED
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Step:
    """The sizes that a config gives a micro-batch of `rows` rows."""

    config: Config
    dims: shape.Dims
    params: shape.Parameters
    rows: int

    @property
    def seq_len(self) -> int:
        return self.config.train.seq_len or shape.default_seq_len(self.dims.depth)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def value(self) -> int:
        """Bytes of a value in the compute dtype."""
        return FP32 if self.config.train.precision == "fp32" else BF16

    @property
    def norm_value(self) -> int:
        """Bytes of a value that enters a norm outside of compiled code: on a CPU the norm is made of operators, which work in fp32."""
        return FP32 if self.config.hardware.device == "cpu" else self.value

    @property
    def compiled(self) -> bool:
        return self.config.hardware.compile is True

    @property
    def vocab(self) -> int:
        return shape.pad_vocab(self.config.tokenizer.vocab_size)

    # ------------------------------------------------------------ layers

    def blocked(self, window: int) -> bool:
        """Whether attention over a window is made of plain matmuls, which keep their probabilities."""
        hw = self.config.hardware
        full = window >= self.seq_len
        asked = hw.attention if full else hw.window_attention
        if asked != "auto" or hw.device in hardware.TRIED_ON:
            return asked == "blocked"
        kernels = hardware.attention_kernels(hw.device) if full else hardware.window_kernels(hw.device)
        return hardware.untried_kernel(hw.device, kernels, window) == "blocked"

    def probabilities(self, window: int) -> int:
        """Those that a layer keeps for the backward."""
        if not self.blocked(window):
            return 0
        ends = [min(first + ATTENTION_BLOCK, self.seq_len) for first in range(0, self.seq_len, ATTENTION_BLOCK)]
        starts = range(0, self.seq_len, ATTENTION_BLOCK)
        seen = sum((end - first) * (end - max(0, first - window + 1)) for first, end in zip(starts, ends, strict=True))
        return self.rows * self.dims.n_heads * seen * self.value

    def layer_without_recompute(self, window: int) -> int:
        """A layer keeps: what enters its two norms and those of queries and keys, what leaves the first two, queries, keys and values,
        the attention's result, and the MLP's hidden values before and after the square."""
        c, a, k, f = _widths(self.dims)
        seen = a if self.blocked(window) else k  # keys and values are repeated for all heads there
        norm_value = self.value if self.compiled else self.norm_value
        own = (2 * c + a + k) * norm_value + (2 * c + 2 * a + 2 * seen + 2 * f) * self.value
        if self.config.model.residual_scalars:
            own += c * self.value
        return self.tokens * own + self.probabilities(window)

    def layer(self, window: int) -> int:
        """What a layer keeps for the backward."""
        c, a, k, f = _widths(self.dims)
        if (mode := self.config.hardware.recompute) == "none":
            return self.layer_without_recompute(window)
        if mode == "full":
            return self.tokens * c * self.value
        attention = 0 if self.blocked(window) else a
        last = 0 if self.compiled else c  # the compiler leaves out the result of the last matmul, which nothing looks at
        return self.tokens * (2 * c + a + 2 * k + attention + f + last) * self.value

    def layers(self) -> int:
        """What all layers keep from the forward to the backward."""
        model, (c, _, k, _) = self.config.model, _widths(self.dims)
        windows = shape.windows(model, self.seq_len)
        found = sum(self.layer(window) for window in windows)
        found += len(shape.value_embedding_layers(model)) * self.tokens * (k + shape.gate_channels(c)) * self.value
        found += 2 * self.tokens * c * self.norm_value  # what enters the first norm and the last
        found += self.tokens * c * self.value * (model.smear + model.residual_scalars)
        casts = self.config.train.precision == "bf16" and self.config.hardware.recompute == "none"
        return found + (BF16 * self.params.matrices if casts else 0)

    def recomputed_layer(self) -> int:
        """What the layer whose backward runs has computed again."""
        if self.config.hardware.recompute == "none":
            return 0
        most = max(self.layer_without_recompute(window) - self.layer(window) for window in shape.windows(self.config.model, self.seq_len))
        casts = BF16 * self.params.matrices // self.dims.depth if self.config.train.precision == "bf16" else 0
        return most + casts

    def backward(self) -> int:
        """Gradients of activations at the widest place of a layer: two of the MLP's hidden values, one more where it was recomputed."""
        return (2 if self.config.hardware.recompute == "none" else 3) * self.tokens * self.dims.mlp_width * self.value

    # ------------------------------------------------------------ loss

    def head_gradients(self) -> int:
        """Gradients of the hidden states and of the head, which are formed in the forward."""
        return self.tokens * self.dims.width * self.value + FP32 * self.params.head

    def logits(self) -> int:
        """All that is alive of a chunk of logits when most is, with the slopes of the chunk before and the head in the compute dtype."""
        chunk = LOGIT_CHUNK_BYTES.get(self.config.hardware.device, LOGIT_CHUNK_BYTES_DEFAULT)
        rows = max(1, chunk // (FP32 * self.vocab))
        cap, value = self.config.model.logit_softcap, self.value
        cast = 0 if value == FP32 else FP32  # the logits in fp32, where they are not already
        if self.compiled:
            alive = value + FP32 + value  # logits, their exponentials, slopes
        elif cap is None:
            alive = value + cast + FP32
        elif cap <= CAP_WITHOUT_MAXIMUM:
            alive = value + cast + 3 * FP32
        else:
            alive = value + 4 * FP32
        before = value if self.tokens > rows else 0
        casts = 0 if value == FP32 else value * self.params.head
        return min(rows, self.tokens) * self.vocab * (alive + before) + casts


def _widths(d: shape.Dims) -> tuple[int, int, int, int]:
    return d.width, d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim, d.mlp_width
