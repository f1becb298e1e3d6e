"""Bits per byte, checked against the definition written out token by token."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from picotrain.evaluation import bits_per_byte
from picotrain.parallel import Parallel

VOCAB = 7
TOKEN_BYTES = np.array([0, 1, 1, 2, 3, 1, 4], dtype=np.int32)  # id 0 is special
ROWS = np.random.default_rng(0).integers(0, VOCAB, (11, 6)).astype(np.uint16)


class Table(nn.Module):
    """A bigram model: the losses can be looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(self.logits[ids].transpose(1, 2), targets, reduction="none")


def by_hand(model: Table) -> tuple[float, float]:
    log_p = model.logits.detach().double().log_softmax(-1)
    pairs = [(int(a), int(b)) for row in ROWS for a, b in itertools.pairwise(row) if TOKEN_BYTES[b] > 0]
    nats = -sum(float(log_p[a, b]) for a, b in pairs)
    return nats / math.log(2) / sum(int(TOKEN_BYTES[b]) for _, b in pairs), nats / len(pairs)


@pytest.mark.parametrize("device_batch_size", [1, 4, 11, 50])
def test_bpb_is_the_definition_whatever_the_micro_batch(device_batch_size: int):
    model = Table()
    result = bits_per_byte(model, ROWS, TOKEN_BYTES, device_batch_size, Parallel.single())
    assert result is not None
    assert (result.val_bpb, result.val_loss) == pytest.approx(by_hand(model), rel=1e-6)
    targets = ROWS[:, 1:]
    assert (result.tokens, result.bytes) == (int((TOKEN_BYTES[targets] > 0).sum()), int(TOKEN_BYTES[targets].sum()))


def test_every_rank_runs_equally_many_forwards_and_the_sum_is_the_same(monkeypatch: pytest.MonkeyPatch):
    whole = Table()
    expected = bits_per_byte(whole, ROWS, TOKEN_BYTES, 3, Parallel.single())
    parts, calls = [], []
    for rank in range(4):
        model = Table()
        parallel = dataclasses.replace(Parallel.single(), rank=rank, world_size=4)
        monkeypatch.setattr(Parallel, "sum_fp64", lambda self, value: parts.append(value) or value)
        bits_per_byte(model, ROWS, TOKEN_BYTES, 3, parallel)
        calls.append(model.calls)
    nats, total_bytes, tokens = torch.stack(parts).sum(0).tolist()
    assert len(set(calls)) == 1
    assert expected is not None
    assert nats / math.log(2) / total_bytes == pytest.approx(expected.val_bpb, rel=1e-12)
    assert tokens == expected.tokens


def test_an_evaluation_can_be_given_up_and_leaves_the_model_as_it_was():
    model = Table().train()
    answers = iter([False, True])
    assert bits_per_byte(model, ROWS, TOKEN_BYTES, 1, Parallel.single(), given_up=lambda: next(answers)) is None
    assert model.calls == 1
    assert model.training


def test_progress_counts_up_to_the_end():
    seen: list[tuple[int, int]] = []
    bits_per_byte(Table(), ROWS, TOKEN_BYTES, 4, Parallel.single(), progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
