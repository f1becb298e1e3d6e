"""An archived run, fetched into an empty folder."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from picotrain.checkpoint.archive.remote import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    OWNER,
    Remote,
    by_step,
    escapes,
    is_mirrored,
    manifest_sizes,
    open_remote,
    steps_in,
)
from picotrain.checkpoint.folder import verify, write_pointer
from picotrain.config.places import overlap
from picotrain.data.remote.errors import Missing, retry
from picotrain.errors import CheckpointError, DataError, RunError
from picotrain.lock import LOCK_FILE
from picotrain.text import size

STAGING = ".restoring"  # what has been fetched so far, inside the run directory

Say = Callable[[str], None]
T = TypeVar("T")


def restore(url: str, run_dir: Path, say: Say) -> Path:
    """Fetch the archived run at `url` with its newest whole checkpoint into `run_dir`, which is absent or empty; returns it.

    A checkpoint that is not whole, or whose files do not match the hashes of its manifest, is passed over, and that is said. An
    interrupted restore is begun again. Raises RunError when there is no archive, when it cannot be read or names a file outside, and when
    run_dir is not empty. Raises CheckpointError when it has checkpoints and none is whole.
    """
    remote = open_remote(url, threading.Event())
    if how := overlap(url, run_dir):
        raise RunError(f"archive {remote.shown} {how}, {run_dir}; name another folder")
    if run_dir.exists() and (not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} - {LOCK_FILE, STAGING}):
        raise RunError(f"{run_dir} is not empty; name another folder, or `picotrain resume {run_dir}` if it holds the run already")
    staging = run_dir / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _Restore(remote, staging, say).everything()
        # config.yaml last: it is what makes a folder a run.
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, run_dir / path.name)
    except DataError as error:
        raise RunError(f"archive {error}") from error
    except OSError as error:
        raise RunError(f"{run_dir} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            run_dir.rmdir()  # when nothing came of it and nothing was there
    return run_dir


class _Restore:
    def __init__(self, remote: Remote, folder: Path, say: Say):
        self._remote, self._folder, self._say = remote, folder, say
        self._there = self._retried(remote.sizes, remote.shown)
        if outside := sorted(name for name in self._there if escapes(name)):
            raise RunError(
                f"archive {remote.shown} names files outside of its folder, and is refused: {', '.join(map(ascii, outside[:3]))}"
            )
        if CONFIG not in self._there:
            raise RunError(f"there is no archived run at {remote.shown} (no {CONFIG}); the URL is that of the run's own folder")

    def everything(self) -> None:
        for name in self._there:
            if is_mirrored(name) or name == OWNER:
                self._fetch(name)
        candidates = by_step(step for step in steps_in(self._there) if f"{CHECKPOINTS}/{step}/{MANIFEST}" in self._there)
        for step in reversed(candidates):
            try:
                self._checkpoint(step)
            except (CheckpointError, Missing) as error:
                self._say(f"WARNING: in the archive {error}; falling back to the checkpoint before it")
                shutil.rmtree(self._folder / CHECKPOINTS / step, ignore_errors=True)
                continue
            return self._point_at(step)
        if candidates:
            raise CheckpointError(f"archive {self._remote.shown}: none of its checkpoints is whole ({', '.join(candidates)})")
        self._say(f"archive {self._remote.shown} has no checkpoint yet: the run begins at step 0")

    def _checkpoint(self, step: str) -> None:
        """Fetch a checkpoint. Raises CheckpointError when it is not what its manifest says; nothing is fetched for one whose
        sizes tell so."""
        folder = f"{CHECKPOINTS}/{step}"
        if self._there[f"{folder}/{MANIFEST}"] > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{step} is damaged: its {MANIFEST} has {size(self._there[f'{folder}/{MANIFEST}'])}")
        self._fetch(f"{folder}/{MANIFEST}")
        wanted = manifest_sizes(step, (self._folder / folder / MANIFEST).read_bytes())
        for name, count in wanted.items():
            there = self._there.get(f"{folder}/{name}")
            if there != count:
                has = "is missing" if there is None else f"has {there:,} bytes, not {count:,}"
                raise CheckpointError(f"{step} is damaged: {name} {has}")
        self._say(f"fetching {step} ({size(sum(wanted.values()))})")
        for name in wanted:
            self._fetch(f"{folder}/{name}")
        verify(self._folder / folder)
        if f"{folder}/metrics.json" in self._there:
            self._fetch(f"{folder}/metrics.json")

    def _point_at(self, step: str) -> None:
        """`best` stays when it is this one; else the run has none until it measures one."""
        root = self._folder / CHECKPOINTS
        write_pointer(root, "latest", root / step)
        best = f"{CHECKPOINTS}/best"
        if best in self._there:
            text = self._retried(lambda: self._remote.content(best), self._remote.where(best)).decode(errors="replace")
            if text.strip() == step:
                write_pointer(root, "best", root / step)

    def _fetch(self, name: str) -> None:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._retried(lambda: self._remote.fetch(name, target), self._remote.where(name))

    def _retried(self, attempt: Callable[[], T], where: str) -> T:
        return retry(attempt, where, threading.Event(), self._say, lambda: 0)
