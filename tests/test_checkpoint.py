"""Checkpoints: whole or not there, verified, in open formats, and loadable into the same state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from picotrain import checkpoint, optim
from picotrain.config.schema import OptimizerConfig
from picotrain.errors import CheckpointError
from picotrain.shape import Rates
from picotrain.state import LoopState, TrainState, model_tensors, optimizer_tensors


class Tiny(nn.Module):
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
    optimizer = optim.build(OptimizerConfig(matrix_lr=0.1, embed_lr=0.1, head_lr=0.1), model, Rates(0.1, 0.1, 0.1, 0.0))
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


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "bad manifest"])
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
    else:
        (bad / "manifest.json").write_text("[")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert len(said) == 1 and "step_00000009" in said[0]
    with pytest.raises(CheckpointError):
        checkpoint.load(bad, trained(0))


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
