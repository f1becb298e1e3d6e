"""Files of a checkpoint -> TrainState. Whatever stands in them is checked before it is used, and nothing is a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Base64Bytes, BaseModel, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from picotrain.checkpoint.folder import Count, FileName, checked, read_manifest, verify
from picotrain.errors import CheckpointError
from picotrain.state import LoopState, TrainState, load_model_tensors, load_optimizer_tensors

Cursor = tuple[Annotated[int, Field(strict=True, ge=-1, le=2**53)], Count, Count, Count]


class Index(BaseModel):
    """The index of a part: which file holds which tensor."""

    weight_map: dict[str, FileName]


class StreamState(BaseModel):
    """Where the data stream stands, see `picotrain.data.lanes`."""

    row: Count
    lanes_count: Annotated[int, Field(strict=True, ge=1, le=2**20)]
    lanes: list[list[Cursor]]

    @model_validator(mode="after")
    def _fits(self) -> StreamState:
        if len(self.lanes) != self.lanes_count or len({len(cursors) for cursors in self.lanes}) != 1:
            raise ValueError("the lanes do not fit each other")
        if any(row > rows for cursors in self.lanes for _, _, row, rows in cursors):
            raise ValueError("a lane stands behind the last row of its slice")
        return self


class Generators(BaseModel):
    """States of random generators."""

    torch: Base64Bytes


class SavedState(BaseModel):
    """state.json, as far as a training goes on from it."""

    step: Count
    dataloader_state_dict: StreamState | None
    loop_state: LoopState
    rng: Generators
    metrics_bytes: Count


def load(path: Path, state: TrainState) -> int:
    """Put a verified checkpoint into state, in place; returns the length of metrics.jsonl when it was saved.

    Raises CheckpointError on a checkpoint that is damaged or belongs to another model.
    """
    verify(path)
    _require_listed(path, ["state.json"])
    saved = checked(SavedState, path / "state.json")
    load_model_tensors(state.model, load_tensors(path, "model"))
    load_optimizer_tensors(state.model, state.optimizer, load_tensors(path, "optimizer"))
    try:
        torch.set_rng_state(torch.tensor(list(saved.rng.torch), dtype=torch.uint8))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: rng.torch is no state of the random generator") from error
    state.step = saved.step
    state.loader = saved.dataloader_state_dict and saved.dataloader_state_dict.model_dump(mode="json")
    state.loop = saved.loop_state
    return saved.metrics_bytes


def load_tensors(path: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part ("model" or "optimizer") by name, on the CPU."""
    index = f"{part}.safetensors.index.json"
    weight_map = checked(Index, path / index).weight_map
    names = sorted(set(weight_map.values()))
    _require_listed(path, [index, *names])
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(path / name)
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:  # the last: a type that torch lacks
            raise CheckpointError(f"{path / name} cannot be read as safetensors: {str(error)[:200]}") from error
    if odd := sorted(tensors.keys() ^ weight_map.keys()):
        raise CheckpointError(f"{path / index} does not list the tensors that are there: {', '.join(odd)[:200]} on one side only")
    return tensors


def _require_listed(path: Path, names: list[str]) -> None:
    """Raise CheckpointError for a file that the manifest does not know, so that `verify` has not looked at it."""
    if strange := sorted(set(names) - read_manifest(path).keys()):
        raise CheckpointError(f"{path}: {', '.join(strange)[:200]} is used, but not listed in manifest.json")
