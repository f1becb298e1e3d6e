"""What is measured on the weights while they are trained, each at its own cadence: bits per byte, CORE, the evaluations of other packages,
samples."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from picotrain import evaluation, sampling
from picotrain import run as runs
from picotrain.contracts import EVALUATED_ROWS, Evaluation
from picotrain.data.stream import validation_rows
from picotrain.errors import Diverged
from picotrain.evaluation.together import together, undisturbed
from picotrain.loop.saves import Saves
from picotrain.loop.training import Training
from picotrain.terminal import say


class Periodic(NamedTuple):
    """An evaluation and when it is due."""

    name: str
    every: int  # steps; <= 0: never
    at_start: bool  # whether it is due at step 0, too
    measure: Callable[[], bool]  # False: given up, since a stop was asked for

    def due(self, step: int, last: bool) -> bool:
        return self.every > 0 and (last or (step % self.every == 0 and (step > 0 or self.at_start)))


def evaluations(run: Training, saves: Saves) -> list[Periodic]:
    """The evaluations of a run, in the order in which they are made."""
    train, made = run.config.train, _Evaluations(run, saves)
    listed = [
        ("bits per byte", train.eval_every, True, made.bits_per_byte),
        ("CORE", train.core_metric_every, False, made.core),
        *((part.kind, part.every, False, partial(made.part, part)) for _, part in run.config.evaluation if isinstance(part, Evaluation)),
        ("samples", train.sample_every, False, made.samples),
    ]
    return [Periodic(name, every, at_start, partial(made.at_no_cost, name, measure)) for name, every, at_start, measure in listed]


class _Evaluations:
    """What evaluations share: the run, where figures go, and the validation rows."""

    def __init__(self, run: Training, saves: Saves):
        self._run, self._saves = run, saves

    def at_no_cost(self, name: str, measure: Callable[[], bool]) -> bool:
        """What `measure` returns. Where it fails, that is recorded, and costs neither the run nor its weights: those were saved before, if
        due."""
        run = self._run
        run.profiler.finish(run.state.step)
        try:
            return measure()
        except Diverged:  # found by the line that was waiting to be written
            raise
        except Exception as error:
            trace = error.trace if isinstance(error, evaluation.EvaluationFailed) else traceback.format_exc()
            if trace and run.parallel.is_main:
                say(trace)
            run.event("evaluation_failed", f"{name}: {error}; training goes on")
            return True

    def bits_per_byte(self) -> bool:
        """Of the validation shard."""
        run = self._run
        batch, token_bytes = run.config.evaluation.bpb.device_batch_size or run.plan.device_batch_size, run.tokenizer.token_bytes()
        options: dict[str, Any] = {"should_stop": self._should_stop, "progress": run.monitor.progress("bits per byte")}
        found = evaluation.bits_per_byte(run.model, lambda: evaluation.Rows(self._rows), token_bytes, batch, run.parallel, **options)
        if found is None:
            return False
        result, loop, step = found[0], run.state.loop, run.state.step
        run.monitor.val(step, result.val_bpb, result.val_loss, result.tokens, best_bpb=loop.min_val_bpb)
        loop.val_bpb, loop.val_bpb_step = result.val_bpb, step
        loop.min_val_bpb = min(result.val_bpb, loop.min_val_bpb or result.val_bpb)
        self._saves.record(val_bpb=result.val_bpb, val_loss=result.val_loss)
        return True

    def core(self) -> bool:
        """Nothing without a bundle, which was said at the start."""
        run, most = self._run, self._run.config.train.core_metric_max_per_task
        if run.config.evaluation.core.bundle is None:
            return True

        from picotrain.evaluation.suite import core_of_model  # much code, for runs that have a bundle

        def progress(label: str, done: int, total: int) -> None:
            run.monitor.progress(f"CORE {label}")(done, total)

        bundle = partial(runs.open_bundle, run.config)
        result = core_of_model(run.model, run.tokenizer, bundle, most, run.parallel, self._should_stop, progress)
        if result is None:
            return False
        run.monitor.core(run.state.step, asdict(result))
        self._saves.record(core_metric=result.core_metric)
        return True

    def part(self, part: Evaluation) -> bool:
        """An evaluation of another package."""
        run = self._run

        def figures() -> dict[str, float] | None:
            ids = torch.from_numpy(self._rows[:EVALUATED_ROWS].astype(np.int64)).to(run.parallel.device)
            found = {str(name): float(value) for name, value in part.measure(run.model, ids, run.parallel).items()}
            if taken := found.keys() & {"step", "kind"}:
                raise ValueError(f"a figure is called {taken.pop()!r}, as every line of metrics.jsonl has it")
            return None if run.stop.requested else found

        with undisturbed(run.model):
            found = together(run.parallel, figures)
        if None in found:
            return False
        run.monitor.figures(run.state.step, part.kind, found[0])
        self._saves.record(**{part.kind: found[0]})
        return True

    def samples(self) -> bool:
        """What the model writes after the configured prompts, the same on every rank."""
        run, section = self._run, self._run.config.sampling
        seed = run.config.run.seed + run.state.step

        def written() -> list[dict[str, str]] | None:
            found = sampling.complete(run.model, run.tokenizer, section.prompts, section, seed, self._should_stop)
            return None if run.stop.requested else [asdict(sample) for sample in found]

        found = together(run.parallel, written)
        if None in found:
            return False
        run.monitor.sample(run.state.step, found[0])
        return True

    @cached_property
    def _rows(self) -> NDArray[Any]:
        """Tokenized when the first evaluation wants them, then kept."""
        run, plan = self._run, self._run.plan
        count = plan.eval_rows if run.config.train.eval_every > 0 else min(plan.eval_rows, EVALUATED_ROWS)
        return validation_rows(run.corpus, run.tokenizer, plan.seq_len, count, plan.unit_bytes).rows

    def _should_stop(self) -> bool:
        self._run.watchdog.beat()
        return self._run.stop.requested
