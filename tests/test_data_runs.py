"""Runs on mixtures and on data that is broken, through the command: what is recorded, saved and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import lines, losses, picotrain, write_corpus

from picotrain import checkpoint


@pytest.fixture
def mixed(tmp_path, tiny):
    """Overrides of a run on two corpora, 3 to 1."""
    a, b = write_corpus(tmp_path / "stories", seed=1), write_corpus(tmp_path / "letters", documents=90, seed=2)

    def overrides(run_dir: Path, *more: str) -> list[str]:
        words = [word for word in tiny(run_dir) if not word.startswith("data")]
        sources = f"[{{source: {a}, weight: 0.75}}, {{source: {b}, weight: 0.25}}]"
        return [*words, "data=mixture", f"data.mixture={sources}", "data.unit_bytes=8192", *more]

    return overrides


def damage(path: Path) -> None:
    """Break the first data page and keep size and footer."""
    raw = bytearray(path.read_bytes())
    raw[4:400] = b"\xff" * 396
    path.write_bytes(raw)


def test_a_mixture_counts_tokens_and_epochs_by_source_and_resumes_exactly(tmp_path, mixed):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert picotrain("train", *mixed(straight)).returncode == 0
    assert picotrain("train", *mixed(stopped, "train.save_every=5", "train.max_steps=5", "schedule=constant")).returncode == 0
    done = picotrain("resume", str(stopped), "train.max_steps=12")
    assert done.returncode == 0, done.stderr
    assert losses(straight) == losses(stopped)

    train = lines(straight, "train")
    assert all(sum(line["source_tokens"].values()) == line["tokens"] == 256 for line in train)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["source_tokens"]["stories"] == pytest.approx(0.75 * 12 * 256, rel=0.05)
    assert summary["source_epochs"]["letters"] > summary["source_epochs"]["stories"] > 0
    report = (straight / "report.md").read_text()
    assert "| stories | 75.0 % |" in report and "| letters | 25.0 % |" in report


def test_two_ranks_draw_the_same_mixture_and_count_it_whole(tmp_path, mixed):
    one, two = tmp_path / "one", tmp_path / "two"
    assert picotrain("train", *mixed(one, "train.device_batch_size=4")).returncode == 0
    done = picotrain("train", *mixed(two, "hardware.nproc_per_node=2", "train.device_batch_size=4"))
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert [line["source_tokens"] for line in lines(one, "train")] == [line["source_tokens"] for line in lines(two, "train")]


def test_epochs_of_a_mixture_set_the_horizon_and_the_plan_says_the_passes(tmp_path, mixed):
    words = [word for word in mixed(tmp_path / "run") if not word.startswith("train.max_steps")]
    assert picotrain("data", "show", *words).returncode == 0
    assert picotrain("tokenizer", "train", *words).returncode == 0
    done = picotrain("plan", *words, "train.num_train_epochs=2", "--json")
    plan = json.loads(done.stdout)
    assert plan["horizon"] == "train.num_train_epochs" and plan["epochs"] == pytest.approx(2, rel=0.02)
    assert plan["sources"]["letters"] > 2 > plan["sources"]["stories"]


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_shard_ends_the_run_saved_and_named_and_skipping_it_goes_on(tmp_path, tiny, nproc):
    corpus = write_corpus(tmp_path / "corpus", documents=800)
    run = tmp_path / "run"
    # A start reads all of a small corpus, to count its rows: the damage comes later.
    words = tiny(run, f"data.path={corpus}", "train.max_steps=2", "train.eval_every=0", f"hardware.nproc_per_node={nproc}")
    words += ["train.device_batch_size=2"]
    assert picotrain("train", *words).returncode == 0
    damage(corpus / "shard_00001.parquet")
    done = picotrain("resume", str(run), "train.max_steps=400")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "shard_00001.parquet, row group 0, document 0 cannot be read" in done.stderr
    assert "data.on_bad_shard=skip" in done.stderr
    trained = losses(run)
    path = checkpoint.find(run / "checkpoints", "last")
    assert int(path.name.removeprefix("step_")) == len(trained) < 400
    assert [event["name"] for event in lines(run, "event")][-2:] == ["resumed", "bad_data"]
    assert json.loads((run / "summary.json").read_text())["status"] == "bad_data"

    done = picotrain("resume", str(run), "data.on_bad_shard=skip", f"train.max_steps={len(trained) + 10}")
    assert done.returncode == 0, done.stderr
    assert len(losses(run)) == len(trained) + 10
    skipped = [event["message"] for event in lines(run, "event") if event["name"] == "skipped_data"]
    assert skipped and all("shard_00001.parquet, row group" in message for message in skipped)
    assert picotrain("resume", str(run), f"train.max_steps={len(trained) + 20}").returncode == 0
    again = [event["message"] for event in lines(run, "event") if event["name"] == "skipped_data"]
    assert again[: len(skipped)] == skipped and len(set(again)) == len(again)


def test_a_shard_that_disappears_between_start_and_resume_is_named(tmp_path, tiny):
    corpus = write_corpus(tmp_path / "corpus", shards=4)
    run = tmp_path / "run"
    assert picotrain("train", *tiny(run, f"data.path={corpus}")).returncode == 0
    (corpus / "shard_00001.parquet").unlink()
    done = picotrain("resume", str(run), "train.max_steps=20")
    assert done.returncode == 2 and "the corpus is not the one this run was started with" in done.stderr


def test_no_text_column_and_a_truncated_shard_are_refused_before_the_first_step(tmp_path, tiny):
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus = write_corpus(tmp_path / "corpus", shards=4)
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), corpus / "shard_00001.parquet")
    done = picotrain("train", *tiny(tmp_path / "a", f"data.path={corpus}"))
    assert done.returncode == 2 and "has no `text` column; its columns are content, id" in done.stderr
    whole = (corpus / "shard_00002.parquet").read_bytes()
    shutil.copy(corpus / "shard_00000.parquet", corpus / "shard_00001.parquet")
    (corpus / "shard_00002.parquet").write_bytes(whole[: len(whole) // 2])
    done = picotrain("train", *tiny(tmp_path / "b", f"data.path={corpus}"))
    assert done.returncode == 2 and "shard_00002.parquet is no readable Parquet file" in done.stderr
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


def test_the_wait_for_data_is_reported_with_its_99th_percentile(tmp_path, tiny):
    run = tmp_path / "run"
    assert picotrain("train", *tiny(run)).returncode == 0
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["data_wait_share"] < 1 and summary["data_wait_p99_ms"] >= 0
    assert "99th percentile of a step's wait for data" in (run / "report.md").read_text()
