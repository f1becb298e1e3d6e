"""Bits of whole documents, so that models with different tokenizers and context lengths can be compared.

A document is cut into windows of `window` tokens of the model's own. `<|bos|>` leads each window. A token is predicted from that and from
the tokens before it in its window. All of a document's tokens count, and its bytes are the UTF-8 length of its text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picotrain.data.slices import utf8_bytes
from picotrain.evaluation.together import EvaluationFailed, together
from picotrain.parallel import Parallel

READ_AT_ONCE = 256  # documents that are encoded together, and sorted into batches


class Reader(Protocol):
    """A model with its tokenizer, as documents are scored by it. batch_tokens: about how many it takes at once."""

    bos_id: int
    batch_tokens: int

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, without `<|bos|>`."""
        ...

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (B, T), 0 where it is -1; ids and targets int64 (B, T), on the CPU."""
        ...


@dataclass(frozen=True)
class DocumentScores:
    """bits, UTF-8 bytes and tokens of each document, (n,)."""

    bits: NDArray[np.float64]
    bytes: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @property
    def bpb(self) -> float:
        """Bits per byte of all of them."""
        return float(self.bits.sum() / self.bytes.sum())


def score_documents(
    reader: Reader, texts: Sequence[str], window: int, parallel: Parallel, progress: Callable[[int, int], None] = lambda done, total: None
) -> DocumentScores:
    """Score whole documents in windows of `window` tokens; empty ones have no bits. Ranks take every dp_size-th document.

    Raises EvaluationFailed on every rank: for what any rank raised, and for losses that are not finite.
    """
    mine = range(parallel.dp_rank, len(texts), parallel.dp_size)
    shares = together(parallel, lambda: _score(reader, [texts[i] for i in mine], window, progress))
    bits, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    for rank, (found_bits, found_tokens) in enumerate(shares):
        bits[rank :: parallel.dp_size], tokens[rank :: parallel.dp_size] = found_bits, found_tokens
    if not np.isfinite(bits).all():
        raise EvaluationFailed(f"the losses of {int((~np.isfinite(bits)).sum())} of {len(texts)} documents are not finite")
    return DocumentScores(bits, np.array([utf8_bytes(text) for text in texts], dtype=np.int64), tokens)


def _score(reader: Reader, texts: Sequence[str], window: int, progress: Callable[[int, int], None]) -> tuple[list[float], list[int]]:
    bits, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    progress(0, len(texts))
    for first in range(0, len(texts), READ_AT_ONCE):
        encoded = reader.encode(texts[first : first + READ_AT_ONCE])
        pieces = [(first + i, ids[at : at + window]) for i, ids in enumerate(encoded) for at in range(0, len(ids), window)]
        pieces.sort(key=lambda piece: len(piece[1]), reverse=True)
        at = 0
        while at < len(pieces):
            rows = max(1, reader.batch_tokens // len(pieces[at][1]))
            batch = pieces[at : at + rows]
            nats = reader.losses(*_padded([ids for _, ids in batch], reader.bos_id)).double().sum(dim=1).tolist()
            for (document, ids), value in zip(batch, nats, strict=True):
                bits[document] += value / math.log(2)
                tokens[document] += len(ids)
            at += rows
            progress(first + len(encoded) * min(at, len(pieces)) // len(pieces), len(texts))
        progress(first + len(encoded), len(texts))
    return bits.tolist(), tokens.tolist()


def _padded(rows: Sequence[NDArray[Any]], bos_id: int) -> tuple[Tensor, Tensor]:
    """Inputs, led by `<|bos|>`, and targets, -1 in the padding: int64 (B, T). The longest row comes first."""
    targets = torch.full((len(rows), len(rows[0])), -1, dtype=torch.int64)
    for line, row in zip(targets, rows, strict=True):
        line[: len(row)] = torch.from_numpy(row.astype(np.int64))
    inputs = torch.cat((torch.full((len(rows), 1), bos_id), targets[:, :-1].clamp(min=0)), dim=1)
    return inputs, targets
