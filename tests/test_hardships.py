"""Runs that lose memory, folders or their own number of processes, or are stopped in the middle of a step."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import lines, losses, picotrain, start
from test_faults import steps
from test_loop import assert_same_run, wait_for, wait_until

from picotrain import checkpoint


def patched(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process first runs `code`, with `torch`, `model` and the real `forward` at hand."""
    head = "import os, signal, torch\nfrom picotrain.models.gpt import module as model\nforward = model.GPT.forward\n"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(head + code)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


# -- memory

SMALL_DEVICE = """
def small(self, ids, *rest, **more):
    if self.training and len(ids) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, ids, *rest, **more)
model.GPT.forward = small
"""


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_out_of_memory_with_an_automatic_batch_is_tried_again_smaller_with_the_same_steps(tmp_path, tiny, nproc):
    straight, run = tmp_path / "straight", tmp_path / "run"
    ranks = f"hardware.nproc_per_node={nproc}"
    assert picotrain("train", *tiny(straight, ranks, "train.device_batch_size=2")).returncode == 0
    done = picotrain("train", *tiny(run, ranks), env=patched(tmp_path / "patch", SMALL_DEVICE))
    assert done.returncode == 0, done.stderr
    assert "out of memory with micro-batches of 4 rows of 32 tokens; the plan predicted" in done.stderr
    assert f"tried again with 2 rows in {4 // nproc} accumulation steps" in done.stderr and "Traceback" not in done.stderr
    assert losses(straight) == losses(run)
    again = picotrain("resume", str(run), "train.max_steps=14", env=patched(tmp_path / "patch", SMALL_DEVICE))
    assert again.returncode == 0 and "out of memory" not in again.stderr  # it is remembered


@pytest.mark.slow  # compiles three times; hang_s is what one may take, and what a watchdog that the first try left would end the third by
def test_out_of_memory_while_compiling_is_tried_again_too_and_leaves_nothing_behind(tmp_path, tiny):
    run = tmp_path / "run"
    more = ("hardware.compile=true", "launch.hang_s=60", "archive.url=" + str(tmp_path / "archive"))
    done = picotrain("train", *tiny(run, *more), env=patched(tmp_path / "patch", SMALL_DEVICE))
    assert done.returncode == 0, done.stderr
    assert "tried again with 2 rows in 4 accumulation steps" in done.stderr and "Traceback" not in done.stderr
    assert len(losses(run)) == 12
    (compiled,) = [line for line in lines(run, "event") if line["name"] == "compiled"]
    assert compiled["step"] == 0


def test_out_of_memory_with_a_chosen_batch_names_what_would_fit(tmp_path, tiny):
    run = tmp_path / "run"
    done = picotrain("train", *tiny(run, "train.device_batch_size=8"), env=patched(tmp_path / "patch", SMALL_DEVICE))
    assert done.returncode == 4 and "tried again" not in done.stderr and "Traceback" not in done.stderr
    assert "8 rows of 32 tokens" in done.stderr and "Tried to allocate 2.00 GiB" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("  - ")]) == 3
    assert "train.device_batch_size=4: about" in done.stderr


def test_memory_that_ran_out_while_the_ranks_met_is_said_and_no_smaller_batch_is_tried(tmp_path, tiny):
    run = tmp_path / "run"
    code = """
import torch.distributed as dist
def init(*rest, **more):
    raise dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94\\nLast error:\\nFailed to CUDA calloc async 4 bytes")
dist.init_process_group = init
"""
    ranks = "hardware.nproc_per_node=2"
    done = picotrain("train", *tiny(run, ranks), env=patched(tmp_path / "patch", code))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "tried again" not in done.stderr
    assert "out of memory before the first step" in done.stderr and "Failed to CUDA calloc async 4 bytes" in done.stderr
    assert picotrain("train", *tiny(run, ranks)).returncode == 0


# -- signals


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_between_micro_batches_drops_the_step_that_is_begun_and_loses_nothing(tmp_path, tiny, nproc):
    code = f"""
count = 0
def counted(self, ids, *rest, **more):
    global count
    if self.training:
        count += 1
        open(os.environ["COUNTS"] + os.environ.get("RANK", "0"), "w").write(str(count))
        if count == 10 and os.environ.get("RANK", "0") == "{nproc - 1}":  # the second micro-batch of the third step
            os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, ids, *rest, **more)
model.GPT.forward = counted
"""
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = (f"hardware.nproc_per_node={nproc}", f"train.device_batch_size={2 // nproc}", "train.max_steps=6", "train.eval_every=0")
    assert picotrain("train", *tiny(straight, *words)).returncode == 0
    environment = patched(tmp_path / "patch", code) | {"COUNTS": str(tmp_path / "count")}
    done = picotrain("train", *tiny(run, *words), env=environment)
    assert done.returncode == 75, done.stderr
    assert [(tmp_path / f"count{rank}").read_text() for rank in range(nproc)] == ["10"] * nproc
    assert len(losses(run)) == 2 and steps(run / "checkpoints") == [2]
    assert "whole on disk" in [event["message"] for event in lines(run, "event")][-1]
    assert picotrain("resume", str(run)).returncode == 0
    assert_same_run(straight, run)


# -- folders that are taken away


def without_roots_rights() -> None:
    """In a new process: let permissions hold for root, too."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


LONG = ("train.max_steps=150", "train.save_every=5", "train.eval_every=0")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="dropping root's rights is Linux's prctl")


@on_linux
def test_a_folder_that_cannot_be_written_for_a_while_costs_the_saves_of_that_while(tmp_path, tiny):
    run = tmp_path / "run"
    process = start("train", *tiny(run, *LONG), preexec_fn=without_roots_rights, env=os.environ | {"TMPDIR": str(tmp_path)})
    root = run / "checkpoints"
    wait_for(root / "step_00000005" / "manifest.json")
    root.chmod(0o555)
    wait_until(lambda: any(event["name"] == "save_failed" for event in lines(run, "event")))
    root.chmod(0o755)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "Permission denied; training goes on" in out
    assert steps(root)[0] == 5 and steps(root)[-1] == 150 and len(losses(run)) == 150


@on_linux
@pytest.mark.parametrize("taken", ["deleted", "read-only"])
def test_a_run_whose_folder_is_gone_at_the_end_saves_elsewhere_and_says_where(tmp_path, tiny, taken):
    run = tmp_path / "run"
    process = start("train", *tiny(run, *LONG), preexec_fn=without_roots_rights, env=os.environ | {"TMPDIR": str(tmp_path)})
    wait_for(run / "checkpoints" / "step_00000005" / "manifest.json")
    if taken == "deleted":
        run.rename(tmp_path / "away")  # at once; open files see no difference
        shutil.rmtree(tmp_path / "away")
    else:
        (run / "checkpoints").chmod(0o555)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    elsewhere = next(tmp_path.glob("picotrain-run-*/step_00000150"), Path("nowhere"))
    assert str(elsewhere) in out and "Traceback" not in out, out
    checkpoint.verify(elsewhere)
    if taken == "read-only":
        (run / "checkpoints").chmod(0o755)
        shutil.move(elsewhere, run / "checkpoints")
        again = picotrain("resume", str(run))
        assert again.returncode == 0 and len(losses(run)) == 150, again.stderr


# -- other numbers of processes


def test_a_run_goes_through_one_two_four_and_one_process_and_reads_the_same_rows(tmp_path, tiny):
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = ("train.device_batch_size=2", "train.eval_every=0", "data.lanes=4")
    assert picotrain("train", *tiny(straight, *words)).returncode == 0
    for nproc, last in ((1, 3), (2, 6), (4, 9), (1, 12)):
        verb = ("resume", str(run)) if (run / "config.yaml").exists() else ("train", *tiny(run, *words))
        done = picotrain(*verb, f"hardware.nproc_per_node={nproc}", f"train.max_steps={last}")
        assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(straight), abs=1e-4)
    ends = [folder / "checkpoints" / "step_00000012" for folder in (straight, run)]
    for part in ("model", "optimizer"):
        expected, found = (checkpoint.load_tensors(end, part) for end in ends)
        assert expected.keys() == found.keys()
        assert all(torch.allclose(expected[name], found[name], atol=2e-3) for name in expected)
    assert [record["world_size"] for record in lines(run, "train")] == [1] * 3 + [2] * 3 + [4] * 3 + [1] * 3
    cursors = [json.loads((end / "state.json").read_text())["dataloader_state_dict"] for end in ends]
    assert cursors[0] == cursors[1]
