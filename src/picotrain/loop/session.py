"""What the training loop works with: everything one training holds, and what it does when something is due."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from picotrain import checkpoint, evaluation, optim, report, sampling, schedule
from picotrain import run as runs
from picotrain.config import Config
from picotrain.data.lanes import merge_states
from picotrain.data.stream import Batch, Loader, validation_rows
from picotrain.errors import ArchiveBehind, DataError, Diverged, LaunchError, RunError
from picotrain.evaluation.suite import core_of_model
from picotrain.loop import archiving
from picotrain.model import Names, build
from picotrain.monitor import Monitor, profiler
from picotrain.parallel import Parallel, StopSignal, Watchdog, peak_memory
from picotrain.state import TrainState
from picotrain.terminal import say

FAILED_CLOSE_S = 30.0  # what an archive gets to finish in when the run ends by an error
AFTER_BAD_DATA = "everything up to here is saved: put the shard right and resume"


@dataclass(frozen=True)
class Outcome:
    """How the loop ended. behind: of rank 0, where the archive lacks the end."""

    status: Literal["finished", "stopped"]
    step: int
    behind: ArchiveBehind | None = None


class Session:
    """Everything one training holds: built from the run directory, restored from its newest checkpoint."""

    def __init__(self, run_dir: Path, parallel: Parallel, stop: StopSignal):
        self.dir, self.parallel, self.stop = run_dir, parallel, stop
        self.config: Config
        self.config, self.plan, self.corpus, self.tokenizer = runs.read_material(run_dir)
        self.checkpoints = run_dir / "checkpoints"
        # Compiled code is kept there, not in the system's temporary folder; torch looks when its compiler is imported.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs.cache_dir(self.config) / "compiled"))

        self.archive = archiving.start(self.config, run_dir) if parallel.is_main else None

        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        p = self.plan
        self.model = build(self.config.model, p.vocab_size, p.seq_len, p.precision, p.recompute).to(parallel.device)
        chosen = self._choose_kernels()
        optimizer = optim.build(self.config.optimizer, self.model, self.plan.rates, parallel)
        self.state = TrainState(self.model, optimizer)
        self.guard = optim.Guard(self.config.train.skip_loss_z, parallel.device)
        self.watchdog = Watchdog(self.config.launch.hang_s, run_dir / "flight_recorder" / f"rank_{parallel.rank}.json")
        self.saver = checkpoint.Saver(self.checkpoints, self.config.checkpoint) if parallel.is_main else None
        self.schedule = schedule.build(self.config.schedule, self.plan.num_steps)
        self.monitor = Monitor(
            run_dir, self.config, self.plan, is_main=parallel.is_main, rank=parallel.rank, peak_memory=lambda: peak_memory(parallel.device)
        )
        if self.saver:
            saver = self.saver
            self.monitor.saving = lambda: saver.busy
        self.resumed_step = self._restore()
        if chosen:
            self.monitor.event(self.state.step, "attention", chosen)
        self.profiler = profiler.build(self.monitor, parallel.device, self.state.step)

        if self.plan.compile:
            self.model.compile_blocks()
        self.wrapped: nn.Module = parallel.wrap(self.model)
        self.loader = Loader(
            self.corpus,
            self.tokenizer,
            **self.plan.stream,
            seed=self.config.run.seed,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            device=parallel.device,
            state=self.state.loader,
            on_bad_shard=self.config.data.on_bad_shard,
        )
        self.state.loader = self.state.loader or self.loader.state  # a first step that is given up half-way saves the start
        self._failure: DataError | None = None  # what ends the run, the same on every rank
        self._stopping_s = 0.0  # when a stop was agreed on
        self._val_rows = None  # tokenized when the first evaluation wants them

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.profiler.close()  # while the watchdog still watches: it waits for the device
        self.watchdog.close()
        self.loader.close()
        if self.saver:
            self.saver.wait()
        if self.archive:
            self.archive.close(min(self.config.archive.close_s, FAILED_CLOSE_S))  # does nothing after `end`
        self.monitor.close()
        if self.archive:
            archiving.record(self.dir, self.state.step, self.archive.poll())

    def warm_up(self) -> None:
        """Pass a batch of zeros through a model that is to be compiled, and back: then the first step takes as long as any other, and
        training time does not hold the compiler's. Weights, moments and random states stay as they are.
        """
        if not self.plan.compile or self.state.step >= self.plan.num_steps:
            return
        started_s = time.perf_counter()
        ids = torch.zeros(self.plan.device_batch_size, self.plan.seq_len, dtype=torch.int64, device=self.parallel.device)
        self.wrapped(ids, ids).backward()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.monitor.event(self.state.step, "compiled", f"in {time.perf_counter() - started_s:.1f} s, which is no training time")

    def _choose_kernels(self) -> str:
        """Choose the attention's kernels, the same on every rank. A new choice goes into plan.json, for a resume, and is told in words."""
        hw, plan = self.config.hardware, self.plan
        kept = Names(plan.attention, plan.window_attention or "auto")
        full, windowed = self.model.choose_kernels(Names(hw.attention, hw.window_attention), kept)
        names = self.parallel.gather([full.kernel.name, windowed.kernel.name])
        if any(others != names[0] for others in names):
            text = "; ".join(f"rank {rank}: {', '.join(own)}" for rank, own in enumerate(names))
            raise LaunchError(f"attention works differently on the ranks ({text}); set hardware.attention and hardware.window_attention")
        in_windows = plan.window_attention and windowed.kernel.name
        self.plan = plan.model_copy(update={"attention": full.kernel.name, "window_attention": in_windows})
        if self.plan == plan:
            return ""
        if self.parallel.is_main:
            self.plan.save(self.dir / "plan.json")
        return f"by {full}" + (f"; in windows by {windowed}" if in_windows else "")

    @property
    def rolling_due(self) -> bool:
        """Whether this rank, the one that saves, wants a rolling checkpoint; says what became of earlier saves."""
        self._report_saves()
        return self.saver is not None and self.saver.rolling_due

    def save(self, rolling: bool = False) -> None:
        """Begin a checkpoint of this step: rank 0 copies the tensors and writes them in the background."""
        self.monitor.flush()  # no line of a step that the checkpoint holds may be missing from metrics.jsonl
        self.state.loader = merge_states(self.parallel.gather(self.state.loader))
        for text in sorted(set(chain.from_iterable(self.parallel.gather(self.loader.skipped())))):
            self.monitor.event(self.state.step, "skipped_data", text)
        loop = self.state.loop
        loop.smoother, loop.smooth_train_loss = self.monitor.smoother_state(), self.monitor.smooth_loss
        loop.total_training_time = self.monitor.total_training_time_s
        loop.skipped, loop.recent_losses = self.monitor.skipped, self.guard.state_dict()
        if self.saver:
            try:
                self.saver.save(self.state, self.monitor.metrics_bytes(), rolling)
            except RunError as error:  # metrics.jsonl cannot be written: the disk is full
                self.saver.put_off()
                self.monitor.event(self.state.step, "save_failed", str(error))

    def _report_saves(self) -> None:
        for saved in self.saver.poll() if self.saver else []:
            if saved.error:
                self.monitor.event(saved.step, "save_failed", f"{saved.error}; training goes on, the next save tries again")
            else:
                self.monitor.checkpoint(saved.step, saved.path, saved.seconds, saved.stall_s)
                if self.archive:
                    self.archive.wake()
        for note in self.archive.poll() if self.archive else []:
            self.monitor.event(self.state.step, *note, shown=False)  # its thread has said it

    def _finish_saving(self) -> None:
        """Wait for the last save. Where it failed, try once more, then elsewhere; RunError says where it is."""
        if not self.saver:
            return
        self.saver.wait()
        self._report_saves()
        whole = checkpoint.step_dir(self.checkpoints, self.state.step)
        if checkpoint.is_whole(whole):
            return self.saver.tidy()  # an earlier process may have been killed before it did
        metrics_bytes = 0 if self.monitor.disk_full else self.monitor.metrics_bytes()
        self.saver.save(self.state, metrics_bytes)
        self.saver.wait()
        self._report_saves()
        if checkpoint.is_whole(whole):
            return
        try:
            elsewhere = self.saver.rescue(self.state, metrics_bytes)
        except OSError as error:
            raise RunError(f"{whole} cannot be written, nor can the temporary folder ({error}); the last whole one stays") from error
        raise RunError(f"{whole} cannot be written; it was saved as {elsewhere} instead: free space, move it there and resume")

    def say_why(self, failed: BaseException | None) -> None:
        """Record why the run stops here: a signal, or what some rank could not read. A bug in the loader is raised at once."""
        if failed is not None and not isinstance(failed, DataError):
            raise failed
        self._stopping_s = time.monotonic()
        reasons = [text for text in self.parallel.gather(str(failed) if failed else None) if text]
        self._failure = DataError(f"{reasons[0]}\n{self._after_bad_data()}") if reasons else None
        name, message = ("bad_data", reasons[0]) if reasons else ("stopped", "asked to by a signal")
        self.monitor.event(self.state.step, name, f"{message}; saving")

    def _after_bad_data(self) -> str:
        """What to do about a shard that cannot be read; where such are passed over already, nothing readable was left."""
        passed_over = self.config.data.on_bad_shard == "skip"
        return AFTER_BAD_DATA + ("" if passed_over else ", or resume with data.on_bad_shard=skip to pass over it")

    def log(self, step: int, started_s: float, batch: Batch, source_rows: torch.Tensor, **values: Any) -> None:
        """Record a step whose last micro-batch was `batch`; source_rows: of this rank, by source."""
        if self.profiler.on:
            values["profiled"] = True
        self.monitor.train_step(
            step=step, started_s=started_s, lr=self.plan.matrix_lr * values["lr_factor"],
            epoch=batch.epoch, pq=batch.pq, rg=batch.rg, **values, **self._by_source(source_rows, batch.source_epochs),
        )  # fmt: skip
        self.profiler.end(step)

    def _by_source(self, rows: torch.Tensor, epochs: Sequence[float]) -> dict[str, Any]:
        """What a mixture's train lines say beside: tokens of the step (all ranks) and epochs (this rank's lanes) by source."""
        if len(epochs) == 1:
            return {}
        tokens = self.parallel.sum_fp64(rows.to(self.parallel.device) * self.plan.seq_len).long()
        names = self.corpus.names
        return {"source_tokens": dict(zip(names, tokens, strict=True)), "source_epochs": dict(zip(names, epochs, strict=True))}

    def evaluate(self) -> bool:
        """Measure bits per byte on the validation shard; False when a stop was asked for meanwhile."""
        with self._at_no_cost("bits per byte"):
            found = evaluation.bits_per_byte(
                self.model,
                self._validation_rows,
                self.tokenizer.token_bytes(),
                self.config.evaluation.bpb.device_batch_size or self.plan.device_batch_size,
                self.parallel,
                given_up=self._given_up,
                progress=self.monitor.progress("bits per byte"),
            )
            if found is None:
                return False
            result, loop, step = found[0], self.state.loop, self.state.step
            self.monitor.val(step, result.val_bpb, result.val_loss, result.tokens, best_bpb=loop.min_val_bpb)
            loop.val_bpb, loop.val_bpb_step = result.val_bpb, step
            loop.min_val_bpb = min(result.val_bpb, loop.min_val_bpb or result.val_bpb)
            self._record(val_bpb=result.val_bpb, val_loss=result.val_loss)
        return True

    def core(self) -> bool:
        """Measure the CORE metric; False when a stop was asked for meanwhile. Nothing without a bundle, which was said at the start."""
        section = self.config.evaluation.core
        if section.bundle is None:
            return True
        with self._at_no_cost("CORE"):
            result = core_of_model(
                self.model,
                self.tokenizer,
                lambda: runs.open_bundle(self.config),
                self.config.train.core_metric_max_per_task,
                self.parallel,
                given_up=self._given_up,
                progress=lambda label, done, total: self.monitor.progress(f"CORE {label}")(done, total),
            )
            if result is None:
                return False
            self.monitor.core(self.state.step, asdict(result))
            self._record(core_metric=result.core_metric)
        return True

    def sample(self) -> bool:
        """Generate from the configured prompts, the same on every rank; False when a stop was asked for before."""
        if self.parallel.agree(self.stop.requested):
            return False
        seed = self.config.run.seed + self.state.step
        with self._at_no_cost("samples"):
            samples = sampling.complete(self.model, self.tokenizer, self.config.sampling.prompts, self.config.sampling, seed)
            self.monitor.sample(self.state.step, [asdict(sample) for sample in samples])
        return True

    def _validation_rows(self) -> evaluation.Rows:
        """Tokenized when the first evaluation wants them, then kept."""
        if self._val_rows is None:
            self._val_rows = validation_rows(self.corpus, self.tokenizer, self.plan.seq_len, self.plan.eval_rows, self.plan.unit_bytes).rows
        return evaluation.Rows(self._val_rows)

    def _given_up(self) -> bool:
        self.watchdog.beat()
        return self.stop.requested

    @contextmanager
    def _at_no_cost(self, what: str) -> Iterator[None]:
        """An evaluation that fails is recorded, and costs neither the run nor its weights: those were saved before, if due."""
        self.profiler.finish(self.state.step)
        try:
            yield
        except Diverged:  # found by the line that was waiting to be written
            raise
        except Exception as error:
            trace = error.trace if isinstance(error, evaluation.EvaluationFailed) else traceback.format_exc()
            if trace and self.parallel.is_main:
                say(trace)
            self.monitor.event(self.state.step, "evaluation_failed", f"{what}: {error}; training goes on")

    def _record(self, **metrics: Any) -> None:
        """Keep beside this step's checkpoint what was measured, once that is whole."""
        if self.saver:
            self.saver.wait()
            checkpoint.record_metrics(self.checkpoints, self.state.step, metrics)

    def end(self, status: Literal["finished", "stopped"]) -> Outcome:
        """Close the books: the last lines, the report."""
        self.loader.close()
        self._finish_saving()
        self.profiler.finish(self.state.step)
        if status == "finished":
            self.monitor.event(self.state.step, status)
        elif not self._failure:
            took_s = time.monotonic() - (self.stop.requested_s or self._stopping_s)  # the signal may have been another rank's
            self.monitor.event(self.state.step, "stopped", f"whole on disk {took_s:.2f} s after the signal")
        self.monitor.close()
        if self.parallel.is_main:
            summary = report.write_report(self.dir)
            report.console_summary(summary)
        self.watchdog.close()
        behind = None
        if self.archive:
            stopped = status == "stopped"
            behind = archiving.finish(self.archive, self.dir, self.config, self.state.step, stopped, lambda: self.stop.requested)
        if self._failure:
            raise self._failure
        return Outcome(status, self.state.step, behind)

    def _restore(self) -> int | None:
        """Go on from the newest whole checkpoint, if there is one; the step it was saved at."""
        path = checkpoint.newest(self.checkpoints, self.monitor.warn)
        if path is None:
            torch.manual_seed(self.config.run.seed)  # nothing draws from it yet; what will, goes on from its checkpoints
            self.model.init_weights(self.config.run.seed)
            self.monitor.start(0)
            return None
        metrics_bytes = checkpoint.load(path, self.state)
        loop = self.state.loop
        self.guard.load_state_dict(loop.recent_losses)
        self.monitor.start(self.state.step, metrics_bytes, loop.smoother, loop.total_training_time, loop.skipped)
        return self.state.step
