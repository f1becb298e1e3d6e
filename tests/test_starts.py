"""Starts that fail before there is anything to keep: what they leave of the run's folder, which is nothing."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from conftest import picotrain

from picotrain.errors import RunError
from picotrain.lock import LOCK_FILE, RunLock

FAILING = {
    "a corpus that is not there": ["data.path=/nowhere/at/all"],
    "another tokenizer's vocabulary": ["tokenizer.path={tokenizer}", "tokenizer.vocab_size=400"],
    "a GPU that is not there": ["hardware.device=mps"],
    "a tracker that is not there": ["logger.trackers=[wandb]"],
    "a bundle that is not there": ["train.core_metric_every=5", "evaluation.core.bundle=/nowhere/bundle"],
    "text too short for a row": ["train.seq_len=16384", "train.total_batch_size=131072"],
}


@pytest.mark.parametrize("more", FAILING.values(), ids=FAILING.keys())
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a file"])
def test_a_start_that_fails_leaves_what_was_there(tmp_path, tiny, cache, more, before):
    run = tmp_path / "runs" / "run"
    if before != "nothing":
        run.mkdir(parents=True)
    if before == "a file":
        (run / "mine.txt").write_text("kept")
        more = []
    tokenizer = next(iter(cache.glob("tokenizers/*/tokenizer.json")), None)
    if tokenizer is None and "{tokenizer}" in "".join(more):
        assert picotrain("tokenizer", "train", *tiny(run)).returncode == 0
        tokenizer = next(cache.glob("tokenizers/*/tokenizer.json"))
    there = sorted(tmp_path.rglob("*"))
    done = picotrain("train", *tiny(run, *(word.format(tokenizer=tokenizer) for word in more)))
    assert done.returncode == 2, done.stderr
    assert sorted(tmp_path.rglob("*")) == there


def test_a_start_that_is_refused_leaves_the_other_its_folder(tmp_path, tiny):
    run = tmp_path / "run"
    with RunLock(run):
        assert picotrain("train", *tiny(run)).returncode == 2
        assert (run / LOCK_FILE).exists()
    assert not run.exists()


def test_a_folder_that_something_was_put_into_stays_with_its_lock(tmp_path):
    with RunLock(tmp_path / "runs" / "run"):
        (tmp_path / "runs" / "run" / "config.yaml").touch()
    with RunLock(tmp_path / "runs" / "other"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == [LOCK_FILE, "config.yaml", "run", "runs"]


def take_turns(run: Path, turns: int, mine: Path) -> None:
    """Get in `turns` times beside others that do the same; a line in `mine` for every time that another was in, too."""
    done = 0
    while done < turns:
        try:
            with RunLock(run):
                inside = os.open(run.parent.parent / "inside", os.O_CREAT | os.O_EXCL)  # FileExistsError: not alone
                os.close(inside)
                os.unlink(run.parent.parent / "inside")
                done += 1
        except RunError:
            pass
        except FileExistsError:
            mine.write_text("another start was in, too")
            return


def test_starts_that_take_the_folder_away_and_make_it_again_are_in_one_at_a_time(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=take_turns, args=(tmp_path / "runs" / "run", 150, tmp_path / f"overlap{number}"))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("overlap*"))
