"""Checkpoints: whole or not there, verified, in open formats, and loadable into the same state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from picotrain import checkpoint, optim
from picotrain.checkpoint.folder import describe
from picotrain.config.schema import CheckpointConfig
from picotrain.errors import CheckpointError
from picotrain.model import LanguageModel
from picotrain.optimizers.adamw import AdamWConfig
from picotrain.shape import Rates
from picotrain.state import LoopState, TrainState, model_tensors, optimizer_tensors


class Tiny(LanguageModel):
    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.body = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def trained(step: int, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = Tiny()
    optimizer = optim.build(AdamWConfig(matrix_lr=0.1, embed_lr=0.1, head_lr=0.1), model, Rates(0.1, 0.1, 0.1, 0.0))
    for _ in range(3):
        model(torch.randint(16, (4, 5))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return TrainState(
        model, optimizer, step, {"row": 96, "lanes_count": 2, "lanes": [[[0, 0, 3, 9]], [[5, 1, 2, 2]]]}, LoopState(min_val_bpb=1.5)
    )


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path):
    saved, fresh = trained(7), trained(0, seed=1)
    path = checkpoint.save(tmp_path, saved, metrics_bytes=123)
    assert checkpoint.load(path, fresh) == 123
    assert (fresh.step, fresh.loader, fresh.loop) == (7, saved.loader, saved.loop)
    for tensors in (model_tensors, lambda m: optimizer_tensors(m, fresh.optimizer if m is fresh.model else saved.optimizer)):
        ours, theirs = tensors(fresh.model), tensors(saved.model)
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_next_update_after_a_load_is_the_one_that_would_have_come(tmp_path: Path):
    saved, fresh = trained(7), trained(0, seed=1)
    checkpoint.load(checkpoint.save(tmp_path, saved, 0), fresh)
    ids = torch.arange(16).view(2, 8)
    for state in (saved, fresh):
        state.model(ids).square().mean().backward()
        state.optimizer.step()
    assert torch.equal(saved.model.body.weight, fresh.model.body.weight)


def test_the_random_generator_goes_on_where_it_was(tmp_path: Path):
    state = trained(1)
    path = checkpoint.save(tmp_path, state, 0)
    expected = torch.rand(3)
    torch.manual_seed(999)
    checkpoint.load(path, state)
    assert torch.equal(torch.rand(3), expected)


def test_a_plain_safetensors_reader_finds_every_weight_through_the_index(tmp_path: Path):
    state = trained(7)
    path = checkpoint.save(tmp_path, state, 0)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in state.model.state_dict().items():
        with safe_open(path / index[name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)


def test_large_weights_are_cut_into_several_files(tmp_path: Path):
    path = checkpoint.save(tmp_path, trained(7), 0, shard_bytes=600)
    assert (path / "model-00001-of-00003.safetensors").is_file()
    fresh = trained(0, seed=1)
    checkpoint.load(path, fresh)
    assert torch.equal(fresh.model.head.weight, trained(7).model.head.weight)


def test_latest_names_the_newest_and_a_crash_before_the_rename_leaves_nothing_that_counts(tmp_path: Path, monkeypatch):
    checkpoint.save(tmp_path, trained(7), 0)
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(CheckpointError, match="power cut"):
        checkpoint.save(tmp_path, trained(9), 0)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000007"]
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    checkpoint.save(tmp_path, trained(9), 0)
    assert not list(tmp_path.glob(".tmp-*"))
    assert checkpoint.find(tmp_path, "last").name == "step_00000009"


DAMAGES = ["flip", "truncate", "remove", "no manifest", "bad manifest", "lists too little", "no optimizer", "file", "link", "dangling"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path: Path, damage: str):
    good = checkpoint.save(tmp_path, trained(7), 0)
    bad = checkpoint.save(tmp_path, trained(9), 0)
    weights = bad / "model-00001-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-3])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    elif damage in ("lists too little", "no optimizer"):
        manifest = json.loads((bad / "manifest.json").read_text())
        gone = "state.json" if damage == "lists too little" else "optimizer.safetensors.index.json"
        del manifest["files"][gone]
        (bad / "manifest.json").write_text(json.dumps(manifest))
    elif damage in ("file", "link", "dangling"):
        bad.rename(tmp_path / "elsewhere")
        if damage == "file":
            bad.write_text("no folder")
        else:
            bad.symlink_to(tmp_path / ("elsewhere" if damage == "link" else "nowhere"))
    else:
        (bad / "manifest.json").write_text("[")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert len(said) == 1 and "step_00000009" in said[0]
    with pytest.raises(CheckpointError):
        checkpoint.load(bad, trained(0))
    what_was_there = bad.readlink() if bad.is_symlink() else bad.read_bytes() if bad.is_file() else sorted(os.listdir(bad))
    assert checkpoint.newest(tmp_path, said.append) == good
    assert checkpoint.save(tmp_path, trained(9), 0) == bad == checkpoint.newest(tmp_path, pytest.fail)
    aside = tmp_path / "damaged-step_00000009"  # never deleted
    assert what_was_there == (
        aside.readlink() if aside.is_symlink() else aside.read_bytes() if aside.is_file() else sorted(os.listdir(aside))
    )


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json and make the manifest fit it."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = describe(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def put(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        place: Any = state
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


STREAM = "dataloader_state_dict"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("step", value=999), "step 999"),
        (put(STREAM, value=None), STREAM),
        (put(STREAM, "lanes", 0, 0, 0, value=-2), "lanes"),
        (put(STREAM, "lanes", 0, 0, 0, value=-1), "has left a source"),
        (put(STREAM, "lanes", 0, 0, 0, value=1.5), "lanes"),
        (put(STREAM, "lanes", 0, 0, 0, value="1"), "lanes"),
        (put(STREAM, "lanes", 0, 0, 2, value=10), "behind the last row"),
        (put(STREAM, "lanes_count", value=3), "lanes do not fit"),
        (put(STREAM, "row", value=-96), "row"),
        (put("loop_state", "smoother", value={"mean": float("nan"), "count": 7}), "state.json"),
        (put("loop_state", "smoother", value={"mean": None, "count": 7}), "mean"),
        (put("loop_state", "smoother", value={"mean": 1.0, "count": 8}), "smoothed loss"),
        (put("loop_state", "smoother", value={"mean": 1.0, "count": 6.5}), "smoothed loss"),
        (put("loop_state", "smoother", value={"mean": 1.0}), "smoothed loss"),
        (put("loop_state", "skipped", value=8), "8 updates of 7"),
        (put("loop_state", "val_bpb_step", value=8), "validation at step 8"),
        (put("loop_state", "total_training_time", value=-1.0), "no time"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused_by_name_though_its_hash_fits(tmp_path: Path, change, named: str):
    path = checkpoint.save(tmp_path, trained(7), 0)
    reseal(path, change)
    checkpoint.verify(path)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load(path, trained(0))


@pytest.mark.parametrize(
    ("lanes", "repeat", "rows_per_step", "named"),
    [(4, [True], 8, "2 lanes, .* 4"), (2, [True] * 2, 8, "1 sources, .* 2"), (2, [True], 16, "row 96, where 12 steps of 16 rows")],
)
def test_a_state_that_is_not_the_runs_is_refused_by_name(tmp_path: Path, lanes: int, repeat: list[bool], rows_per_step: int, named: str):
    state = trained(12)
    path = checkpoint.save(tmp_path, state, 0)
    checkpoint.require_fits(path, state, 2, [True], 8)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.require_fits(path, state, lanes, repeat, rows_per_step)


def test_a_rolling_checkpoint_that_is_kept_is_permanent_and_stays(tmp_path: Path):
    saver = checkpoint.Saver(tmp_path, CheckpointConfig(background=False))
    saver.save(trained(3), 0, rolling=True)
    saver.keep(3)
    saver.keep(4)  # nothing was saved there
    assert not checkpoint.is_rolling(tmp_path / "step_00000003")
    checkpoint.load(tmp_path / "step_00000003", trained(0))
    for step in (5, 6):
        saver.save(trained(step), 0, rolling=True)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000006"]


def test_a_checkpoint_of_another_model_is_refused_by_name_or_shape(tmp_path: Path):
    path = checkpoint.save(tmp_path, trained(7), 0)
    other = trained(0)
    other.model = Tiny(width=4)
    with pytest.raises(CheckpointError, match="shape"):
        checkpoint.load(path, other)
    other.model.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.load(path, other)


def test_an_index_that_points_outside_is_refused(tmp_path: Path):
    path = checkpoint.save(tmp_path, trained(7), 0)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint.load_tensors(path, "model")


def test_best_is_the_lowest_bpb_among_whole_checkpoints(tmp_path: Path):
    for step, bpb in ((1, 2.0), (2, 1.5), (3, 1.8)):
        checkpoint.save(tmp_path, trained(step), 0)
        checkpoint.record_metrics(tmp_path, step, {"val_bpb": bpb})
    assert checkpoint.find(tmp_path, "best").name == "step_00000002"
    checkpoint.record_metrics(tmp_path, 4, {"val_bpb": 0.1})  # nothing was saved at step 4
    assert checkpoint.find(tmp_path, "best").name == "step_00000002"
    assert checkpoint.is_whole(checkpoint.find(tmp_path, "3"))  # metrics.json does not count in the manifest


def test_asking_for_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path: Path):
    checkpoint.save(tmp_path, trained(7), 0)
    with pytest.raises(CheckpointError, match=r"'12'.*complete steps: 7"):
        checkpoint.find(tmp_path, "12")
    with pytest.raises(CheckpointError, match="no best"):
        checkpoint.find(tmp_path, "best")
