"""Where a corpus is made: the folder itself and the two beside it that come and go. None of them may be somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from picotrain.data.corpus import MANIFEST, ORIGIN
from picotrain.disk import find_json
from picotrain.errors import DataError

INPUTS = "inputs.json"  # every input file with its size and hash, beside origin.json
SKIPPED = "skipped.jsonl"  # what was left out and why, if anything was
WORK, KEY = "work", "key.json"  # in the unfinished folder: what goes before it is finished


def check_place(out: Path) -> Path:
    """Where the unfinished corpus of the folder `out` is made. Raises DataError where a file that picotrain did not make would be lost."""
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    problems = [problem for problem in (_of_corpus(out), _of_unfinished(partial), _of_corpus(old)) if problem]
    if problems:
        raise DataError("; ".join(problems) + "; name another folder, or move it away")
    return partial


def _of_corpus(folder: Path) -> str:
    """Why a folder cannot be replaced by a corpus; "" where it can."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return f"{folder} is there and was not made by picotrain: it is no folder"
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there:
        return ""
    origin = find_json(folder / ORIGIN)
    if origin is None or not _is_ours(origin):
        return f"{folder} is there and was not made by picotrain"
    shards = origin.get("shards")
    own = {ORIGIN, MANIFEST, INPUTS, SKIPPED, *(shards if isinstance(shards, dict) else ())}
    foreign = sorted(name for name in there - own if not name.startswith(f".{MANIFEST}."))
    return f"{folder} also holds {foreign[0]!r}, which picotrain did not make and would remove" if foreign else ""


def _of_unfinished(folder: Path) -> str:
    """Why a folder cannot be the unfinished one of an earlier call; "" where it can."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return f"{folder} is there and was not made by picotrain: it is no folder"
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    begun = not {name for name in there if not name.startswith(f".{KEY}.")}
    if begun or _is_ours(find_json(folder / KEY)) or _is_ours(find_json(folder / ORIGIN)):
        return ""
    return f"{folder} is there and was not made by picotrain"


def _is_ours(found: dict[str, Any] | None) -> bool:
    return found is not None and isinstance(found.get("identity"), str)
