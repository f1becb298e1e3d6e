"""Bits of whole documents, against the definition written out window by window and token by token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from picotrain.evaluation import EvaluationFailed, documents
from picotrain.evaluation.documents import score_documents
from picotrain.parallel import Parallel

BOS = 256
TEXTS = ["the cat sees the river.", "", "naïve café 日本", "a" * 50, "x", "\x00\n<|bos|>", "Ümit " * 9]


class Bytes:
    """A bigram model over UTF-8 bytes: the losses can be looked up."""

    bos_id = BOS

    def __init__(self, batch_tokens: int = 64):
        self.batch_tokens = batch_tokens
        self.logits = torch.randn(257, 257, generator=torch.Generator().manual_seed(0)).double()
        self.shapes: list[tuple[int, int]] = []

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.shapes.append((ids.size(0), ids.size(1)))
        assert ids.dtype == targets.dtype == torch.int64 and int(ids.min()) >= 0
        return nn.functional.cross_entropy(self.logits[ids].transpose(1, 2), targets, ignore_index=-1, reduction="none")


def by_hand(model: Bytes, text: str, window: int) -> float:
    log_p = model.logits.log_softmax(-1)
    data = text.encode()
    pieces = [data[at : at + window] for at in range(0, len(data), window)]
    return -sum(float(log_p[a, b]) for piece in pieces for a, b in itertools.pairwise([BOS, *piece])) / math.log(2)


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_bits_are_the_definition_whatever_the_batch(window: int, batch_tokens: int):
    model = Bytes(batch_tokens)
    found = score_documents(model, TEXTS, window, Parallel.single())
    assert found.bits == pytest.approx([by_hand(model, text, window) for text in TEXTS], rel=1e-9)
    assert found.bytes.tolist() == found.tokens.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.bpb == pytest.approx(sum(by_hand(model, text, window) for text in TEXTS) / sum(len(text.encode()) for text in TEXTS))
    assert max(tokens for _, tokens in model.shapes) <= window
    assert all(rows * tokens <= max(batch_tokens, tokens) for rows, tokens in model.shapes)


def test_documents_are_read_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch):
    whole = score_documents(Bytes(), TEXTS, 5, Parallel.single())
    monkeypatch.setattr(documents, "READ_AT_ONCE", 2)
    seen: list[tuple[int, int]] = []
    parts = score_documents(Bytes(), TEXTS, 5, Parallel.single(), lambda *at: seen.append(at))
    assert parts.bits == pytest.approx(whole.bits, rel=1e-12)
    assert seen[0] == (0, 7) and seen[-1] == (7, 7) and seen == sorted(seen)


def test_ranks_share_the_documents_and_agree(monkeypatch: pytest.MonkeyPatch):
    whole = score_documents(Bytes(), TEXTS, 5, Parallel.single())
    shares: list[list] = []
    ranks = [dataclasses.replace(Parallel.single(), rank=rank, world_size=2) for rank in range(2)]
    monkeypatch.setattr(Parallel, "gather", lambda self, value: shares.append(value) or [value, value])
    for rank in ranks:
        with pytest.raises(ValueError):  # one rank's share twice does not fit
            score_documents(Bytes(), TEXTS, 5, rank)
    monkeypatch.setattr(Parallel, "gather", lambda self, value: shares)
    for rank in ranks:
        found = score_documents(Bytes(), TEXTS, 5, rank)
        assert found.bits == pytest.approx(whole.bits, rel=1e-12)
        assert found.tokens.tolist() == whole.tokens.tolist() and found.bytes.tolist() == whole.bytes.tolist()


def test_numbers_that_are_not_finite_are_no_figure():
    model = Bytes()
    model.logits[ord("h"), 0] = math.nan
    with pytest.raises(EvaluationFailed, match="losses of 1 of 7 documents are not finite"):
        score_documents(model, TEXTS, 5, Parallel.single())
