"""Runs that meet what long runs meet: saves in the background, full disks, ranks that die or hang, updates that are not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import lines, losses, picotrain, start
from test_checkpoint import trained
from test_loop import assert_same_run, wait_for

from picotrain import checkpoint, optim
from picotrain.checkpoint import saver as saving
from picotrain.config.schema import CheckpointConfig
from picotrain.models.gpt.module import GPT
from picotrain.optimizers.adamw import AdamWConfig
from picotrain.shape import Rates


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.complete(root)]


def saved(root: Path, state, section: CheckpointConfig | None = None, rolling: bool = False) -> checkpoint.Saved:
    saver = checkpoint.Saver(root, section or CheckpointConfig())
    saver.save(state, 0, rolling)
    saver.wait()
    return saver.poll()[0]


# -- saving in the background


def test_what_is_saved_is_the_state_at_the_call_whatever_happens_to_it_meanwhile(tmp_path, monkeypatch):
    go = threading.Event()
    write = saving.write
    monkeypatch.setattr(saving, "write", lambda *args: go.wait(30) and write(*args))
    state = trained(7)
    weight = state.model.body.weight.detach().clone()
    saver = checkpoint.Saver(tmp_path, CheckpointConfig())
    saver.save(state, 0)
    assert saver.poll() == [] and steps(tmp_path) == []  # the caller goes on while nothing is written yet
    with torch.no_grad():
        state.model.body.weight.fill_(5.0)
    go.set()
    saver.wait()
    assert torch.equal(checkpoint.load_tensors(tmp_path / "step_00000007", "model")["body.weight"], weight)
    ended = saver.poll()
    assert [save.step for save in ended] == [7] and ended[0].error is None and ended[0].stall_s <= ended[0].seconds


def test_the_host_copies_are_kept_from_save_to_save(tmp_path):
    saver = checkpoint.Saver(tmp_path, CheckpointConfig())
    state = trained(7)
    blocks = []
    for step in (7, 8):
        state.step = step
        saver.save(state, 0)
        blocks.append({name: tensor.data_ptr() for part in saver._staged.values() for name, tensor in part.items()})
    saver.wait()
    assert blocks[0] == blocks[1]
    assert steps(tmp_path) == [7, 8]


def test_a_bug_in_the_background_is_raised_with_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "write", lambda *args: 1 / 0)
    saver = checkpoint.Saver(tmp_path, CheckpointConfig())
    saver.save(trained(7), 0)
    saver.wait()
    with pytest.raises(RuntimeError, match="in the background") as error:
        saver.poll()
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_folder_that_is_gone_is_reported_and_the_next_save_works(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    failed = saved(root, trained(7))
    assert failed.error and "run directory is gone" in failed.error
    root.parent.mkdir()
    assert saved(root, trained(8)).error is None


# -- which checkpoints stay


def test_retention_keeps_the_newest_the_best_and_the_chosen(tmp_path):
    section = CheckpointConfig(keep_last=2, keep_every=4)
    for step in range(1, 10):
        assert saved(tmp_path, trained(step), section).error is None
        checkpoint.record_metrics(tmp_path, step, {"val_bpb": abs(step - 3) + 1.0, "val_loss": 1.0})
    assert steps(tmp_path) == [3, 4, 8, 9]
    assert checkpoint.find(tmp_path, "best").name == "step_00000003"
    assert not list(tmp_path.glob(".trash-*")) and not list(tmp_path.glob(".tmp-*"))


def test_a_rolling_checkpoint_goes_when_a_newer_one_is_whole_and_permanent_ones_stay(tmp_path):
    for step, rolling in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        saved(tmp_path, trained(step), rolling=rolling)
    assert steps(tmp_path) == [1, 4, 5]
    assert [checkpoint.is_rolling(path) for path in checkpoint.complete(tmp_path)] == [False, False, True]


def test_what_a_crash_left_half_removed_goes_at_the_next_start(tmp_path):
    path = checkpoint.save(tmp_path, trained(7), 0)
    shutil.copytree(path, tmp_path / ".trash-step_00000003")
    shutil.copytree(path, tmp_path / ".tmp-step_00000009")
    assert steps(tmp_path) == [7]
    checkpoint.Saver(tmp_path, CheckpointConfig())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000007"]


def test_a_killed_run_goes_on_from_its_rolling_checkpoint_as_if_undisturbed(tmp_path, tiny):
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = ("train.max_steps=60", "train.eval_every=0", "checkpoint.rolling_minutes=0.002")
    assert picotrain("train", *tiny(straight, *words, "checkpoint.rolling_minutes=null")).returncode == 0
    process = start("train", *tiny(run, *words))
    wait_for(run / "checkpoints" / "latest")
    time.sleep(0.3)
    process.kill()
    process.communicate()
    left = steps(run / "checkpoints")
    if left and left[-1] < 60:
        assert checkpoint.is_rolling(checkpoint.find(run / "checkpoints", "last"))
    done = picotrain("resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(straight, run)
    assert steps(run / "checkpoints") == [60]


# -- disks


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting a small tmpfs needs root on Linux")
def test_a_full_disk_costs_a_save_and_not_the_run_and_the_last_save_goes_elsewhere(tmp_path, tiny):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = small / "run"
        done = picotrain("train", *tiny(run, "train.save_every=5"), env=os.environ | {"TMPDIR": str(tmp_path)})
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "save_failed" in done.stdout and "No space left on device" in done.stdout
        assert len(losses(run)) == 12  # it trained to its end
        elsewhere = next(tmp_path.glob("picotrain-run-*/step_00000012"))
        assert str(elsewhere) in done.stderr and "resume" in done.stderr
        checkpoint.verify(elsewhere)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# -- updates that are not finite


def guarded(max_z: float | None = None) -> tuple[GPT, torch.optim.Optimizer, optim.Guard]:
    from picotrain.models.gpt import GPTConfig

    model = GPT(GPTConfig(depth=2, head_dim=16, width=32), 100, 16)
    model.init_weights(0)
    section = AdamWConfig(matrix_lr=0.01, embed_lr=0.01, head_lr=0.01)
    return model, optim.build(section, model, Rates(0.01, 0.01, 0.01, 0.1)), optim.Guard(max_z, torch.device("cpu"), on_device=True)


def update(model: GPT, optimizer: torch.optim.Optimizer, guard: optim.Guard, loss: float, norm: float = 1.0) -> bool:
    ids = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    model(ids, ids).backward()
    skipped = guard.skip(optimizer, torch.tensor(loss), torch.tensor(norm))
    optimizer.step()
    optimizer.zero_grad()
    return bool(skipped)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan")), (2.0, float("inf"))])
def test_an_update_that_is_not_finite_changes_neither_weights_nor_moments_nor_the_step_count(loss, norm):
    model, optimizer, guard = guarded()
    assert not update(model, optimizer, guard, 2.0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    assert update(model, optimizer, guard, loss, norm)
    for parameter, weight, kept in zip(model.parameters(), weights, state, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(value, optimizer.state[parameter][key]) for key, value in kept.items())
    assert not update(model, optimizer, guard, 2.0)
    assert not torch.equal(model.head.weight, weights[-1]) or not torch.equal(next(model.parameters()), weights[0])


def test_a_spike_is_skipped_once_the_window_is_full_and_does_not_enter_it():
    model, optimizer, guard = guarded(max_z=6.0)
    generator = torch.Generator().manual_seed(0)
    noise = (2.0 + 0.1 * torch.randn(optim.Guard.WINDOW, generator=generator)).tolist()
    assert not update(model, optimizer, guard, 100.0)  # nothing to compare it with yet
    assert not any(guard.skip(optimizer, torch.tensor(value), torch.tensor(1.0)) for value in noise)
    for _ in range(3):
        assert update(model, optimizer, guard, 4.0)
    assert not update(model, optimizer, guard, 2.1)
    again = optim.Guard(6.0, torch.device("cpu"), on_device=True)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    assert again.skip(optimizer, torch.tensor(4.0), torch.tensor(1.0))


# -- ranks


@pytest.mark.slow  # the one that stands still is started again in the same way
def test_a_rank_that_dies_comes_back_by_itself_from_the_last_checkpoint(tmp_path, tiny):
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = ("hardware.nproc_per_node=2", "train.device_batch_size=4", "train.max_steps=60", "train.save_every=10", "train.eval_every=0")
    assert picotrain("train", *tiny(straight, *words)).returncode == 0
    process = start("train", *tiny(run, *words, "launch.max_restarts=2"))
    wait_for(run / "checkpoints" / "step_00000010" / "manifest.json")
    workers = subprocess.run(["pgrep", "-f", f"picotrain.worker {run}"], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "was ended by SIGKILL" in out and "starting the workers again, 1 of 2 times" in out
    assert losses(straight) == losses(run)
    assert "resumed" in [event["name"] for event in lines(run, "event")]


def test_without_restarts_a_dead_rank_ends_the_run_and_a_users_mistake_is_not_tried_again(tmp_path, tiny):
    run = tmp_path / "run"
    assert picotrain("train", *tiny(run)).returncode == 0
    (run / "tokenizer.json").write_text("{}")
    done = picotrain("resume", str(run), "train.max_steps=20", "launch.max_restarts=3")
    assert done.returncode == 2 and "starting the workers again" not in done.stderr


def test_a_process_that_makes_no_progress_prints_its_stacks_and_ends(tmp_path):
    code = (
        "import time\nfrom picotrain.parallel import Watchdog\n"
        "def stuck_in_a_collective():\n    time.sleep(60)\n"
        "watchdog = Watchdog(1.0).__enter__()\nfor _ in range(5):\n    time.sleep(0.4); watchdog.beat()\n"
        "print('alive', flush=True)\nstuck_in_a_collective()"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 124 and done.stdout == "alive\n" and time.monotonic() - begun < 30
    assert "no progress" in done.stderr and "stuck_in_a_collective" in done.stderr


def test_a_process_whose_interpreter_is_stuck_is_ended_too(tmp_path):
    code = (
        "import ctypes\nfrom picotrain.parallel import Watchdog\nWatchdog.STUCK_S = 0.5\nwatchdog = Watchdog(1.0).__enter__()\n"
        "def stuck_in_native_code():\n    ctypes.PyDLL(None).sleep(60)\nstuck_in_native_code()"  # PyDLL keeps the GIL
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and time.monotonic() - begun < 30
    assert "Timeout" in done.stderr and "stuck_in_native_code" in done.stderr


@pytest.mark.slow  # it is waited for
def test_a_rank_that_stands_still_costs_the_others_their_patience_and_not_the_run(tmp_path, tiny):
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = ("hardware.nproc_per_node=2", "train.eval_every=0", "train.max_steps=60", "train.save_every=10")
    assert picotrain("train", *tiny(straight, *words)).returncode == 0
    process = start("train", *tiny(run, *words, "launch.max_restarts=1", "launch.hang_s=12"))
    wait_for(run / "checkpoints" / "step_00000010" / "manifest.json")
    workers = subprocess.run(["pgrep", "-f", f"picotrain.worker {run}"], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGSTOP)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "rank 0 has made no progress for launch.hang_s=12 s" in out and "starting the workers again, 1 of 1 times" in out
    assert "in train" in out and "where the other ranks are" in out  # stacks
    record = json.loads((run / "flight_recorder" / "rank_0.json").read_text())
    assert any("all_reduce" in entry["profiling_name"] for entry in record["entries"])
    assert losses(straight) == losses(run)


def test_the_end_of_a_run_waits_for_its_last_save(tmp_path, tiny):
    run = tmp_path / "run"
    assert picotrain("train", *tiny(run)).returncode == 0
    record = lines(run, "checkpoint")[-1]
    assert record["step"] == 12 and 0 <= record["stall_s"] <= record["seconds"]
    manifest = json.loads((run / record["path"] / "manifest.json").read_text())
    assert manifest["rolling"] is False and "model-00001-of-00001.safetensors" in manifest["files"]
