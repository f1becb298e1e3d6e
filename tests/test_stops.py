"""Stops where a run is not between two steps: a terminal that closes, compiling, sampling, a tokenizer's training; and folders that go."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import lines, picotrain, start
from test_checkpoint import trained
from test_faults import steps
from test_hardships import patched
from test_loop import wait_for, wait_until

from picotrain import checkpoint, loop
from picotrain import run as runs
from picotrain.checkpoint import Saver, saver
from picotrain.cli.completion import complete
from picotrain.config import compose
from picotrain.config.schema import CheckpointConfig
from picotrain.errors import CheckpointError
from picotrain.loop import training
from picotrain.parallel import Parallel
from picotrain.signals import StopSignal

READY = """
import ctypes, pathlib, time
def here():
    pathlib.Path(os.environ["READY"]).touch()
def stuck_in_python():
    here()
    time.sleep(300)
def stuck_in_native_code():  # waits for a mutex that it holds already: no Python handler runs any more
    mutex = ctypes.create_string_buffer(256)
    here()
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is glibc's")


def trained_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


# -- a terminal that closes


def test_a_terminal_that_closes_ends_a_run_that_is_saved(tmp_path, tiny):
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "picotrain", "train", *tiny(run, "train.max_steps=100000", "train.eval_every=0", "logger.log_every=1000")],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # which makes it the session's terminal
    )  # fmt: skip
    os.close(terminal)
    wait_until(lambda: trained_steps(run) > 3)
    os.close(master)
    assert process.wait(60) == 75
    (saved,) = steps(run / "checkpoints")
    assert saved > 3 and lines(run, "event")[-1]["name"] == "stopped"


def test_a_run_that_was_to_outlast_its_terminal_does_not_listen_to_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# -- what takes long beside steps


@on_linux
@pytest.mark.parametrize("where", [pytest.param("python", marks=pytest.mark.slow), "native_code"])
def test_a_stop_while_compiling_ends_the_run_which_goes_on_later(tmp_path, tiny, where):
    code = f"""
def slow(self, *args, **more):
    if self.training:
        stuck_in_{where}()
    return forward(self, *args, **more)
model.GPT.compile_blocks = lambda self: None
model.GPT.forward = slow
"""
    run, ready = tmp_path / "run", tmp_path / "ready"
    words = tiny(run, "hardware.compile=true", "train.max_steps=2", "train.eval_every=0")
    process = start("train", *words, env=patched(tmp_path / "patch", READY + code) | {"READY": str(ready)})
    wait_for(ready)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)  # about one second on an idle machine
    assert process.returncode == 75 and "stopped while compiling" in out and "Traceback" not in out
    assert lines(run, "event")[-1]["name"] == "stopped" and not list(run.rglob("*.tmp"))
    done = picotrain("resume", str(run), "hardware.compile=false")
    assert done.returncode == 0 and steps(run / "checkpoints") == [2], done.stderr


def test_a_stop_that_one_rank_alone_is_asked_for_ends_all_in_the_middle_of_samples(tmp_path, tiny):
    code = """
from picotrain import sampling
choose = sampling.next_ids
def slow(*args):
    if os.environ["RANK"] == "1":
        pathlib.Path(os.environ["READY"]).write_text(str(os.getpid()))
    time.sleep(0.1)
    return choose(*args)
sampling.next_ids = slow
"""
    run, ready = tmp_path / "run", tmp_path / "ready"
    words = ("hardware.nproc_per_node=2", "train.eval_every=0", "train.sample_every=4", "sampling.max_tokens=3000")
    process = start("train", *tiny(run, *words), env=patched(tmp_path / "patch", READY + code) | {"READY": str(ready)})
    wait_until(lambda: ready.exists() and ready.read_text())
    os.kill(int(ready.read_text()), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)  # the samples alone would take an hour
    assert process.returncode == 75, out
    assert steps(run / "checkpoints") == [4] and lines(run, "sample") == []


@on_linux
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_training_of_a_tokenizer_in_any_command(tmp_path, tiny, signum):
    code = "from picotrain import tokenizer\ntokenizer.train_tokenizer = lambda *args: stuck_in_native_code()\n"
    ready, own = tmp_path / "ready", f"run.cache_dir={tmp_path / 'cache'}"
    environment = patched(tmp_path / "patch", READY + code) | {"READY": str(ready)}
    process = start("tokenizer", "train", *tiny(tmp_path / "run", own), env=environment)
    wait_for(ready)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "stopped while training a tokenizer" in out, out


# -- starts that fail half-way


@pytest.mark.parametrize("fails", ["build_model", "Loader"])
def test_a_start_that_fails_leaves_no_thread(tmp_path, tiny, monkeypatch, fails):
    run_dir = tmp_path / "run"
    overrides = tiny(run_dir, "launch.hang_s=3600", f"archive.url={tmp_path / 'archive'}")
    runs.open_run(runs.resolve(compose(overrides)), overrides, print)

    def no_memory(*args, **more):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, fails, no_memory)
    before = set(threading.enumerate())
    with StopSignal() as stop, pytest.raises(torch.OutOfMemoryError):
        loop.train(run_dir, Parallel.single(), stop)
    wait_until(lambda: set(threading.enumerate()) <= before, 10, "a thread is left")


# -- folders that go


@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_a_save_that_fails_leaves_the_folders_that_were_there_and_no_others(tmp_path, monkeypatch, before):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "_write_tensors", full)
    run = tmp_path / "run"
    run.mkdir()
    if before != "nothing":
        (run / "checkpoints").mkdir()
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="No space"):
        checkpoint.save(run / "checkpoints", trained(3), 0)
    assert sorted(tmp_path.rglob("*")) == there


def test_a_rescue_that_fails_leaves_the_temporary_folder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "_write_tensors", full)
    monkeypatch.setattr(saver.tempfile, "tempdir", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space"):
        Saver(tmp_path / "run" / "checkpoints", CheckpointConfig()).rescue(trained(3), 0)
    assert list((tmp_path / "mine").iterdir()) == []


REMOVED = """
import shutil, tempfile
from picotrain import report
write = report.write_report
def removed(run, *rest):
    shutil.rmtree(run)
    return write(run, *rest)
report.write_report = removed
def full(*args, **more):
    raise OSError(28, "No space left on device")
if os.environ["FULL"]:
    tempfile.mkdtemp = full
"""


@pytest.mark.parametrize("full", ["", "1"])
def test_a_run_that_is_removed_after_its_last_save_says_where_its_weights_are_or_that_they_are_lost(tmp_path, tiny, full):
    run = tmp_path / "run"
    environment = patched(tmp_path / "patch", REMOVED) | {"TMPDIR": str(tmp_path), "FULL": full}
    done = picotrain("train", *tiny(run, "train.max_steps=2", "train.eval_every=0"), env=environment)
    assert done.returncode == 2
    if full:
        assert "step 2 is lost, no checkpoint of the run is left" in done.stderr
        return
    (elsewhere,) = tmp_path.glob("picotrain-run-*/step_00000002")
    assert str(elsewhere) in done.stderr
    checkpoint.verify(elsewhere)


def test_folders_in_the_place_of_notes_cost_no_checkpoint_and_are_kept(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for place in ("latest", "best", "step_00000003/metrics.json"):
        (root / place).mkdir(parents=True)
        (root / place / "mine").touch()
    shutil.move(root / "step_00000003", tmp_path / "aside")
    path = checkpoint.save(root, trained(3), 0)
    shutil.move(tmp_path / "aside" / "metrics.json", path)
    checkpoint.record_metrics(root, 3, {"val_bpb": 1.5})
    assert [(root / name).read_text() for name in ("latest", "best")] == [path.name + "\n"] * 2
    assert checkpoint.read_metrics(path)["val_bpb"] == 1.5
    assert len(list(root.rglob("mine"))) == 3


def test_a_disk_that_is_full_before_the_lock_is_written_is_a_message(tmp_path, tiny):
    done = subprocess.run(
        [sys.executable, "-m", "picotrain", "train", *tiny(tmp_path / "runs" / "run")],
        capture_output=True, text=True, timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# -- nobody's home

NOBODY = """
import pwd
def unknown(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = unknown
"""


def test_a_user_without_a_home_is_told_what_to_set_and_trains_with_it(tmp_path, tiny, cache):
    environment = {"PYTHONPATH": patched(tmp_path / "patch", NOBODY)["PYTHONPATH"]}
    words = [word for word in tiny("run", "train.max_steps=2", "train.eval_every=0") if not word.startswith("run.cache_dir")]
    done = picotrain("train", *words, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "PICOTRAIN_CACHE" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    done = picotrain("train", *words, env=environment | {"PICOTRAIN_CACHE": str(cache)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["data.path=~nobody-of-this-name/texts", "run.dir=~nobody-of-this-name/run"])
def test_a_home_of_an_unknown_user_is_a_users_mistake(tiny, tmp_path, word):
    done = picotrain("train", *tiny(tmp_path / "run", word))
    assert done.returncode == 2 and "nobody-of-this-name" in done.stderr and "Traceback" not in done.stderr


def test_a_home_of_an_unknown_user_completes_to_nothing():
    assert complete(["eval", "~nobody-of-this-name/run", "--checkpoint"], "l") == ["last"]
    assert complete(["train", "--config-dir", "~nobody-of-this-name/conf"], "model=d1") == ["model=d12", "model=d16"]
    assert complete(["resume"], "~nobody-of-this-name/") == []
