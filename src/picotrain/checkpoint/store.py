"""TrainState -> files of a checkpoint, and back."""

from __future__ import annotations

import base64
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from picotrain.checkpoint.folder import describe, fsync, read_json, read_state, step_dir, verify, write_json, write_pointer
from picotrain.errors import CheckpointError
from picotrain.state import LoopState, TrainState, load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors

SHARD_BYTES = 5 * 10**9  # the Hub's usual size: one file for models up to about 1 B parameters


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
    write_json(tmp / "state.json", scalars)
    write_json(tmp / "manifest.json", {"files": {path.name: describe(path) for path in sorted(tmp.iterdir())}})
    fsync(tmp)
    if final.exists():  # a damaged one of the same step: a whole one is never written twice
        shutil.rmtree(final)
    tmp.rename(final)
    fsync(root)
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
    index = read_json(path / f"{part}.safetensors.index.json")
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


def _save_tensors(folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    pattern = part + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    weight_map = {}
    count = len(split.filename_to_tensors)
    for i, names in enumerate(split.filename_to_tensors.values(), start=1):
        # The name always carries the count, so that one shard and many are found the same way.
        file = f"{part}-{i:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name].detach().cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        fsync(folder / file)
        weight_map |= {name: file for name in names}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / f"{part}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
