"""A module of the user's own as a `LanguageModel`: ids in, logits out is all that it has to offer."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain.model.decoder import LanguageModel


def adapted(module: nn.Module, vocab_size: int, seq_len: int, dtype: torch.dtype) -> LanguageModel:
    """The module itself, in place, with what training wants of a model; a `LanguageModel` as it is. Names of parameters stay.

    The module maps ids (B, T) int64 to logits (B, T, V), V >= vocab_size, and looks at no later token. Its weights are fp32 and are where
    training begins. With a dtype below fp32 it runs under autocast.
    """
    if not isinstance(module, LanguageModel):
        module.__class__ = _adapted(type(module))
    assert isinstance(module, LanguageModel)
    module.vocab_size, module.seq_len, module.compute_dtype = vocab_size, seq_len, dtype
    return module


@cache
def _adapted(kind: Any) -> type[LanguageModel]:
    class Adapted(LanguageModel, kind):
        def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: Literal["mean", "none"] = "mean") -> Tensor:
            with torch.autocast(ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
                logits: Tensor = kind.forward(self, ids)
            logits = logits[..., : self.vocab_size].float()  # (B, T, vocab_size)
            if targets is None:
                return logits
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
            return losses.view(targets.shape) if reduction == "none" else losses.sum() / (targets >= 0).sum().clamp(min=1)

        def init_weights(self, seed: int) -> None:
            """Its own weights are where it begins."""

        def group_of(self, name: str, parameter: nn.Parameter) -> str:
            """By what holds the parameter: an embedding, a last layer as wide as the vocabulary, other matrices, and what is no matrix."""
            holder = self.get_submodule(name.rpartition(".")[0])
            if isinstance(holder, nn.Embedding):
                return "embed"
            if parameter.dim() < 2:
                return "scalars"
            return "head" if isinstance(holder, nn.Linear) and holder.out_features >= self.vocab_size else "matrices"

    Adapted.__name__ = Adapted.__qualname__ = kind.__name__
    return Adapted
