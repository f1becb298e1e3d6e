"""Bits per byte, checked against the definition written out token by token."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from picotrain.evaluation import Bpb, EvaluationFailed, Rows, bits_per_byte
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


def measure(model: nn.Module, batch: int, parallel: Parallel | None = None, rows: Rows | None = None, **options) -> list[Bpb] | None:
    return bits_per_byte(model, lambda: rows or Rows(ROWS), TOKEN_BYTES, batch, parallel or Parallel.single(), **options)


def by_hand(model: Table) -> tuple[float, float]:
    log_p = model.logits.detach().double().log_softmax(-1)
    pairs = [(int(a), int(b)) for row in ROWS for a, b in itertools.pairwise(row) if TOKEN_BYTES[b] > 0]
    nats = -sum(float(log_p[a, b]) for a, b in pairs)
    return nats / math.log(2) / sum(int(TOKEN_BYTES[b]) for _, b in pairs), nats / len(pairs)


@pytest.mark.parametrize("device_batch_size", [1, 4, 11, 50])
def test_bpb_is_the_definition_whatever_the_micro_batch(device_batch_size: int):
    model = Table()
    (result,) = measure(model, device_batch_size) or ()
    assert (result.val_bpb, result.val_loss) == pytest.approx(by_hand(model), rel=1e-6)
    targets = ROWS[:, 1:]
    assert (result.tokens, result.bytes) == (int((TOKEN_BYTES[targets] > 0).sum()), int(TOKEN_BYTES[targets].sum()))


def test_every_rank_runs_equally_many_forwards_and_the_sum_is_the_same(monkeypatch: pytest.MonkeyPatch):
    whole = Table()
    (expected,) = measure(whole, 3) or ()
    parts, calls = [], []
    for rank in range(4):
        model = Table()
        parallel = dataclasses.replace(Parallel.single(), rank=rank, world_size=4)
        monkeypatch.setattr(Parallel, "gather", lambda self, value: parts.append(value[0]) or [value])
        measure(model, 3, parallel)
        calls.append(model.calls)
    nats, total_bytes, tokens = np.array(parts).sum(axis=(0, 1))
    assert len(set(calls)) == 1
    assert nats / math.log(2) / total_bytes == pytest.approx(expected.val_bpb, rel=1e-12)
    assert tokens == expected.tokens


def test_an_evaluation_can_be_given_up_and_leaves_the_model_as_it_was():
    model = Table().train()
    answers = iter([False, True])
    assert measure(model, 1, should_stop=lambda: next(answers)) is None
    assert model.calls == 1
    assert model.training


def test_progress_counts_up_to_the_end():
    seen: list[tuple[int, int]] = []
    measure(Table(), 4, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_groups_are_parts_of_the_whole_and_each_counts_its_own_tokens():
    model = Table()
    group_of = np.random.default_rng(1).integers(0, 3, ROWS.shape)
    whole, *groups = measure(model, 4, rows=Rows(ROWS, group_of, 4)) or ()
    (alone,) = measure(model, 4) or ()
    assert whole.val_bpb == pytest.approx(alone.val_bpb, rel=1e-12) and sum(group.bytes for group in groups) == whole.bytes
    only = np.where(group_of == 1, ROWS, 0)  # id 0 is special: no loss, no bytes
    nats = -sum(
        float(model.logits.detach().double().log_softmax(-1)[a, b])
        for row, masked in zip(ROWS, only, strict=True)
        for (a, b), kept in zip(itertools.pairwise(row), masked[1:], strict=True)
        if TOKEN_BYTES[kept]
    )
    assert groups[1].val_bpb == pytest.approx(nats / math.log(2) / int(TOKEN_BYTES[only[:, 1:]].sum()), rel=1e-6)
    assert groups[3].tokens == 0 and math.isnan(groups[3].val_bpb)


def test_numbers_that_are_not_finite_are_no_figure():
    model = Table()
    with torch.no_grad():
        model.logits[3, 4] = math.nan
    with pytest.raises(EvaluationFailed, match="not finite"):
        measure(model, 4)


def test_what_one_rank_raises_is_raised_on_all_and_says_where(monkeypatch: pytest.MonkeyPatch):
    theirs = [None, "DataError: a shard is gone", ""]
    monkeypatch.setattr(Parallel, "gather", lambda self, value: [value, theirs])
    with pytest.raises(EvaluationFailed, match="rank 1: DataError: a shard is gone"):
        measure(Table(), 4, dataclasses.replace(Parallel.single(), world_size=2))

    def broken() -> Rows:
        raise ZeroDivisionError("in rows")

    monkeypatch.setattr(Parallel, "gather", lambda self, value: [value])
    with pytest.raises(EvaluationFailed, match="ZeroDivisionError: in rows") as error:
        bits_per_byte(Table(), broken, TOKEN_BYTES, 4, Parallel.single())
    assert "def broken" not in error.value.trace and "in broken" in error.value.trace
