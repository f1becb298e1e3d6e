"""The twenty lines and the loop are the same training."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import losses, picotrain

from picotrain import minimal
from picotrain.config import compose
from picotrain.data import sources
from picotrain.errors import DataError


def as_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "picotrain.minimal", *words], capture_output=True, text=True, timeout=240)


def test_data_auto_is_decided_for_it_too(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The line of its docstring names no data; a small vocabulary and batch only make it quick."""
    words = tiny(tmp_path / "x", "data=auto", "train.max_steps=1")
    words = [word for word in words if not word.startswith(("data=files", "data.path", "data.unit_bytes"))]
    asked = []

    def gather(data, cache, say):
        asked.append(data.kind)
        raise DataError("that is enough")

    monkeypatch.setattr(sources, "gather", gather)
    with pytest.raises(DataError, match="that is enough"):
        next(minimal.losses(compose(words)))
    assert asked == ["pystdlib"]


def test_its_losses_are_the_loops(tiny, tmp_path: Path):
    overrides = tiny(tmp_path / "loop", "train.eval_every=0", "train.grad_clip=null")
    assert picotrain("train", *overrides).returncode == 0
    assert list(minimal.losses(compose(overrides))) == pytest.approx(losses(tmp_path / "loop"), rel=1e-6)


def test_a_step_in_several_pieces_is_the_loops_too(tiny, tmp_path: Path):
    overrides = tiny(tmp_path / "loop", "train.eval_every=0", "train.grad_clip=null", "train.device_batch_size=2", "train.max_steps=5")
    assert picotrain("train", *overrides).returncode == 0
    assert list(minimal.losses(compose(overrides))) == pytest.approx(losses(tmp_path / "loop"), rel=1e-6)


def test_a_mistake_ends_in_one_message():
    done = as_command("model=d5")
    assert (done.returncode, done.stderr.count("error:")) == (2, 1)
    assert "nearest: d4, d6" in done.stderr and "Traceback" not in done.stderr


def test_it_has_at_most_twenty_lines_of_code():
    body = inspect.getsource(minimal.losses).splitlines()[2:]
    assert len([line for line in body if line.strip()]) <= 20


def test_it_prints_a_line_a_step(tiny, tmp_path: Path):
    done = as_command(*tiny(tmp_path / "x", "train.max_steps=3"))
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[-3:]] == [["step", "0"], ["step", "1"], ["step", "2"]]
