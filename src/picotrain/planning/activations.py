"""What a training step keeps in memory beside weights and optimizer state, counted in bytes from the model's dimensions.

The counts are of the tensors that autograd saves, each storage once. A test lists these tensors and compares.

An architecture counts what its layers keep (`kept`). What the loss keeps is the same for all.
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
    def kept(self) -> shape.Kept:
        return self.config.model.kept()

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
        """A layer keeps what its architecture says. Keys and values are repeated for all heads where attention is blocked."""
        repeats = self.dims.n_heads // self.dims.n_kv_heads if self.blocked(window) else 1
        norm_value = self.value if self.compiled else self.norm_value
        own = self.kept.norms * norm_value + (self.kept.values + repeats * self.kept.keys_values) * self.value
        return self.tokens * own + self.probabilities(window)

    def layer(self, window: int) -> int:
        """What a layer keeps for the backward."""
        c, attention = self.dims.width, self.dims.n_heads * self.dims.head_dim
        if (mode := self.config.hardware.recompute) == "none":
            return self.layer_without_recompute(window)
        if mode == "full":
            return self.tokens * c * self.value
        last = 0 if self.compiled else c  # the compiler leaves out the result of the last matmul, which nothing looks at
        return self.tokens * (c + self.kept.matmuls + (0 if self.blocked(window) else attention) + last) * self.value

    def layers(self) -> int:
        """What all layers keep from the forward to the backward, and what is kept around them."""
        found = sum(self.layer(window) for window in self.config.model.windows(self.seq_len))
        found += self.tokens * (self.kept.model_norms * self.norm_value + self.kept.model_values * self.value)
        casts = self.config.train.precision == "bf16" and self.config.hardware.recompute == "none"
        return found + (BF16 * self.params.matrices if casts else 0)

    def recomputed_layer(self) -> int:
        """What the layer whose backward runs has computed again."""
        if self.config.hardware.recompute == "none":
            return 0
        most = max(self.layer_without_recompute(window) - self.layer(window) for window in self.config.model.windows(self.seq_len))
        casts = BF16 * self.params.matrices // self.dims.depth if self.config.train.precision == "bf16" else 0
        return most + casts

    def backward(self) -> int:
        """Gradients of activations at the widest place of a layer. Activation checkpointing adds one of the MLP's hidden values."""
        recomputed = 0 if self.config.hardware.recompute == "none" else self.dims.mlp_width
        return self.tokens * (self.kept.widest + recomputed) * self.value

    # ------------------------------------------------------------ loss

    def head_gradients(self) -> int:
        """Gradients of the hidden states and of the head, which are formed in the forward."""
        return self.tokens * self.dims.width * self.value + FP32 * self.params.head

    def logits(self) -> int:
        """The peak of a chunk of logits, with the slopes of the chunk before and the head in the compute dtype."""
        chunk = LOGIT_CHUNK_BYTES.get(self.config.hardware.device, LOGIT_CHUNK_BYTES_DEFAULT)
        rows = max(1, chunk // (FP32 * self.vocab))
        cap, value = self.config.model.logit_cap, self.value
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
