"""How a training ends: at its last step, by a signal, or by data that cannot be read."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import Literal

from picotrain import invocation, report, terminal
from picotrain.errors import ArchiveBehind, DataError
from picotrain.loop import archiving
from picotrain.loop.saves import Saves
from picotrain.loop.training import Training

AFTER_BAD_DATA = "everything up to here is saved: put the shard right and resume"


@dataclass(frozen=True)
class Outcome:
    """How the loop ended. behind: of rank 0, where the archive lacks the end."""

    status: Literal["finished", "stopped"]
    step: int
    behind: ArchiveBehind | None = None


@dataclass(frozen=True)
class Stop:
    """A stop that all ranks have agreed on, by time.monotonic; failure: what it ends the run with, the same on every rank."""

    agreed_s: float
    failure: DataError | None


def why_stopping(run: Training, unreadable: BaseException | None) -> Stop:
    """Record why the run stops here: a signal, or what some rank could not read. A bug in the loader is raised at once."""
    if unreadable is not None and not isinstance(unreadable, DataError):
        raise unreadable
    agreed_s = time.monotonic()
    reasons = [text for text in run.parallel.gather(str(unreadable) if unreadable else None) if text]
    name, message = ("bad_data", reasons[0]) if reasons else ("stopped", "asked to by a signal")
    run.event(name, f"{message}; saving")
    return Stop(agreed_s, DataError(f"{message}\n{_after_bad_data(run)}") if reasons else None)


def _after_bad_data(run: Training) -> str:
    """What to do about a shard that cannot be read; where such are passed over already, nothing readable was left."""
    skip = f", or pass over it: picotrain resume {shlex.quote(invocation.shown(run.dir))} data.on_bad_shard=skip"
    return AFTER_BAD_DATA + ("" if run.config.data.on_bad_shard == "skip" else skip)


def end(run: Training, saves: Saves, stopped: Stop | None = None) -> Outcome:
    """Close the books: the last save, the last lines, the report, the archive. Raises what the run was stopped by, unless a signal."""
    status, failure = ("stopped", stopped.failure) if stopped else ("finished", None)
    run.loader.close()
    saves.finish()
    run.profiler.finish(run.state.step)
    if stopped is None:
        run.event(status)
    elif failure is None:
        took_s = time.monotonic() - (run.stop.requested_s or stopped.agreed_s)  # the signal may have been another rank's
        run.event(status, f"whole on disk {took_s:.2f} s after the signal")
    run.monitor.close()
    if run.parallel.is_main:
        try:
            summary = report.write_report(run.dir)
        finally:
            saves.require()  # somebody may have removed the folder since it was saved
        terminal.tell(terminal.plain(lambda stream: report.console_summary(summary, stream)), lambda: report.console_summary(summary))
    run.watchdog.close()
    behind = None
    if run.archive:
        behind = archiving.finish(run.archive, run.dir, run.config, run.state.step, stopped is not None, lambda: run.stop.requested)
    if failure:
        run.parallel.barrier()  # the first rank that raises ends the others, and one of them writes the report
        raise failure
    return Outcome(status, run.state.step, behind)
