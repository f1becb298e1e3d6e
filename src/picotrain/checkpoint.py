"""Checkpoints: open formats, written under a temporary name and renamed when whole, verified before they are used.

    checkpoints/step_00001000/
      model-00001-of-00001.safetensors + model.safetensors.index.json    weights, as `transformers` shards them
      optimizer-00001-of-00001.safetensors + optimizer.safetensors.index.json
      state.json       step, loader lanes, loop state, RNG, length of metrics.jsonl
      manifest.json    size and xxh3 hash of every file above; written last
      metrics.json     what was measured at this step after the save; outside the manifest
    checkpoints/latest, checkpoints/best    one-line text files naming a step directory

A folder whose manifest is missing or does not match is not a checkpoint. Nothing that is loaded is a pickle.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from picotrain.errors import CheckpointError
from picotrain.state import LoopState, TrainState, load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors

SHARD_BYTES = 5 * 10**9  # the Hub's usual size: one file for models up to about 1 B parameters
PREFIX = "step_"


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"{PREFIX}{step:08d}"


def save(root: Path, state: TrainState, metrics_bytes: int) -> Path:
    """Write the checkpoint of `state.step` below root and point `latest` at it; call on one rank only.

    Files are written and flushed to disk under a temporary name, the manifest last, then the folder is renamed: a crash
    at any moment leaves the previous checkpoints whole and no half one under a step's name.
    """
    final = step_dir(root, state.step)
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    tmp = root / f".tmp-{final.name}"
    tmp.mkdir()
    _save_tensors(tmp, "model", model_tensors(state.model))
    _save_tensors(tmp, "optimizer", optimizer_tensors(state.model, state.optimizer))
    scalars = {
        "step": state.step,
        "val_bpb": state.loop.val_bpb,
        "val_bpb_step": state.loop.val_bpb_step,
        "dataloader_state_dict": state.loader,
        "loop_state": asdict(state.loop),
        "rng": {"torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()},
        "metrics_bytes": metrics_bytes,
    }
    _write_json(tmp / "state.json", scalars)
    _write_json(tmp / "manifest.json", {"files": {path.name: _describe(path) for path in sorted(tmp.iterdir())}})
    _fsync(tmp)
    if final.exists():  # a damaged one of the same step: a whole one is never written twice
        shutil.rmtree(final)
    tmp.rename(final)
    _fsync(root)
    write_pointer(root, "latest", final)
    return final


def load(path: Path, state: TrainState) -> int:
    """Put a verified checkpoint into state, in place; returns the length of metrics.jsonl when it was saved.

    Raises CheckpointError on a checkpoint that is damaged or belongs to another model.
    """
    verify(path)
    load_model_tensors(state.model, load_tensors(path, "model"))
    load_optimizer_tensors(state.model, state.optimizer, load_tensors(path, "optimizer"))
    scalars = read_state(path)
    state.step = scalars["step"]
    state.loader = scalars["dataloader_state_dict"]
    state.loop = LoopState(**scalars["loop_state"])
    torch.set_rng_state(torch.tensor(list(base64.b64decode(scalars["rng"]["torch"])), dtype=torch.uint8))
    return scalars["metrics_bytes"]


def load_tensors(path: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part ("model" or "optimizer") by name, on the CPU."""
    index = _read_json(path / f"{part}.safetensors.index.json")
    names = sorted(set(index["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{path}: the index of {part} names a file outside the checkpoint: {names}")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name} cannot be read as safetensors: {error}") from error
    return tensors


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return _read_json(path / "state.json")


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    for name, expected in _read_json(path / "manifest.json").get("files", {}).items():
        file = path / name
        if Path(name).name != name or not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{path.name} is damaged: {name} is missing or no plain file")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path.name} is damaged: {name} has {file.stat().st_size:,} bytes, not {expected['bytes']:,}")
        if _hash(file) != expected["xxh3_64"]:
            raise CheckpointError(f"{path.name} is damaged: the content of {name} does not match its hash")


def is_whole(path: Path) -> bool:
    """Whether a folder is a complete checkpoint, by its manifest and the sizes in it (hashes: `verify`)."""
    try:
        files = _read_json(path / "manifest.json")["files"]
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
    _write_json(path / "metrics.json", {"step": step, **metrics})
    scored = [(read_metrics(other).get("val_bpb"), other) for other in complete(root)]
    best = min(((bpb, other) for bpb, other in scored if bpb is not None), default=None)
    if best:
        write_pointer(root, "best", best[1])


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a checkpoint, empty when nothing was measured."""
    return _read_json(path / "metrics.json") if (path / "metrics.json").is_file() else {}


def write_pointer(root: Path, name: str, target: Path) -> None:
    """Replace a one-line pointer file at once."""
    tmp = root / f".{name}.tmp"
    tmp.write_text(target.name + "\n")
    os.replace(tmp, root / name)


def _save_tensors(folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    pattern = part + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    weight_map = {}
    count = len(split.filename_to_tensors)
    for i, names in enumerate(split.filename_to_tensors.values(), start=1):
        # The name always carries the count, so that one shard and many are found the same way.
        file = f"{part}-{i:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name].detach().cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        _fsync(folder / file)
        weight_map |= {name: file for name in names}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(folder / f"{part}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3_64": _hash(path)}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n")
    _fsync(tmp)
    os.replace(tmp, path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
