"""What a run in one process reads: what the command has made or looked at is handed on, and not read back from the files it wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import losses

from picotrain import launch as launching
from picotrain import run as runs
from picotrain import tokenizer, worker
from picotrain.cli import commands
from picotrain.launch import launch


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often configs, plans, corpora and tokenizers are read from files of a run; tokenizers from any."""
    seen: Counter[str] = Counter()

    def counting(module, name: str, what: str) -> None:
        real = getattr(module, name)

        def counted(*args, **more):
            seen[what] += 1
            return real(*args, **more)

        monkeypatch.setattr(module, name, counted)

    for module in (runs, worker, launching):
        counting(module, "load", "config")
        counting(module, "read_plan", "plan")
    counting(runs, "_read_data", "corpus")
    counting(runs.sources, "gather", "corpus gathered")
    counting(tokenizer, "load_tokenizer", "tokenizer")
    return seen


@pytest.mark.parametrize("named", [False, True])
def test_a_new_run_reads_nothing_back_and_its_tokenizer_once(tmp_path: Path, tiny, read: Counter[str], named: bool):
    more = ["train.max_steps=2", "train.eval_every=0"]
    own = f"run.cache_dir={tmp_path / 'cache'}"
    if named:
        assert launch(lambda: commands.new_run(tiny(tmp_path / "first", *more, own), None, None)) == 0
        more.append(f"tokenizer.path={tmp_path / 'first' / 'tokenizer.json'}")
        read.clear()
    assert launch(lambda: commands.new_run(tiny(tmp_path / "run", *more, own), None, None)) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert read == {"corpus gathered": 1, "tokenizer": 1}


def test_a_resume_reads_the_files_of_the_run_once(tmp_path: Path, tiny, read: Counter[str]):
    more = ("train.max_steps=2", "train.eval_every=0")
    assert launch(lambda: commands.new_run(tiny(tmp_path / "run", *more), None, None)) == 0
    read.clear()
    assert launch(lambda: commands.resumed(str(tmp_path / "run"), ["train.max_steps=3"])) == 0
    assert len(losses(tmp_path / "run")) == 3
    assert (read["tokenizer"], read["corpus"], read["config"]) == (1, 1, 1), read
