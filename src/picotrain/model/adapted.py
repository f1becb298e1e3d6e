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


@torch.no_grad()
def flaw(module: nn.Module, vocab_size: int, seq_len: int) -> str:
    """What keeps a module from being trained as a language model, in words; "" where it can be. Tried on two rows that differ in their last
    token; the module's buffers and mode stay as they are. What the module itself raises is raised."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return "has no parameter to train"
    ids = torch.arange(seq_len, device=device).remainder(vocab_size).repeat(2, 1)  # (2, T)
    ids[:, -1] = torch.tensor([0, vocab_size - 1], device=device)
    buffers, training = {name: buffer.clone() for name, buffer in module.named_buffers()}, module.training
    try:
        logits: object = module.eval()(ids)
    finally:
        module.train(training)
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    if not isinstance(logits, Tensor):
        return f"returns {type(logits).__name__} and not the logits, a tensor (B, T, V)"
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or logits.size(-1) < vocab_size:
        return f"makes logits {tuple(logits.shape)} of ids {tuple(ids.shape)}, which have to be (B, T, V) with V of at least {vocab_size:,}"
    one, other = logits[:, :-1].float()
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        return "looks at later tokens: with another last token its logits before change, and a loss would mean nothing"
    return ""


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
