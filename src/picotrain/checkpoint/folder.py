"""Checkpoint folders as files: which are whole, which is newest or best, what was measured. Without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from picotrain.errors import CheckpointError

PREFIX = "step_"


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"{PREFIX}{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return read_json(path / "state.json")


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    for name, expected in read_json(path / "manifest.json").get("files", {}).items():
        file = path / name
        if Path(name).name != name or not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{path.name} is damaged: {name} is missing or no plain file")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path.name} is damaged: {name} has {file.stat().st_size:,} bytes, not {expected['bytes']:,}")
        if hash_file(file) != expected["xxh3_64"]:
            raise CheckpointError(f"{path.name} is damaged: the content of {name} does not match its hash")


def is_whole(path: Path) -> bool:
    """Whether a folder is a complete checkpoint, by its manifest and the sizes in it (hashes: `verify`)."""
    try:
        files = read_json(path / "manifest.json")["files"]
        return bool(files) and all((path / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (CheckpointError, OSError, KeyError, TypeError):
        return False


def complete(root: Path) -> list[Path]:
    """All complete checkpoints below root, the oldest first."""
    return sorted(path for path in root.glob(f"{PREFIX}*") if path.is_dir() and is_whole(path))


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose hashes match, or None. A damaged one is passed over, and said."""
    folders = sorted((path for path in root.glob(f"{PREFIX}*") if path.is_dir()), reverse=True)
    for path in folders:
        try:
            verify(path)
        except CheckpointError as error:
            say(f"WARNING: {error}; falling back to the checkpoint before it")
            continue
        return path
    return None


def find(root: Path, which: str) -> Path:
    """A checkpoint by name: "last", "best" or a step. Raises CheckpointError naming the steps there are."""
    there = complete(root)
    steps = {int(path.name.removeprefix(PREFIX)): path for path in there}
    listing = ", ".join(map(str, steps)) or "none"
    if which == "last" and there:
        return there[-1]
    if which == "best":
        pointer = root / "best"
        name = pointer.read_text().strip() if pointer.is_file() else ""
        if (root / name) in there:
            return root / name
        raise CheckpointError(f"{root} has no best checkpoint: none was evaluated after its save; complete steps: {listing}")
    if which.isdecimal() and int(which) in steps:
        return steps[int(which)]
    raise CheckpointError(f"{root} has no checkpoint {which!r}; complete steps: {listing}; or last, best")


def record_metrics(root: Path, step: int, metrics: dict[str, Any]) -> None:
    """Keep what was measured at a step beside its checkpoint, if there is one, and point `best` at the lowest val_bpb."""
    path = step_dir(root, step)
    if not is_whole(path):
        return
    write_json(path / "metrics.json", {"step": step, **metrics})
    scored = [(read_metrics(other).get("val_bpb"), other) for other in complete(root)]
    best = min(((bpb, other) for bpb, other in scored if bpb is not None), default=None)
    if best:
        write_pointer(root, "best", best[1])


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a checkpoint, empty when nothing was measured."""
    return read_json(path / "metrics.json") if (path / "metrics.json").is_file() else {}


def write_pointer(root: Path, name: str, target: Path) -> None:
    """Replace a one-line pointer file at once."""
    tmp = root / f".{name}.tmp"
    tmp.write_text(target.name + "\n")
    os.replace(tmp, root / name)


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3_64": hash_file(path)}


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n")
    fsync(tmp)
    os.replace(tmp, path)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
