"""What surrounds the four beats of a step: a model that is warm, rows that are there, and the line that is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from picotrain.data.stream import Batch
from picotrain.errors import Stopped
from picotrain.loop.training import Training


def warm_up(run: Training) -> None:
    """Pass a batch of zeros through a model that is to be compiled, and back: then the first step takes as long as any other, and
    training time does not hold the compiler's. Weights, moments and random states stay as they are.

    A stop ends it with Stopped: a compiler takes a minute or two, and nothing was trained since the checkpoint that is on disk.
    """
    if not run.plan.compile or run.state.step >= run.plan.num_steps:
        return
    started_s = time.perf_counter()
    ids = torch.zeros(run.plan.device_batch_size, run.plan.seq_len, dtype=torch.int64, device=run.parallel.device)

    def record() -> None:
        run.event("stopped", "asked to by a signal, while compiling")

    try:
        with run.stop.ending("compiling", record):
            run.wrapped(ids, ids).backward()
    except Stopped:
        record()
        raise
    run.state.optimizer.zero_grad(set_to_none=True)
    run.event("compiled", f"in {time.perf_counter() - started_s:.1f} s, which is no training time")


class Step:
    """A step as it is measured: how long its rows were waited for, how long it computes, what its micro-batches bring."""

    def __init__(self, run: Training):
        self._run, self._timer, self._number = run, run.monitor.timer, run.state.step
        self._waited: Any = None  # from when to when
        self._began: Any = None
        self._wait_ms = 0.0
        self._source_rows = torch.zeros(len(run.corpus.sources))  # of this rank, by source
        self._batch: Batch | None = None
        self.loss = torch.zeros((), device=run.parallel.device)  # of this rank, the mean over its micro-batches so far

    def wait_for_rows(self) -> BaseException | None:
        """Wait until the rows of the step are there, or a stop is asked for; what went wrong with them."""
        began = self._timer.mark()
        failed = self._run.loader.look_ahead(self._run.plan.grad_accum_steps, lambda: self._run.stop.requested)
        self._waited = began, self._timer.mark()
        return failed

    def begin(self) -> None:
        """Look at the clock, and record a few steps if that was asked for."""
        self._run.profiler.begin(self._number)
        self._began = self._timer.mark()

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        """Count a micro-batch; loss: its share of the step's."""
        self._batch = batch
        self.loss += loss.detach()
        self._wait_ms += batch.wait_ms
        self._source_rows += torch.tensor(batch.source_rows)

    def log(self, lr_factor: float, **values: Any) -> None:
        """Record the step, which is done."""
        run, batch = self._run, self._batch
        assert batch is not None, "a step has a micro-batch"
        if run.profiler.on:
            values["profiled"] = True
        run.monitor.train_step(
            step=self._number, began=self._began, waited=self._waited, lr=run.plan.matrix_lr * lr_factor, lr_factor=lr_factor,
            data_wait_ms=self._wait_ms, epoch=batch.epoch, pq=batch.pq, rg=batch.rg, **values, **self._by_source(batch.source_epochs),
        )  # fmt: skip
        run.profiler.end(self._number)

    def _by_source(self, epochs: Sequence[float]) -> dict[str, Any]:
        """What a mixture's train lines say beside: tokens of the step (all ranks) and epochs (this rank's lanes) by source."""
        if len(epochs) == 1:
            return {}
        run, names = self._run, self._run.corpus.names
        tokens = run.parallel.sum_fp64(self._source_rows.to(run.parallel.device) * run.plan.seq_len).long()
        return {"source_tokens": dict(zip(names, tokens, strict=True)), "source_epochs": dict(zip(names, epochs, strict=True))}
