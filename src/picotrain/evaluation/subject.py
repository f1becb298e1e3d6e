"""What can be evaluated, one interface for both: a checkpoint of a run, and a Hugging Face folder (`picotrain.evaluation.hf`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from picotrain.evaluation.documents import Reader
from picotrain.evaluation.scorer import Scorer, scorer_of
from picotrain.model import LanguageModel
from picotrain.tokenizer import Tokenizer


class Subject(Reader, Protocol):
    """A model with its tokenizer, ready to be measured. seq_len: the longest sequence it takes, None: any."""

    name: str
    seq_len: int | None
    scorer: Scorer


class RunModel:
    """A run's model and tokenizer, by the name it has in results."""

    def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer):
        self.name, self._model, self._tokenizer = name, model, tokenizer
        self.bos_id = tokenizer.bos_id
        self.seq_len: int | None = model.seq_len
        self.scorer: Scorer = scorer_of(model, tokenizer)
        self.batch_tokens = self.scorer.batch_tokens

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, without `<|bos|>`."""
        return self.scorer.encode(texts)

    @torch.inference_mode()
    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (B, T), 0 where it is -1."""
        device = self._model.device
        return self._model(ids.to(device), targets.to(device), reduction="none").cpu()
