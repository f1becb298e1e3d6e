"""Where a corpus is made: the folder itself and the two beside it that come and go. None of them may be somebody else's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picotrain import lock
from picotrain.data.corpus import MANIFEST, ORIGIN
from picotrain.disk import find_json
from picotrain.errors import DataError

INPUTS = "inputs.json"  # every input file with its size and hash, beside origin.json
SKIPPED = "skipped.jsonl"  # what was left out and why, if anything was
WORK, KEY = "work", "key.json"  # in the unfinished folder: what goes before it is finished

Say = Callable[[str], None]


def silent(_message: str) -> None:
    """Say nothing."""


@contextmanager
def locked(path: Path, say: Say = silent) -> Generator[None]:
    """Hold `path` against other processes; `say` is told when that takes waiting. Raises DataError."""
    told = False

    def wait() -> None:
        nonlocal told
        if not told:
            say(f"waiting for another process that makes {path}")
            told = True
        time.sleep(lock.LOOK_S)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written: {error.strerror}") from error
    with lock.locked(path, wait):
        yield


def check_place(out: Path) -> Path:
    """Where the unfinished corpus of the folder `out` is made. Raises DataError where a file that picotrain did not make would be lost."""
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    problems = [problem for problem in (_of_corpus(out), _of_unfinished(partial), _of_corpus(old)) if problem]
    if problems:
        raise DataError("; ".join(problems) + "; name another folder, or move it away")
    return partial


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`; an older one is moved away first and then removed."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _names(folder: Path) -> set[str] | None:
    """What is in a folder that may not be there; None where it is no folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return None
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _of_corpus(folder: Path) -> str:
    """Why a folder cannot be replaced by a corpus; "" where it can."""
    if (there := _names(folder)) is None:
        return f"{folder} is there and was not made by picotrain: it is no folder"
    origin = find_json(folder / ORIGIN) or {}
    if there and not _is_ours(origin):
        return f"{folder} is there and was not made by picotrain"
    shards = origin.get("shards")
    own = {ORIGIN, MANIFEST, INPUTS, SKIPPED, *(shards if isinstance(shards, dict) else ())}
    foreign = sorted(name for name in there - own if not name.startswith(f".{MANIFEST}."))
    return f"{folder} also holds {foreign[0]!r}, which picotrain did not make and would remove" if foreign else ""


def _of_unfinished(folder: Path) -> str:
    """Why a folder cannot be the unfinished one of an earlier call; "" where it can."""
    if (there := _names(folder)) is None:
        return f"{folder} is there and was not made by picotrain: it is no folder"
    begun = not {name for name in there if not name.startswith(f".{KEY}.")}
    ours = begun or _is_ours(find_json(folder / KEY)) or _is_ours(find_json(folder / ORIGIN))
    return "" if ours else f"{folder} is there and was not made by picotrain"


def _is_ours(found: dict[str, Any] | None) -> bool:
    return found is not None and isinstance(found.get("identity"), str)
