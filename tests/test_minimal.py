"""The twenty lines and the loop are the same training."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from conftest import losses, picotrain

from picotrain import minimal
from picotrain.config import compose


def test_its_losses_are_the_loops(tiny, tmp_path: Path):
    overrides = tiny(tmp_path / "loop", "train.eval_every=0", "train.grad_clip=null")
    assert picotrain("train", *overrides).returncode == 0
    assert list(minimal.losses(compose(overrides))) == pytest.approx(losses(tmp_path / "loop"), rel=1e-6)


def test_it_has_at_most_twenty_lines_of_code():
    body = inspect.getsource(minimal.losses).splitlines()[2:]
    assert len([line for line in body if line.strip()]) <= 20


def test_it_prints_a_line_a_step(tiny, tmp_path: Path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "picotrain.minimal", *tiny(tmp_path / "x", "train.max_steps=3")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[-3:]] == [["step", "0"], ["step", "1"], ["step", "2"]]
