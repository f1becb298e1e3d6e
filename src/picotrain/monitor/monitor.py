"""The one thing the loop talks to: it keeps metrics.jsonl, prints, and feeds the trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel

from picotrain.config.schema import Config
from picotrain.contracts import Tracker
from picotrain.errors import Diverged
from picotrain.metrics import METRICS, MetricsFile, plain
from picotrain.monitor.console import Console, banner
from picotrain.monitor.meters import Pace, Smoother, mfu
from picotrain.monitor.slow import SlowSteps
from picotrain.monitor.timing import HostTimer, Timer
from picotrain.monitor.trackers import build_trackers

SILENT_S = 30.0  # without a log line at most, as far as steps end
FIRST_LINES = 3  # steps of a start that are shown in any case: whoever waits sees that it goes, and how fast


class Monitor:
    """Measures and records one run. Every rank has one and sees the same losses; only the main one writes and prints.

    On a device that computes behind the host's back, the values of a step are fetched when the next step is handed in: by
    then the device is busy with that one, so that waiting for the values leaves no gap, and it is waited for no longer than until the
    step before is done. On a CPU they are fetched at once.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        plan: BaseModel,
        *,
        is_main: bool = True,
        rank: int = 0,
        stream: TextIO | None = None,
        now_s: Callable[[], float] = time.perf_counter,
        timer: Timer | None = None,  # of the device; None: by `now_s`
        peak_memory: Callable[[], int | None] = lambda: None,
    ):
        self.run_dir, self.config, self.rank = run_dir, config, rank
        self.plan: dict[str, Any] = plan.model_dump()
        self.skipped = self._skipped_in_row = 0  # updates that were left out
        self.total_training_time_s = 0.0  # of steps alone, without evaluations, samples and saves
        self._smoother, self._pace, self._now_s, self._peak_memory = Smoother(), Pace(), now_s, peak_memory
        self.timer: Timer = timer or HostTimer(now_s)
        self._slow = SlowSteps(on_cpu=self.plan["device"] == "cpu")
        self._shown_s = now_s()  # when the last log line was printed
        self.saving: Callable[[], bool] = lambda: False  # whether a checkpoint is being written in the background
        self._pending: dict[str, Any] | None = None
        self._first_step = 0
        self.disk_full = False
        self._metrics = MetricsFile(run_dir / METRICS) if is_main else None
        self._trackers: list[Tracker] = build_trackers(config.logger.trackers, run_dir, config.model_dump(mode="json")) if is_main else []
        self._console = Console(self.plan["num_steps"], stream) if is_main else None

    # -- life of a run

    def start(
        self,
        step: int,
        metrics_bytes: int = 0,
        smoother: Mapping[str, Any] | None = None,
        total_training_time_s: float = 0.0,
        skipped: int = 0,
    ) -> None:
        """Begin at `step`, with what the checkpoint remembers.

        Steps and measurements in metrics.jsonl beyond `metrics_bytes` are cut off and kept in a file beside it.
        """
        self._first_step = step
        self.total_training_time_s = total_training_time_s
        self.skipped = skipped
        if smoother:
            self._smoother.load_state_dict(smoother)
        if not self._metrics or not self._console:
            return
        cut = self._metrics.truncate_to(metrics_bytes)
        self._console.banner(banner(self.plan, self.config, self.run_dir))
        notes = [f"at step {step:,} of {self.plan['num_steps']:,}"]
        if cut.kept_in:
            notes.append(f"later lines of {METRICS} are kept in {cut.kept_in.name}")
        if cut.missing_bytes:
            notes.append(f"{METRICS} lacks {cut.missing_bytes:,} bytes that the checkpoint knew")
        self.event(step, "resumed" if step or metrics_bytes else "started", "; ".join(notes))

    def smoother_state(self) -> dict[str, Any]:
        """The smoothed loss, for the checkpoint; flush first."""
        return self._smoother.state_dict()

    @property
    def smooth_loss(self) -> float | None:
        """The training loss as it was last shown, smoothed; None before the first step. Flush first."""
        return self._smoother.value

    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl, for the checkpoint; flush first. On disk when this returns; 0 on other ranks than the main one."""
        return self._metrics.size_bytes() if self._metrics else 0

    def close(self) -> None:
        """Give the terminal back and close files; may be called twice. A step that was not fetched is dropped: flush first."""
        self._pending = None
        if self._console:
            self._console.close()
        for tracker in self._trackers:
            self._guard(tracker, tracker.close)
        self._trackers = []
        if self._metrics:
            self._metrics.close()
            self._metrics = None

    # -- what is recorded

    def train_step(self, *, step: int, began: Any, waited: tuple[Any, Any] | None = None, **values: Any) -> None:
        """Record step `step`, begun at `began` and ending now; before it, its rows were waited for from one moment to another (`waited`).
        Moments are marks of the timer. values: loss, lr, lr_factor, grad_norm, data_wait_ms, epoch, pq, rg, `skipped` where the update may
        have been left out, and more; they may be scalars on a device.

        Raises Diverged, on every rank alike, when more than train.max_skipped updates in a row were left out.
        """
        previous, values = self._pending, {"skipped": False, **values}
        collected = self.timer.collect(values)
        spans = [*([waited] if waited else []), (began, self.timer.mark())]
        self._pending = {"step": step, "spans": spans, "collected": collected}
        if previous:
            self._complete(**previous)
        if not self.timer.late:
            self.flush()

    def flush(self) -> None:
        """Fetch and record the step that is still pending. Raises Diverged like `train_step`."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._complete(**pending)

    def val(self, step: int, val_bpb: float, val_loss: float, tokens: int, best_bpb: float | None = None) -> None:
        """A validation; `best_bpb` is the lowest measured before this one."""
        record = self._emit({"step": step, "kind": "val", "val_bpb": val_bpb, "val_loss": val_loss, "tokens": tokens})
        if self._console:
            self._console.val(step, record["val_bpb"], record["val_loss"], tokens, best_bpb)

    def core(self, step: int, record: Mapping[str, Any]) -> None:
        """The CORE metric, as `picotrain.evaluation.core.Core` describes it."""
        clean = self._emit({"step": step, "kind": "core", **record})
        if self._console:
            self._console.core(step, clean)

    def figures(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """What an evaluation of another package has measured."""
        self._emit({"step": step, "kind": kind, **figures})
        if self._console:
            self._console.figures(step, kind, figures)

    def sample(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Samples: {"prompt", "text"}, `text` being what the model wrote after the prompt."""
        self._emit({"step": step, "kind": "sample", "samples": [{"prompt": s["prompt"], "text": s["text"]} for s in samples]})
        if self._console:
            self._console.sample(step, samples)

    def checkpoint(self, step: int, path: Path, seconds: float, stall_s: float | None = None) -> None:
        """A checkpoint that stands in the folder `path`; the loop was held for `stall_s` of the seconds it took."""
        if self._console:
            n_bytes = 0
            with suppress(OSError):  # retention may be faster, and remove it meanwhile
                n_bytes = sum(file.stat().st_size for file in path.iterdir())
            where = str(path.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else path)
            took = {"seconds": round(seconds, 3), "stall_s": round(seconds if stall_s is None else stall_s, 3)}
            self._emit({"step": step, "kind": "checkpoint", "path": where, "bytes": n_bytes, **took})
            self._console.checkpoint(step, where, n_bytes, seconds)

    def event(self, step: int, name: str, message: str = "", shown: bool = True) -> None:
        """Something that happened to the run: started, resumed, stopped, finished, diverged, ... shown: on the console, too."""
        time_utc = datetime.now(UTC).isoformat(timespec="seconds")
        self._emit({"step": step, "kind": "event", "name": name, "message": message, "time": time_utc})
        if self._console and shown:
            self._console.event(step, name, message)

    # -- what is only shown

    def warn(self, message: str) -> None:
        """A line for the person at the console."""
        if self._console:
            self._console.warn(message)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows beside the bar how far an evaluation is."""

        def show(done: int, total: int) -> None:
            if self._console:
                self._console.phase(f"{what} {done}/{total}")
                if not self._console.live and self._line_due():
                    self._console.warn(f"{what} {done}/{total}")

        return show

    # -- inside

    def _complete(self, step: int, spans: Sequence[tuple[Any, Any]], collected: Any) -> None:
        """Fetch a step's values, which waits for the device to end that step, and record it.

        A step lasts as long as the device was at it, or stood still for want of its rows: what the host runs ahead, and when it asks for
        the values, changes nothing.
        """
        values = self.timer.fetch(collected, spans[-1][1])
        loss = float(values["loss"])
        dt_s = sum(self.timer.elapsed_s(first, second) for first, second in spans)
        self.total_training_time_s += dt_s
        slow = ""
        if not values.get("profiled"):
            self._pace.update(dt_s)
            slow = self._slow.update(dt_s, float(values["data_wait_ms"]) / 1000, self.saving())
        left_out = bool(float(values["skipped"]))
        self.skipped += left_out
        self._skipped_in_row = self._skipped_in_row + 1 if left_out else 0
        record = self._train_record(step, dt_s, {**values, "loss": loss, "skipped": self.skipped})
        self._show(record)
        if slow:
            self._event_before_pending(step, "slow_steps", slow)
        if not left_out:
            return
        message = f"the loss is {loss} and the gradient norm {float(values['grad_norm'])} at step {step:,}"
        in_all = f"({self._skipped_in_row} in a row, {self.skipped} in all)"
        self._event_before_pending(step, "skipped_step", f"{message}: the update was left out {in_all}")
        if self._skipped_in_row > self.config.train.max_skipped:
            self._pending = None  # what came after it says nothing
            self.event(step, "diverged", message)
            raise Diverged(
                f"{message}: training has diverged, {self._skipped_in_row} updates in a row were left out. "
                f"Checkpoints are kept. Resume with {self._calmer()}."
            )

    def _event_before_pending(self, step: int, name: str, message: str) -> None:
        """An event of a step that another has followed already: an event flushes, and that step comes after it."""
        pending, self._pending = self._pending, None
        self.event(step, name, message)
        self._pending = pending

    def _calmer(self) -> str:
        """What of the config can still be made calmer, in words."""
        train, warmup = self.config.train, self.config.schedule.warmup_steps
        advice = ["lower rates (optimizer.matrix_lr, embed_lr, head_lr)"]
        if warmup < self.plan["num_steps"]:
            advice.append(f"more schedule.warmup_steps than {warmup:,}")
        advice.append("train.grad_clip=1" if train.grad_clip is None else f"a lower train.grad_clip than {train.grad_clip:g}")
        if self.plan["precision"] != "fp32":
            advice.append("train.precision=fp32")
        return f"{', '.join(advice[:-1])} or {advice[-1]}"

    def _train_record(self, step: int, dt_s: float, values: Mapping[str, Any]) -> dict[str, Any]:
        plan, loss = self.plan, values["loss"]
        tokens, world_size = plan["total_batch_size"], plan["world_size"]
        used = mfu(plan["flops_per_token"], tokens, dt_s, plan["peak_flops"], world_size)
        smooth = self._smoother.update(loss) if math.isfinite(loss) else self._smoother.value
        record = {"step": step, "kind": "train", "loss": loss, "smooth_loss": smooth}
        record |= {key: value for key, value in values.items() if key != "loss"}
        record |= {"tokens": tokens, "tok_per_sec": round(tokens / max(dt_s, 1e-9), 1), "mfu": used and round(used, 5)}
        record |= {"dt_ms": round(dt_s * 1000, 3), "total_training_time_s": round(self.total_training_time_s, 3)}
        return self._emit(record | {"rank": self.rank, "world_size": world_size})

    def _show(self, record: Mapping[str, Any]) -> None:
        if not self._console:
            return
        done, total = record["step"] + 1, self.plan["num_steps"]
        eta_s = self._pace.eta_s(total - done)
        self._console.advance(done, record, eta_s)
        first = record["step"] - self._first_step < FIRST_LINES
        if first or done % self.config.logger.log_every == 0 or done == total or self._line_due():
            self._shown_s = self._now_s()
            self._console.train(record, eta_s, self._peak_memory())

    def _line_due(self) -> bool:
        """Whether nothing was printed for so long that whoever reads a log would wonder; asked again, it counts from now."""
        if self._now_s() - self._shown_s < SILENT_S:
            return False
        self._shown_s = self._now_s()
        return True

    def _emit(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Put a record, as strict JSON, into every sink; what it was turned into is returned."""
        if record["kind"] != "train":
            self.flush()
        clean: dict[str, Any] = plain(record)
        if self._metrics:
            self._metrics.write(clean)
            self._say_disk_full(self._metrics.waiting_lines)
        for tracker in list(self._trackers):
            self._guard(tracker, lambda tracker=tracker: tracker.log(clean))
        return clean

    def _guard(self, tracker: Tracker, action: Callable[[], None]) -> None:
        """A tracker that fails is switched off: it must never cost the run."""
        try:
            action()
        except Exception as error:  # third-party code, which may raise anything
            self._trackers = [other for other in self._trackers if other is not tracker]
            self.warn(f"WARNING: {type(tracker).__name__} failed and is switched off: {type(error).__name__}: {error}")

    def _say_disk_full(self, waiting_lines: int) -> None:
        if waiting_lines and not self.disk_full:
            self.warn(f"WARNING: {METRICS} cannot be written; its lines are kept in memory and written when there is space")
        self.disk_full = waiting_lines > 0
