"""Bits per byte: weights in, numbers out. The same code in the loop and in `picotrain eval`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from picotrain.parallel import Parallel


@dataclass(frozen=True)
class Bpb:
    """Bits per byte and nats per token over `tokens` target tokens that stand for `bytes` UTF-8 bytes."""

    val_bpb: float
    val_loss: float
    tokens: int
    bytes: int


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    rows: np.ndarray,  # (N, T + 1) token ids
    token_bytes: np.ndarray,  # (vocab_size,) UTF-8 bytes of each id, 0 for specials
    device_batch_size: int,
    parallel: Parallel,
    given_up: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bpb | None:
    """Summed target loss in nats / (ln 2 x summed UTF-8 bytes of the targets); None when given up half-way.

    Bytes instead of tokens make the figure comparable across vocabularies. Special tokens stand for no text, so
    they count neither loss nor bytes. Row i belongs to rank i mod dp_size; every rank runs equally many forwards, a
    short one on rows of weight 0, because a rank that stayed away would hang sharded parameters. Sums are in fp64.
    """
    sizes = torch.from_numpy(token_bytes.astype(np.int64)).to(parallel.device)
    place = "cpu" if parallel.device.type == "mps" else parallel.device  # mps has no fp64
    sums = torch.zeros(3, dtype=torch.float64, device=place)  # nats, bytes, tokens
    batches = math.ceil(len(rows) / (parallel.dp_size * device_batch_size))
    was_training = model.training
    model.eval()
    try:
        for batch in range(batches):
            if given_up():
                return None
            first = batch * device_batch_size * parallel.dp_size + parallel.dp_rank
            indices = first + parallel.dp_size * np.arange(device_batch_size)
            ids = torch.from_numpy(rows[np.minimum(indices, len(rows) - 1)].astype(np.int64)).to(parallel.device)
            weight = torch.from_numpy(indices < len(rows)).to(parallel.device)
            losses = model(ids[:, :-1], ids[:, 1:], reduction="none").to(place).double()  # (B, T)
            target_bytes = (sizes[ids[:, 1:]] * weight[:, None]).to(place)
            counted = target_bytes > 0
            sums += torch.stack([(losses * counted).sum(), target_bytes.sum().double(), counted.sum().double()])
            progress(batch + 1, batches)
    finally:
        model.train(was_training)
    nats, total_bytes, tokens = parallel.sum_fp64(sums).tolist()
    return Bpb(nats / (math.log(2) * total_bytes), nats / tokens, int(tokens), int(total_bytes))
