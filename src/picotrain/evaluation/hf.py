"""A Hugging Face folder as a model to evaluate: any causal LM that `transformers` loads from local files, safetensors only."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from picotrain.errors import CheckpointError, ConfigError, Problem
from picotrain.evaluation.scorer import PLAIN_BATCH_TOKENS, LogitsScorer, Scorer
from picotrain.text import first_line

LOGITS_AT_ONCE = {"cpu": 1 << 26}  # numbers; it gives them for every position, and they are held two or three times
LOGITS_AT_ONCE_DEFAULT = 1 << 29


def require_transformers(key: str = "--hf") -> None:
    """Raise ConfigError where the package is missing; `key`: what asked for it."""
    if find_spec("transformers") is None:
        raise ConfigError([Problem(key, "the package transformers is not installed", "pip install 'picotrain[hf]'")])


def read_context(path: Path) -> int | None:
    """The longest sequence that the model of a folder takes, None: it does not say. Raises CheckpointError."""
    from transformers import AutoConfig

    try:
        return _context(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be loaded by transformers: {first_line(error)}") from error


def check_folder(path: Path) -> None:
    """Raise ConfigError without `transformers`, CheckpointError unless the folder's config and tokenizer load and it has weights."""
    require_transformers()
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no Hugging Face model: it has no config.json")
    read_context(path)
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded by transformers: {first_line(error)}") from error
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} holds no weights: there is no *.safetensors in it, and no other format is read")


class HuggingFaceModel:
    """A loaded model with its tokenizer: CORE through `scorer`, documents through `encode` and `losses`, text by `complete`.

    `<|bos|>` is the tokenizer's beginning-of-sequence token, else its end-of-sequence token, which GPT-2 trained with.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        """Raises ConfigError without `transformers`, CheckpointError where the folder holds no such model."""
        require_transformers()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no Hugging Face model: it has no config.json")
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, **local)
            model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=dtype, **local)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be loaded by transformers: {first_line(error)}") from error
        self._model = model.to(device).eval()
        self._tokenizer.model_max_length = 10**9  # no warning: whole documents are encoded, and cut here
        bos_id = self._tokenizer.bos_token_id
        bos_id = self._tokenizer.eos_token_id if bos_id is None else bos_id
        if bos_id is None:
            raise CheckpointError(f"{path}: its tokenizer has neither a beginning- nor an end-of-sequence token to lead a text with")
        self.name, self.bos_id = path.name, int(bos_id)
        config = self._model.config
        self.seq_len = _context(config)
        self.vocab_size = len(self._tokenizer)
        numbers = LOGITS_AT_ONCE.get(self._model.device.type, LOGITS_AT_ONCE_DEFAULT)
        self.batch_tokens = max(1, min(PLAIN_BATCH_TOKENS, numbers // max(1, getattr(config, "vocab_size", self.vocab_size))))
        self.scorer: Scorer = LogitsScorer(self._logits, self._encode_one, self.bos_id, self.seq_len, self._model.device, self.batch_tokens)

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return self._model.num_parameters()

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text. Text is data: it yields no special token, whatever characters it holds."""
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
        return [np.asarray(ids, dtype=np.int64) for ids in found["input_ids"]]

    @torch.inference_mode()
    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (B, T), 0 where it is -1."""
        logits = self._logits(ids.to(self._model.device)).float()  # (B, T, V)
        flat = targets.to(logits.device).flatten()
        return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="none").view(targets.shape).cpu()

    def complete(self, prompt: str, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> str:
        """What it writes after `<|bos|>` and the prompt, as `picotrain.sampling` would ask for it; the random state stays as it was.

        Where the context has no room for both, the prompt loses its beginning, and past half of the context fewer tokens come.
        """
        ids = [self.bos_id, *self._encode_one(prompt)]
        if self.seq_len is not None:
            max_tokens = min(max_tokens, max(1, self.seq_len // 2, self.seq_len - len(ids)))
            keep = max(1, self.seq_len - max_tokens)
            ids = ids if len(ids) <= keep else [self.bos_id, *ids[len(ids) - keep + 1 :]]
        drawn: dict[str, Any] = {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0} if temperature > 0 else {}
        prompt_ids = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode(), torch.random.fork_rng(_accelerators(self._model.device)):
            torch.manual_seed(seed)
            row = self._model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=max_tokens,
                do_sample=temperature > 0,
                pad_token_id=self.bos_id,
                **drawn,
            )[0]
        return self._tokenizer.decode(row[len(ids) :], skip_special_tokens=True)

    def _logits(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids, use_cache=False).logits

    def _encode_one(self, text: str) -> list[int]:
        return self.encode([text])[0].tolist()


def _context(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _accelerators(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
