"""A run and its archive: begun with the run, its trouble among the run's events, and waited for at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from picotrain import report
from picotrain.config import Config
from picotrain.errors import ArchiveBehind, RunError
from picotrain.metrics import METRICS, MetricsFile
from picotrain.terminal import say

if TYPE_CHECKING:
    from picotrain.checkpoint.archive import Archive, Note

FAILED_CLOSE_S = 30.0  # what an archive gets to finish in when the run ends by an error


def start(config: Config, run_dir: Path) -> Archive | None:
    """The archive that a config names, mirroring. Raises RunError for what no later attempt would mend."""
    section = config.archive
    if section.url is None:
        return None
    from picotrain.checkpoint.archive import Archive  # much code, for runs that have one

    # Its thread speaks when it likes, also after the console is closed.
    archive = Archive(
        section.url, run_dir, interval_s=section.interval_s, min_age_s=section.min_age_s, keep_last=section.keep_last, say=say
    )  # fmt: skip
    archive.start()
    return archive


def record(run_dir: Path, step: int, notes: Sequence[Note]) -> None:
    """Append what happened to an archive to a metrics.jsonl that nobody else writes any more."""
    if not notes:
        return
    with suppress(RunError):  # the disk is full, which was said
        file = MetricsFile(run_dir / METRICS)
        for note in notes:
            time_utc = datetime.now(UTC).isoformat(timespec="seconds")
            file.write({"step": step, "kind": "event", "name": note.name, "message": note.message, "time": time_utc})
        file.close()


def close(archive: Archive, run_dir: Path, config: Config, step: int) -> None:
    """After an error; behind `finish` it does nothing but record what the archive has still to tell."""
    archive.close(min(config.archive.close_s, FAILED_CLOSE_S))
    record(run_dir, step, archive.poll())


def finish(
    archive: Archive, run_dir: Path, config: Config, step: int, stopped: bool, asked_to_end: Callable[[], bool]
) -> ArchiveBehind | None:
    """Wait until the archive has the end of a run whose report is written, and stop it; the error where it has not.

    After a signal the launcher leaves us launch.grace_s in all, half of which is for this. What happened meanwhile goes into
    metrics.jsonl and the report, and from there into the archive, too.
    """
    from picotrain.checkpoint.archive import FAILED

    share_s = config.launch.grace_s / 2
    limit_s = min(config.archive.close_s, share_s if stopped else math.inf)

    hurry = None if stopped else lambda: share_s if asked_to_end() else None  # a second signal ends at once
    done = archive.flush(limit_s, hurry)
    if notes := archive.poll():
        told = report.summarise(report.read_run(run_dir))["archive_trouble"]
        record(run_dir, step, notes)
        if told or any(note.name == FAILED for note in notes):
            report.write_report(run_dir)
        done = done and archive.flush(limit_s, hurry)
    archive.stop()
    if done:
        return None
    why = archive.last_error or "it was not done in time"
    ended = "stopped and saved" if stopped else "finished"
    return ArchiveBehind(
        f"the run is {ended}, but archive {archive.shown} lacks its end ({why}); {run_dir} has everything: before this machine goes, "
        f"`picotrain resume {run_dir}` or copy it by other means"
    )


def complete(config: Config, run_dir: Path, step: int) -> None:
    """Bring the archive of a finished run up to date. Raises ArchiveBehind where that fails, RunError where it cannot be."""
    if archive := start(config, run_dir):
        if behind := finish(archive, run_dir, config, step, stopped=False, asked_to_end=lambda: False):
            raise behind
        say(f"archive {archive.shown} has everything")
