"""What the training loop works with: everything one training holds, and what it does when something is due."""

from __future__ import annotations

import os
import shlex
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from picotrain import checkpoint, evaluation, invocation, optim, report, sampling
from picotrain import run as runs
from picotrain.config import Config
from picotrain.data.lanes import merge_states
from picotrain.data.stream import Batch, Loader, validation_rows
from picotrain.errors import ArchiveBehind, CheckpointError, DataError, Diverged, LaunchError, RunError, Stopped
from picotrain.evaluation.suite import core_of_model
from picotrain.evaluation.together import together
from picotrain.loop import archiving
from picotrain.metrics import METRICS, read_metrics
from picotrain.model import Names, build
from picotrain.monitor import Monitor, events, profiler
from picotrain.parallel import Parallel, Watchdog, peak_memory
from picotrain.signals import StopSignal
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
    """Everything one training holds, while it is entered: built from the run directory, restored from its newest checkpoint.

    What it starts ends with it, also where building it fails or a signal ends the building.
    """

    def __init__(self, run_dir: Path, parallel: Parallel, stop: StopSignal):
        self.dir, self.parallel, self.stop = run_dir, parallel, stop
        self.checkpoints = run_dir / "checkpoints"
        self._stack = ExitStack()
        self._failure: DataError | None = None  # what ends the run, the same on every rank
        self._stopping_s = 0.0  # when a stop was agreed on
        self._told: set[str] | None = None  # what was passed over and is recorded; None: not looked up yet
        self._val_rows = None  # tokenized when the first evaluation wants them
        self._waited: Any = None  # from when to when the next step's rows were waited for
        self._began: Any = None  # when the step began that is being computed

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            with self.stop.ending("starting"):
                self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _build(self, stack: ExitStack) -> None:
        """Fill in all that the loop works with. `stack` closes what needs it, in this order: loader, profiler (which waits for the
        device while the watchdog still watches), watchdog, saver, monitor, and the archive last."""
        parallel = self.parallel
        self.config: Config
        self.config, self.plan, self.corpus, self.tokenizer = runs.read_material(self.dir)
        # Compiled code is kept there, not in the system's temporary folder; torch looks when its compiler is imported.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs.cache_dir(self.config) / "compiled"))

        self.archive = archiving.start(self.config, self.dir) if parallel.is_main else None
        if self.archive:
            stack.callback(self._close_archive)

        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        p = self.plan
        self.model = build(self.config.model, p.vocab_size, p.seq_len, p.precision, p.recompute).to(parallel.device)
        chosen = self._choose_kernels()
        optimizer = optim.build(self.config.optimizer, self.model, self.plan.rates, parallel)
        self.state = TrainState(self.model, optimizer)
        self.guard = optim.Guard(self.config.train.skip_loss_z, parallel.device, self.config.optimizer.skips(parallel.device))
        self.monitor = Monitor(
            self.dir, self.config, self.plan, is_main=parallel.is_main, rank=parallel.rank, timer=events.build(parallel.device),
            peak_memory=lambda: peak_memory(parallel.device),
        )  # fmt: skip
        stack.callback(self.monitor.close)
        self.saver = checkpoint.Saver(self.checkpoints, self.config.checkpoint) if parallel.is_main else None
        if self.saver:
            saver = self.saver
            stack.callback(saver.wait)
            self.monitor.saving = lambda: saver.busy
        record_path = self.dir / "flight_recorder" / f"rank_{parallel.rank}.json"
        self.watchdog = stack.enter_context(Watchdog(self.config.launch.hang_s, record_path))
        self.resumed_step = self._restore()
        if chosen:
            self.monitor.event(self.state.step, "attention", chosen)
        self.profiler = profiler.build(self.monitor, parallel.device, self.state.step)
        stack.callback(self.profiler.close)

        if self.plan.compile:
            self.model.compile_blocks()
        self.wrapped: nn.Module = parallel.wrap(self.model)
        loader = Loader(
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
        self.loader = stack.enter_context(loader)
        self.state.loader = self.state.loader or self.loader.state  # a first step that is given up half-way saves the start
        if self.config.data.on_bad_shard == "skip":
            self._tell_skipped({text for corpus in self.corpus.corpora for text in corpus.files.missing(corpus.shards)})

    def warm_up(self) -> None:
        """Pass a batch of zeros through a model that is to be compiled, and back: then the first step takes as long as any other, and
        training time does not hold the compiler's. Weights, moments and random states stay as they are.

        A stop ends it with Stopped: a compiler takes a minute or two, and nothing was trained since the checkpoint that is on disk.
        """
        if not self.plan.compile or self.state.step >= self.plan.num_steps:
            return
        started_s = time.perf_counter()
        ids = torch.zeros(self.plan.device_batch_size, self.plan.seq_len, dtype=torch.int64, device=self.parallel.device)

        def record() -> None:
            self.monitor.event(self.state.step, "stopped", "asked to by a signal, while compiling")

        try:
            with self.stop.ending("compiling", record):
                self.wrapped(ids, ids).backward()
        except Stopped:
            record()
            raise
        self.state.optimizer.zero_grad(set_to_none=True)
        self.monitor.event(self.state.step, "compiled", f"in {time.perf_counter() - started_s:.1f} s, which is no training time")

    def _choose_kernels(self) -> str:
        """Choose the attention's kernels, the same on every rank. A new choice goes into plan.json, for a resume, and is told in words."""
        hw, plan = self.config.hardware, self.plan
        kept = Names(plan.attention, plan.window_attention or "auto")
        choice = self.model.choose_kernels(Names(hw.attention, hw.window_attention), kept)
        if choice is None:
            return ""
        full, windowed = choice
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

    def _close_archive(self) -> None:
        """After an error; behind `end` it does nothing but record what the archive has still to tell."""
        if self.archive:
            self.archive.close(min(self.config.archive.close_s, FAILED_CLOSE_S))
            archiving.record(self.dir, self.state.step if hasattr(self, "state") else 0, self.archive.poll())

    @property
    def rolling_due(self) -> bool:
        """Whether this rank, the one that saves, wants a rolling checkpoint; says what became of earlier saves."""
        self._report_saves()
        return self.saver is not None and self.saver.rolling_due

    def save(self, rolling: bool = False) -> None:
        """Begin a checkpoint of this step: rank 0 copies the tensors and writes them in the background."""
        self.monitor.flush()  # no line of a step that the checkpoint holds may be missing from metrics.jsonl
        self.state.loader = merge_states(self.parallel.gather(self.state.loader))
        self._tell_skipped(set(chain.from_iterable(self.parallel.gather(self.loader.skipped()))))
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

    def keep(self) -> None:
        """Make this step's checkpoint, which may be a rolling one, permanent: it is due, or the run ends here."""
        if self.saver:
            self.saver.keep(self.state.step)

    def _tell_skipped(self, texts: set[str]) -> None:
        """Record data that was passed over, once: every epoch and every resume meets it again."""
        if not texts or not self.parallel.is_main:
            return
        if self._told is None:
            self._told = set()
            with suppress(RunError):  # a damaged line costs at most an event that is there twice
                events = (line for line in read_metrics(self.dir / METRICS) if line.get("name") == "skipped_data")
                self._told.update(str(line.get("message")) for line in events)
        for text in sorted(texts - self._told):
            self.monitor.event(self.state.step, "skipped_data", text)
        self._told |= texts

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
        if self._is_saved():
            return self.saver.tidy()  # an earlier process may have been killed before it did
        self.saver.save(self.state, self._whole_metrics_bytes())
        self.saver.wait()
        self._report_saves()
        self._require_saved()

    def _is_saved(self) -> bool:
        return checkpoint.is_whole(checkpoint.step_dir(self.checkpoints, self.state.step))

    def _whole_metrics_bytes(self) -> int:
        return 0 if self.monitor.disk_full else self.monitor.metrics_bytes()

    def _require_saved(self) -> None:
        """Where this step's checkpoint is not there, or no longer, save it elsewhere and raise RunError, which says where it is."""
        if not self.saver or self._is_saved():
            return
        whole = checkpoint.step_dir(self.checkpoints, self.state.step)
        why = f"{whole} cannot be written" if self.dir.is_dir() else f"{self.dir} is gone"
        try:
            elsewhere = self.saver.rescue(self.state, self._whole_metrics_bytes())
        except OSError as error:
            there = checkpoint.complete(self.checkpoints)
            left = f"{there[-1].name} is the last whole checkpoint" if there else "no checkpoint of the run is left"
            raise RunError(f"{why}, nor can the temporary folder ({error}): step {self.state.step:,} is lost, {left}") from error
        how = "free space, move it there" if self.dir.is_dir() else "move it into the checkpoints of a run of the same config.yaml"
        raise RunError(f"{why}; step {self.state.step:,} was saved as {elsewhere} instead: {how} and resume")

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
        skip = f", or pass over it: picotrain resume {shlex.quote(invocation.shown(self.dir))} data.on_bad_shard=skip"
        return AFTER_BAD_DATA + ("" if passed_over else skip)

    def look_ahead(self) -> BaseException | None:
        """Wait for the rows of a step; what went wrong with them."""
        timer = self.monitor.timer
        from_ = timer.mark()
        failed = self.loader.look_ahead(self.plan.grad_accum_steps, lambda: self.stop.requested)
        self._waited = from_, timer.mark()
        return failed

    def begin(self, step: int) -> None:
        """Look at the clock, and record a few steps if that was asked for."""
        self.profiler.begin(step)
        self._began = self.monitor.timer.mark()

    def log(self, step: int, batch: Batch, source_rows: torch.Tensor, **values: Any) -> None:
        """Record a step whose last micro-batch was `batch`; source_rows: of this rank, by source."""
        if self.profiler.on:
            values["profiled"] = True
        self.monitor.train_step(
            step=step, began=self._began, waited=self._waited, lr=self.plan.matrix_lr * values["lr_factor"],
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
        """Generate from the configured prompts, the same on every rank; False when a stop was asked for meanwhile."""
        seed, section = self.config.run.seed + self.state.step, self.config.sampling

        def samples() -> list[dict[str, str]] | None:
            found = sampling.complete(self.model, self.tokenizer, section.prompts, section, seed, self._given_up)
            return None if self.stop.requested else [asdict(sample) for sample in found]

        with self._at_no_cost("samples"):
            found = together(self.parallel, samples)
            if None in found:
                return False
            self.monitor.sample(self.state.step, found[0])
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
            try:
                summary = report.write_report(self.dir)
            finally:
                self._require_saved()  # somebody may have removed the folder since it was saved
            report.console_summary(summary)
        self.watchdog.close()
        behind = None
        if self.archive:
            stopped = status == "stopped"
            behind = archiving.finish(self.archive, self.dir, self.config, self.state.step, stopped, lambda: self.stop.requested)
        if self._failure:
            self.parallel.barrier()  # the first rank that raises ends the others, and one of them writes the report
            raise self._failure
        return Outcome(status, self.state.step, behind)

    def _restore(self) -> int | None:
        """Go on from the newest whole checkpoint, if there is one; the step it was saved at."""
        damaged: list[str] = []
        path = checkpoint.newest(self.checkpoints, damaged.append)
        if path is None and damaged:
            raise CheckpointError(_all_damaged(self.dir, damaged))
        for text in damaged:
            self.monitor.warn(f"WARNING: {text}; falling back to the checkpoint before it")
        if path is None:
            torch.manual_seed(self.config.run.seed)  # nothing draws from it yet; what will, goes on from its checkpoints
            self.model.init_weights(self.config.run.seed)
            self.monitor.start(0)
            return None
        metrics_bytes = checkpoint.load(path, self.state)
        repeat = [source.repeat for source in self.corpus.sources]
        checkpoint.require_fits(path, self.state, self.plan.lanes or 0, repeat, self.plan.rows_per_step)
        loop = self.state.loop
        self.guard.load_state_dict(loop.recent_losses)
        self.monitor.start(self.state.step, metrics_bytes, loop.smoother, loop.total_training_time, loop.skipped)
        return self.state.step


def _all_damaged(run_dir: Path, damaged: list[str]) -> str:
    """What to tell a user whose run has checkpoints, of which none can be used."""
    reasons = "\n".join(f"  - {text}" for text in damaged)
    return (
        f"{run_dir} has checkpoints, and all of them are damaged:\n{reasons}\n"
        "none was touched. Put one back from an archive or a copy; or begin anew with another run.dir (run.resume=never refuses whatever "
        "is a run already); or move the folder checkpoints away to begin anew here"
    )
