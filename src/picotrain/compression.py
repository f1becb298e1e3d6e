"""How well a tokenizer compresses: bytes per token on validation text, languages, scripts and code, beside known
vocabularies; and whether every text comes back as it was. Nothing is ever downloaded for it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from picotrain.tokenizer import Tokenizer

CODE = ("python", "c", "javascript", "json", "html")
LANGUAGES = ("english", "german", "french", "russian", "greek", "arabic", "hindi", "chinese", "japanese", "korean")
OTHER = ("symbols", "numbers")
WARM_UP_TEXTS = 8  # encoded before the clock runs: the first call of an encoder builds its tables

# The files of tiktoken's vocabularies and their SHA-256, as tiktoken itself states them (tiktoken_ext/openai_public.py).
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_O200K = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
VOCABULARIES = {
    "gpt2": {
        f"{_GPT2}vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        f"{_GPT2}encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "o200k_base": {_O200K: "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"},
}

Count = Callable[[str], int]  # the tokens of a text


@dataclass(frozen=True)
class Measured:
    """One kind of text: its UTF-8 bytes, and its tokens without `<|bos|>`, ours and by each vocabulary that is here."""

    bytes: int
    tokens: int
    others: dict[str, int]

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)

    def bytes_per_token_of(self, other: str) -> float | None:
        """None where that vocabulary is not here."""
        return self.bytes / max(1, self.others[other]) if other in self.others else None


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a tokenizer. `texts`: by name, "validation" first. `used`: the share of the vocabulary, special
    tokens left out, that occurs in the validation text. `failures`: the texts that did not come back as they were."""

    texts: dict[str, Measured]
    encode_mb_per_s: float
    used: float
    failures: list[str]


def shipped_texts() -> dict[str, str]:
    """The package's own short texts by name: code, languages, symbols and numbers."""
    folder = files("picotrain") / "texts"
    return {name: (folder / f"{name}.txt").read_text("utf-8") for name in (*CODE, *LANGUAGES, *OTHER)}


def evaluate(tokenizer: Tokenizer, validation: Sequence[str], others: dict[str, Count]) -> Evaluation:
    """Measure `tokenizer` on these validation documents and the shipped texts; `others` count the tokens of other vocabularies."""
    measured, failures = {}, []
    tokenizer.encode_flat(validation[:WARM_UP_TEXTS])
    started = time.perf_counter()
    ids, offsets = tokenizer.encode_flat(validation)
    seconds = time.perf_counter() - started

    size = 0
    for index, text in enumerate(validation):
        raw = text.encode()
        size += len(raw)
        if tokenizer.decode_bytes(ids[offsets[index] : offsets[index + 1]].tolist()) != raw:
            failures.append(f"validation document {index}")
    measured["validation"] = Measured(size, len(ids), {name: sum(map(count, validation)) for name, count in others.items()})
    for name, text in shipped_texts().items():
        raw, tokens = text.encode(), tokenizer.encode(text)
        if tokenizer.decode_bytes(tokens) != raw:
            failures.append(name)
        measured[name] = Measured(len(raw), len(tokens), {other: count(text) for other, count in others.items()})
    plain = np.count_nonzero(tokenizer.token_bytes())
    return Evaluation(measured, size / 1e6 / max(seconds, 1e-9), len(np.unique(ids)) / max(1, plain), failures)


def known_vocabularies() -> dict[str, Count]:
    """GPT-2's and o200k's, as far as `tiktoken` is installed and has their files, unharmed, in its cache folder."""
    try:
        import tiktoken
    except ImportError:
        return {}
    folder = _tiktoken_cache()
    found: dict[str, Count] = {}
    for name, parts in VOCABULARIES.items():
        # tiktoken would fetch a file that is missing or has another hash: it is asked only when it will not.
        if folder is not None and all(_is_there(folder, url, sha256) for url, sha256 in parts.items()):
            encoding = tiktoken.get_encoding(name)
            found[name] = lambda text, encoding=encoding: len(encoding.encode_ordinary(text))
    return found


def _tiktoken_cache() -> Path | None:
    """Where tiktoken keeps its files (tiktoken/load.py: read_file_cached); None where it is told to keep none."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _is_there(folder: Path, url: str, sha256: str) -> bool:
    try:
        data = (folder / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == sha256
