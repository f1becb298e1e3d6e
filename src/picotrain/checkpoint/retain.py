"""Which checkpoints stay. A folder is renamed before it is removed: a crash half-way leaves no half one under a step's name."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from picotrain.checkpoint.folder import PREFIX, complete, read_json, read_pointer
from picotrain.config.schema import CheckpointConfig

TRASH, TEMPORARY = ".trash-", ".tmp-"


def retain(root: Path, section: CheckpointConfig) -> None:
    """Remove what the rules of `section` do not keep. The newest whole checkpoint and what `best` names always stay.

    A rolling checkpoint is kept only while it is the newest whole one of all. Of permanent ones the newest keep_last are kept (None:
    all), and those whose step is a multiple of keep_every.
    """
    there = complete(root)
    if not there:
        return
    permanent = [path for path in there if not is_rolling(path)]
    kept = {there[-1], *(permanent if section.keep_last is None else permanent[-section.keep_last :])}
    if section.keep_every:
        kept |= {path for path in permanent if step_of(path) % section.keep_every == 0}
    if section.keep_best:
        kept |= {root / read_pointer(root / "best")}
    for path in there:
        if path not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; what cannot be removed now goes at the next `sweep`."""
    with suppress(OSError):
        trash = path.with_name(f"{TRASH}{path.name}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what earlier processes left half-written or half-removed."""
    for pattern in (f"{TEMPORARY}*", f"{TRASH}*"):
        for stale in root.glob(pattern):
            shutil.rmtree(stale, ignore_errors=True)


def is_rolling(path: Path) -> bool:
    """Whether a whole checkpoint is only kept until the next one."""
    return read_json(path / "manifest.json").get("rolling") is True


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))
