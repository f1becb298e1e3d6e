"""Checkpoint folders as files: which are whole, which is newest or best, what was measured. Without torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from picotrain import disk
from picotrain.disk import read_plain
from picotrain.errors import CheckpointError
from picotrain.metrics import plain

M = TypeVar("M", bound=BaseModel)
PREFIX = "step_"
DAMAGED = "damaged-"  # what stood in the place of a checkpoint that is saved again
PARTS = ("model", "optimizer")
MAX_POINTER_BYTES = 1000

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]{0,199}", name):
        raise ValueError("it must be the plain name of a file, which cannot be outside the checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]


class FileEntry(BaseModel):
    """What is known of one file of a checkpoint."""

    bytes: Count
    xxh3_64: Annotated[str, Field(strict=True)]


class Manifest(BaseModel):
    """manifest.json: every file that belongs to a checkpoint."""

    files: Annotated[dict[FileName, FileEntry], Field(min_length=1)]


class Index(BaseModel):
    """The index of a part: which file holds which tensor."""

    weight_map: dict[str, FileName]


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"{PREFIX}{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return read_json(path / "state.json")


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path.name} is damaged: it is no folder")
    for file in path.iterdir() if path.is_dir() else ():
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{path.name} is damaged: {file.name} is no plain file")
    for name, expected in read_manifest(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path.name} is damaged: {name} is missing or no plain file")
        if file.stat().st_size != expected.bytes:
            raise CheckpointError(f"{path.name} is damaged: {name} has {file.stat().st_size:,} bytes, not {expected.bytes:,}")
        if disk.content_hash(file) != expected.xxh3_64:
            raise CheckpointError(f"{path.name} is damaged: the content of {name} does not match its hash")


def require_parts(path: Path) -> None:
    """Raise CheckpointError unless the manifest lists all that a training goes on from, so that `verify` has looked at it."""
    listed, needed = read_manifest(path).keys(), {"state.json"}
    for part in PARTS:
        index = f"{part}.safetensors.index.json"
        needed |= {index, *(checked(Index, path / index).weight_map.values() if index in listed else ())}
    if lacking := sorted(needed - listed):
        raise CheckpointError(f"{path.name} is damaged: {', '.join(lacking)[:200]} is not listed in its manifest.json")


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """The files of a checkpoint by name. Each name is a plain one. Raises CheckpointError."""
    if path.is_symlink():
        raise CheckpointError(f"{path.name} is a symlink, and a checkpoint is a folder")
    return checked(Manifest, path / "manifest.json").files


def checked(model: type[M], path: Path) -> M:
    """A JSON file of a checkpoint as `model` describes it. Raises CheckpointError that names the place of what is wrong."""
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:120]
        found = "" if first["type"] == "missing" else f", not {first['input']!r:.40}"
        raise CheckpointError(f"{path} is damaged: {place}: {first['msg'][0].lower()}{first['msg'][1:]}{found}") from None


def is_whole(path: Path) -> bool:
    """Whether a folder is a complete checkpoint, by its manifest and the sizes in it (hashes: `verify`)."""
    try:
        return all((path / name).lstat().st_size == expected.bytes for name, expected in read_manifest(path).items())
    except (CheckpointError, OSError):
        return False


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or damaged, as its files tell: anything else is somebody's."""
    if path.is_symlink() or not path.is_dir():
        return False
    there = {file.name for file in path.iterdir()}
    return not there or bool(there & {"state.json", "manifest.json"}) or any(name.endswith(".safetensors") for name in there)


def complete(root: Path) -> list[Path]:
    """All complete checkpoints below root, the oldest first."""
    return [path for path in _named(root) if is_whole(path)]


def _named(root: Path) -> list[Path]:
    """Everything below root that is named as checkpoints are, whatever it is, the oldest first."""
    named = (path for path in root.glob(f"{PREFIX}*") if re.fullmatch(PREFIX + "[0-9]{1,18}", path.name))
    return sorted(named, key=lambda path: (int(path.name.removeprefix(PREFIX)), path.name))


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole and whose hashes match, or None. say: told what is wrong with each that is passed over."""
    for path in reversed(_named(root)):
        try:
            verify(path)
            require_parts(path)
        except CheckpointError as error:
            say(str(error))
            continue
        return path
    return None


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that its place is free and nothing is lost."""
    aside, number = path.with_name(f"{DAMAGED}{path.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{DAMAGED}{path.name}-{number}")
    os.rename(path, aside)
    return aside


def find(root: Path, which: str) -> Path:
    """A checkpoint by name: "last", "best" or a step. Raises CheckpointError naming the steps there are."""
    there = complete(root)
    steps = {int(path.name.removeprefix(PREFIX)): path for path in there}
    listing = ", ".join(map(str, steps)) or "none"
    if which == "last" and there:
        return there[-1]
    if which == "best":
        name = read_pointer(root / "best")
        if named := [path for path in there if path.name == name]:
            return named[0]
        raise CheckpointError(f"{root} has no best checkpoint: none was evaluated after its save; complete steps: {listing}")
    if which.isdecimal() and int(which) in steps:
        return steps[int(which)]
    raise CheckpointError(f"{root} has no checkpoint {which!r}; complete steps: {listing}; or last, best")


def record_metrics(root: Path, step: int, metrics: dict[str, Any]) -> None:
    """Keep what was measured at a step beside its checkpoint, if there is one, and point `best` at the lowest val_bpb."""
    path = step_dir(root, step)
    if not is_whole(path):
        return
    try:
        before = read_metrics(path)
    except CheckpointError:  # a damaged note
        before = {}
    write_json(path / "metrics.json", {**before, "step": step, **metrics})
    scored = [(_val_bpb(other), other) for other in complete(root)]
    best = min(((bpb, other) for bpb, other in scored if bpb is not None), default=None)
    if best:
        write_pointer(root, "best", best[1])


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a checkpoint, empty when nothing was measured."""
    return read_json(path / "metrics.json") if (path / "metrics.json").is_file() else {}


def _val_bpb(path: Path) -> float | None:
    """What a checkpoint scored; None when that is not known, for a damaged note must not end a training."""
    try:
        found = read_metrics(path).get("val_bpb")
    except CheckpointError:
        return None
    return float(found) if isinstance(found, float) and math.isfinite(found) else None


def read_pointer(path: Path) -> str:
    """The name in a one-line file, "" when there is none or it holds none."""
    try:
        return read_plain(path, MAX_POINTER_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def write_pointer(root: Path, name: str, target: Path) -> None:
    """Replace a one-line pointer file at once."""
    disk.write_whole(root / name, target.name + "\n", _put)


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size in bytes and its hash."""
    return {"bytes": path.stat().st_size, "xxh3_64": disk.content_hash(path)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where there is none."""
    try:
        return disk.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to disk, whole or not at all."""
    disk.write_json(path, plain(value), _put)


def _put(tmp: Path, path: Path) -> None:
    """Give a file its name. A folder that somebody has put there is set aside. The run must not fail for it, nor its content go."""
    try:
        os.replace(tmp, path)
    except IsADirectoryError:
        set_aside(path)
        os.replace(tmp, path)
