"""Files of a checkpoint -> TrainState. Whatever stands in them is checked before it is used, and nothing is a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Base64Bytes, BaseModel, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from picotrain.checkpoint.folder import PREFIX, Count, Index, checked, read_manifest, verify
from picotrain.errors import CheckpointError
from picotrain.state import LoopState, TrainState, load_model_tensors, load_optimizer_tensors

Cursor = tuple[Annotated[int, Field(strict=True, ge=-1, le=2**53)], Count, Count, Count]


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
        if any(position < 0 and any(rest) for cursors in self.lanes for position, *rest in cursors):
            raise ValueError("a lane that has left a source stands in it")
        return self


class Generators(BaseModel):
    """States of random generators."""

    torch: Base64Bytes


class SavedState(BaseModel):
    """state.json, as far as a training goes on from it."""

    step: Count
    dataloader_state_dict: StreamState
    loop_state: LoopState
    rng: Generators
    metrics_bytes: Count

    @model_validator(mode="after")
    def _agrees(self) -> SavedState:
        loop, smoother = self.loop_state, self.loop_state.smoother
        if smoother and (smoother.keys() != {"mean", "count"} or smoother["count"] not in range(self.step + 1)):
            raise ValueError(f"the smoothed loss is of no {self.step:,} steps")
        if loop.skipped > self.step:
            raise ValueError(f"{loop.skipped:,} updates of {self.step:,} were left out")
        if loop.val_bpb_step is not None and not 0 <= loop.val_bpb_step <= self.step:
            raise ValueError(f"step {self.step:,} knows a validation at step {loop.val_bpb_step:,}")
        if loop.total_training_time < 0:
            raise ValueError("training took less than no time")
        return self


def load(path: Path, state: TrainState) -> int:
    """Put a verified checkpoint into state, in place; returns the length of metrics.jsonl when it was saved.

    Raises CheckpointError on a checkpoint that is damaged or belongs to another model.
    """
    verify(path)
    _require_listed(path, ["state.json"])
    saved = checked(SavedState, path / "state.json")
    if path.name != f"{PREFIX}{saved.step:08d}":
        raise CheckpointError(f"{path / 'state.json'} is that of step {saved.step:,}, and {path.name} is another one")
    load_model_tensors(state.model, load_tensors(path, "model"))
    load_optimizer_tensors(state.model, state.optimizer, load_tensors(path, "optimizer"))
    try:
        torch.set_rng_state(torch.tensor(list(saved.rng.torch), dtype=torch.uint8))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: rng.torch is no state of the random generator") from error
    state.step = saved.step
    state.loader = saved.dataloader_state_dict.model_dump(mode="json")
    state.loop = saved.loop_state
    return saved.metrics_bytes


def require_fits(path: Path, state: TrainState, lanes: int, repeat: Sequence[bool], rows_per_step: int) -> None:
    """Raise CheckpointError where the data stream of a loaded state is not that of its step and of the run. repeat: of each source."""
    stream = state.loader or {}
    problems = {
        f"{stream['lanes_count']:,} lanes, where the plan has {lanes:,}": stream["lanes_count"] != lanes,
        f"{len(stream['lanes'][0])} sources, where the data has {len(repeat)}": len(stream["lanes"][0]) != len(repeat),
        f"row {stream['row']:,}, where {state.step:,} steps of {rows_per_step:,} rows were trained": stream["row"]
        != state.step * rows_per_step,
        "a lane that has left a source which is read again and again": any(
            position < 0 and again for cursors in stream["lanes"] for (position, *_), again in zip(cursors, repeat, strict=False)
        ),
    }
    if found := [text for text, is_so in problems.items() if is_so]:
        raise CheckpointError(f"{path / 'state.json'} contradicts the run: dataloader_state_dict has {'; '.join(found)}")


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
