"""model.kind=module: a module of the user's own, handed to `picotrain.train(config, model=...)`. What the plan knows of it was counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from picotrain.contracts import Model
from picotrain.errors import RunError
from picotrain.section import NonNegativeInt, Size, Text
from picotrain.shape import Dims, Kept, Parameters

if TYPE_CHECKING:
    import torch

    from picotrain.model import LanguageModel


class ModuleConfig(Model):
    """Counts of a module, by parameter group. They stand in config.yaml, so that a resume with another module is refused."""

    kind: Literal["module"] = "module"
    depth: Literal[1] = 1  # type: ignore[assignment]  its layers are not known
    name: Text  # of its class
    width: Size  # of its hidden states, about: learning rates are scaled by it
    embedding: NonNegativeInt = 0  # parameters
    matrices: NonNegativeInt = 0
    head: NonNegativeInt = 0
    scalars: NonNegativeInt = 0

    @property
    def label(self) -> str:
        return self.name

    def dims(self) -> Dims:
        return Dims(1, self.width, 1, 1, self.width, 4 * self.width)

    def parameters(self, vocab_size: int) -> Parameters:
        return Parameters(self.embedding, self.matrices, self.head, scalars=self.scalars)

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Of its matrices alone: what it computes beside them is not known."""
        return 6 * self.parameters(vocab_size).scaling

    def kept(self) -> Kept:
        """Not known: the predicted memory lacks the activations."""
        return Kept(norms=0, values=0, keys_values=0, matmuls=0, widest=0)

    def build(self, vocab_size: int, seq_len: int, dtype: torch.dtype) -> LanguageModel:
        raise RunError(
            f"this run trains {self.name}, a module that was given from Python, and no command can build it; "
            "in Python: picotrain.train(config, model=...), picotrain.load(run, model=...)"
        )
