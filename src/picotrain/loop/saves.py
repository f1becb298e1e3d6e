"""What a run saves, and what becomes of it: checkpoints, their lines, their last resort, and the data that was passed over."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain

from picotrain import checkpoint
from picotrain.data.lanes import merge_states
from picotrain.errors import RunError
from picotrain.loop.training import Training
from picotrain.metrics import METRICS, read_metrics


class Saves:
    """The saves of a training. Every rank has one and calls the same; rank 0 writes."""

    def __init__(self, run: Training):
        self._run, self._saver, self._root = run, run.saver, run.dir / "checkpoints"
        self._saved_step = run.resumed_step
        self._told: set[str] | None = None  # what was passed over and is recorded; None: not looked up yet
        if run.config.data.on_bad_shard == "skip":
            self._tell_skipped({text for corpus in run.corpus.corpora for text in corpus.files.missing(corpus.shards)})

    def rolling_due(self) -> bool:
        """Whether this rank, the one that saves, wants a rolling checkpoint; says what became of earlier saves."""
        self._report()
        return self._saver is not None and self._saver.rolling_due

    def save(self, permanent: bool) -> None:
        """Begin a checkpoint of this step, which rank 0 writes in the background; one that is there becomes permanent if that is due."""
        step = self._run.state.step
        if step != self._saved_step:
            self._begin(rolling=not permanent)
            self._saved_step = step
        elif permanent and self._saver:
            self._saver.keep(step)

    def _begin(self, rolling: bool) -> None:
        run, loop, monitor = self._run, self._run.state.loop, self._run.monitor
        monitor.flush()  # no line of a step that the checkpoint holds may be missing from metrics.jsonl
        run.state.loader = merge_states(run.parallel.gather(run.state.loader))
        self._tell_skipped(set(chain.from_iterable(run.parallel.gather(run.loader.skipped()))))
        loop.smoother, loop.smooth_train_loss = monitor.smoother_state(), monitor.smooth_loss
        loop.total_training_time = monitor.total_training_time_s
        loop.skipped, loop.recent_losses = monitor.skipped, run.guard.state_dict()
        if self._saver:
            try:
                self._saver.save(run.state, monitor.metrics_bytes(), rolling)
            except RunError as error:  # metrics.jsonl cannot be written: the disk is full
                self._saver.put_off()
                run.event("save_failed", str(error))

    def record(self, **metrics: object) -> None:
        """Keep beside this step's checkpoint what was measured, once that is whole."""
        if self._saver:
            self._saver.wait()
            checkpoint.record_metrics(self._root, self._run.state.step, metrics)

    def finish(self) -> None:
        """Wait for the last save. Where it failed, try once more, then elsewhere; RunError says where it is."""
        if not self._saver:
            return
        self._saver.wait()
        self._report()
        if self._is_there():
            return self._saver.tidy()  # an earlier process may have been killed before it did
        self._saver.save(self._run.state, self._metrics_bytes())
        self._saver.wait()
        self._report()
        self.require()

    def require(self) -> None:
        """Where this step's checkpoint is not there, or no longer, save it elsewhere and raise RunError, which says where it is."""
        if not self._saver or self._is_there():
            return
        run, step = self._run, self._run.state.step
        why = f"{checkpoint.step_dir(self._root, step)} cannot be written" if run.dir.is_dir() else f"{run.dir} is gone"
        try:
            elsewhere = self._saver.rescue(run.state, self._metrics_bytes())
        except OSError as error:
            there = checkpoint.complete(self._root)
            left = f"{there[-1].name} is the last whole checkpoint" if there else "no checkpoint of the run is left"
            raise RunError(f"{why}, nor can the temporary folder ({error}): step {step:,} is lost, {left}") from error
        how = "free space, move it there" if run.dir.is_dir() else "move it into the checkpoints of a run of the same config.yaml"
        raise RunError(f"{why}; step {step:,} was saved as {elsewhere} instead: {how} and resume")

    def _is_there(self) -> bool:
        return checkpoint.is_whole(checkpoint.step_dir(self._root, self._run.state.step))

    def _metrics_bytes(self) -> int:
        monitor = self._run.monitor
        return 0 if monitor.disk_full else monitor.metrics_bytes()

    def _report(self) -> None:
        """Record what became of saves, and what the archive has to tell."""
        run = self._run
        for saved in self._saver.poll() if self._saver else []:
            if saved.error:
                run.monitor.event(saved.step, "save_failed", f"{saved.error}; training goes on, the next save tries again")
            else:
                run.monitor.checkpoint(saved.step, saved.path, saved.seconds, saved.stall_s)
                if run.archive:
                    run.archive.wake()
        for note in run.archive.poll() if run.archive else []:
            run.event(*note, shown=False)  # its thread has said it

    def _tell_skipped(self, texts: set[str]) -> None:
        """Record data that was passed over, once: every epoch and every resume meets it again."""
        if not texts or not self._run.parallel.is_main:
            return
        if self._told is None:
            self._told = set()
            with suppress(RunError):  # a damaged line costs at most an event that is there twice
                events = (line for line in read_metrics(self._run.dir / METRICS) if line.get("name") == "skipped_data")
                self._told.update(str(line.get("message")) for line in events)
        for text in sorted(texts - self._told):
            self._run.event("skipped_data", text)
        self._told |= texts
