"""Bits per byte of rows, as the data stream packs them. The same code in the loop and in `picotrain eval`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from picotrain.evaluation.together import EvaluationFailed, together
from picotrain.parallel import Parallel


@dataclass(frozen=True)
class Bpb:
    """Bits per byte and nats per token over `tokens` target tokens that stand for `bytes` UTF-8 bytes."""

    val_bpb: float
    val_loss: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, nats: float, n_bytes: float, tokens: float) -> Bpb:
        """From sums; NaN where there is no token."""
        if not tokens:
            return cls(math.nan, math.nan, 0, 0)
        return cls(float(nats / (math.log(2) * n_bytes)), float(nats / tokens), int(tokens), int(n_bytes))


class Rows(NamedTuple):
    """What is measured: ids (N, T + 1). group_of (N, T + 1): the group that each id counts in; None: there is one group."""

    ids: NDArray[Any]
    group_of: NDArray[np.int64] | None = None
    groups: int = 1


def bits_per_byte(
    model: nn.Module,
    rows: Callable[[], Rows],
    token_bytes: np.ndarray,  # (vocab_size,) UTF-8 bytes of each id, 0 for specials
    device_batch_size: int,
    parallel: Parallel,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Bpb] | None:
    """Summed target loss in nats / (ln 2 x summed UTF-8 bytes of the targets): of all rows, then of each group if there are several.

    None when any rank gave up. Raises EvaluationFailed on every rank where any rank raised, `rows` included, and where a loss is not
    finite.

    Bytes instead of tokens make the figure comparable across vocabularies. Special tokens stand for no text, so they count neither loss
    nor bytes. Row i belongs to rank i mod dp_size. Every rank runs equally many forwards, because a rank that stayed away would hang
    sharded parameters. A rank with fewer rows runs rows of weight 0. Sums are in fp64. Ranks meet at the end only.
    """
    was_training = model.training
    model.eval()
    try:
        shares = together(parallel, lambda: _sums(model, rows(), token_bytes, device_batch_size, parallel, should_stop, progress))
    finally:
        model.train(was_training)
    if None in shares:
        return None
    sums = np.array(shares).sum(axis=0)  # (groups, 3): nats, bytes, tokens
    if not np.isfinite(sums).all():
        raise EvaluationFailed("the loss on validation text is not finite")
    return [Bpb.of(*sums.sum(axis=0)), *(Bpb.of(*group) for group in sums if len(sums) > 1)]


@torch.no_grad()
def _sums(
    model: nn.Module,
    rows: Rows,
    token_bytes: np.ndarray,
    device_batch_size: int,
    parallel: Parallel,
    should_stop: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> list[list[float]] | None:
    """Nats, bytes and tokens of each group in this rank's rows."""
    sizes = torch.from_numpy(token_bytes.astype(np.int64)).to(parallel.device)
    place = "cpu" if parallel.device.type == "mps" else parallel.device  # mps has no fp64
    sums = torch.zeros(rows.groups, 3, dtype=torch.float64, device=place)
    count = len(rows.ids)
    batches = math.ceil(count / (parallel.dp_size * device_batch_size))
    for batch in range(batches):
        if should_stop():
            return None
        first = batch * device_batch_size * parallel.dp_size + parallel.dp_rank
        indices = first + parallel.dp_size * np.arange(device_batch_size)
        inside = np.minimum(indices, count - 1)
        ids = torch.from_numpy(rows.ids[inside].astype(np.int64)).to(parallel.device)
        weight = torch.from_numpy(indices < count).to(parallel.device)
        losses = model(ids[:, :-1], ids[:, 1:], reduction="none").to(place).double()  # (B, T)
        target_bytes = (sizes[ids[:, 1:]] * weight[:, None]).to(place)
        counted = target_bytes > 0
        found = torch.stack([torch.where(counted, losses, 0.0), target_bytes.double(), counted.double()], dim=-1)  # (B, T, 3)
        if rows.group_of is None:
            sums[0] += found.sum(dim=(0, 1))
        else:
            groups = torch.from_numpy(rows.group_of[inside, 1:]).to(place)
            sums.index_add_(0, groups.flatten(), found.flatten(0, 1))
        progress(batch + 1, batches)
    return sums.tolist()
