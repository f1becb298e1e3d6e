"""A model as it is trained."""

from __future__ import annotations

import torch

from picotrain.config.schema import Recompute
from picotrain.contracts import Model
from picotrain.model.decoder import Decoder, LanguageModel
from picotrain.model.float8 import train_in_float8
from picotrain.model.recompute import recompute as recompute_blocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(precision: str) -> torch.dtype:
    """What a model computes in under a `train.precision`; under fp8, all but the blocks' matmuls while training."""
    return DTYPES["bf16" if precision == "fp8" else precision]


def build(
    model: Model, vocab_size: int, seq_len: int, precision: str, recompute: Recompute = "none", own: LanguageModel | None = None
) -> LanguageModel:
    """The model of a config for training in `precision`, not initialised; parameters and their names are those of `model.build`.
    own: a caller's, made ready instead of it."""
    built = own if own is not None else model.build(vocab_size, seq_len, compute_dtype(precision))
    if isinstance(built, Decoder):
        if precision == "fp8":
            train_in_float8(built.blocks)
        recompute_blocks(built.blocks, recompute)
    return built
