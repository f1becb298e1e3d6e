"""`picotrain data ...` as a user meets it: what it prints where, its exit codes, and its errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from conftest import write_corpus

from picotrain.cli import data as data_commands
from picotrain.cli import main
from picotrain.data import sources
from picotrain.data.corpus import scan
from picotrain.tokenizer import train_tokenizer


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `picotrain data ...` in this process."""

    def run(*words: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["picotrain", "data", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eight good documents, one of them twice, and a bad line."""
    (tmp_path / "texts").mkdir()
    for index in range(8):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"document {index}, " * 20)
    (tmp_path / "texts" / "copy.md").write_text("document 3, " * 20)
    (tmp_path / "texts" / "bad.jsonl").write_text("no json\n")
    return tmp_path / "texts"


def test_prepare_makes_a_corpus_and_says_what_it_left_out(command: Callable[..., Done], texts: Path, tmp_path: Path) -> None:
    done = command("prepare", texts, "--out", tmp_path / "out")
    assert done.code == 0
    assert "left out 1 exact duplicate\n" in done.err
    assert "skipped 1 bad line\n" in done.err
    assert "bad.jsonl:1: not JSON" in done.err
    assert f"listed in {tmp_path / 'out' / 'skipped.jsonl'}" in done.out
    assert f"picotrain train data=files data.path={tmp_path / 'out'}" in done.out
    corpus = scan(tmp_path / "out", "out")
    assert corpus.documents + corpus.val.rows == 8
    assert "kept as it is" in command("prepare", texts, "--out", tmp_path / "out").err


def test_options_of_prepare_reach_it(command: Callable[..., Done], texts: Path, tmp_path: Path) -> None:
    (texts / "short.txt").write_text("short")
    options = ["--keep-duplicates", "--min-chars", "10", "--seed", "3", "--workers", "1"]
    assert command("prepare", texts / "*.txt", texts / "copy.md", "--out", tmp_path / "out", *options).code == 0
    corpus = scan(tmp_path / "out", "out")
    assert corpus.documents + corpus.val.rows == 9
    assert corpus.origin is not None
    assert (corpus.origin["seed"], corpus.origin["min_chars"], corpus.origin["keep_duplicates"]) == (3, 10, True)


def test_strict_makes_a_bad_line_an_error(command: Callable[..., Done], texts: Path, tmp_path: Path) -> None:
    done = command("prepare", texts, "--out", tmp_path / "out", "--strict")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {texts / 'bad.jsonl'}:1: not JSON")
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_one_message(command: Callable[..., Done], texts: Path, tmp_path: Path) -> None:
    done = command("prepare", texts / "bad.jsonl", "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "gave no document" in done.err
    assert "bad.jsonl:1: not JSON" in done.err


def test_ctrl_c_says_how_to_go_on(command: Callable[..., Done], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_commands, "prepare_corpus", interrupted)
    done = command("prepare", texts, "--out", tmp_path / "out")
    assert (done.code, done.err) == (130, "interrupted; the same command goes on from here\n")


def test_inspect_shows_what_is_there(command: Callable[..., Done], tmp_path: Path) -> None:
    done = command("inspect", write_corpus(tmp_path / "corpus"), "--samples", "1")
    assert done.code == 0
    for words in (
        "3, ",
        "shard_00002.parquet validates",
        "600",
        "exact duplicates",
        "special-token text",
        "invalid UTF-8",
        "█",
        "row group",
    ):
        assert words in done.out
    assert "tokens  " not in done.out


def test_inspect_as_json_prints_one_object_and_nothing_else(command: Callable[..., Done], tmp_path: Path) -> None:
    train_tokenizer(["the cat sees the river"], 260, tmp_path / "tokenizer.json")
    corpus = write_corpus(tmp_path / "corpus")
    done = command("inspect", corpus, "--json", "--tokenizer", tmp_path / "tokenizer.json", "--max-bytes", "50000", "--samples", "2")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert found["documents"] == 600 > found["documents_read"] > 0
    assert found["bytes_per_token"] > 1
    assert len(found["samples"]) == 2


def test_inspect_finds_what_data_files_prepared(command: Callable[..., Done], texts: Path) -> None:
    (texts / "bad.jsonl").unlink()
    before = command("inspect", texts)
    assert before.code == 2
    assert f"`picotrain data prepare {texts} --out DIR`" in before.err
    assert command("show", "data=files", f"data.path={texts}").code == 0
    after = command("inspect", texts, "--json")
    assert json.loads(after.out)["documents"] == 8


def test_a_corpus_that_is_not_there_is_named(command: Callable[..., Done], tmp_path: Path) -> None:
    for name in ("inspect", "verify"):
        done = command(name, tmp_path / "nowhere")
        assert done.code == 2
        assert f"there is no {tmp_path / 'nowhere'}" in done.err
        assert "s3://bucket/corpus is remote; fetch" in command(name, "s3://bucket/corpus").err


def test_verify_is_2_when_a_shard_is_bad(command: Callable[..., Done], texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command("prepare", texts, "--out", out)
    good = command("verify", out)
    assert good.code == 0
    assert "every shard is good" in good.out
    for name in ("shard_00000.parquet", "shard_00001.parquet"):
        raw, column = bytearray((out / name).read_bytes()), pq.read_metadata(out / name).row_group(0).column(0)
        raw[column.data_page_offset + column.total_compressed_size - 3] ^= 255
        (out / name).write_bytes(raw)
    bad = command("verify", out)
    assert bad.code == 2
    assert bad.err.startswith(f"error: 2 of 2 shards in {out} are bad")
    assert "shard_00000.parquet, row group 0: " in bad.err
    assert "shard_00001.parquet, row group 0: " in bad.err


def test_verify_says_what_could_not_be_compared(command: Callable[..., Done], tmp_path: Path) -> None:
    done = command("verify", write_corpus(tmp_path / "corpus"))
    assert done.code == 0
    assert "none in origin.json: it is only known that they can be read" in done.out


@pytest.mark.parametrize("name", ["nope", "pystdlib", "files", "auto"])
def test_download_names_the_data_sets_there_are(command: Callable[..., Done], name: str) -> None:
    done = command("download", name)
    assert done.code == 2
    assert f"'{name}' is no data set on the Hub; those there are: climbmix, fineweb_edu" in done.err


def test_download_fetches_and_says_where(command: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(data, cache, say):
        asked.append(data)
        say("shard 1 of 1")
        return scan(write_corpus(tmp_path / "corpus"), data.name)

    monkeypatch.setattr(sources, "resolve", resolve)
    done = command("download", "climbmix", "--shards", "170")
    assert done.code == 0
    assert (asked[0].name, asked[0].num_shards) == ("climbmix", 170)
    assert str(tmp_path / "corpus") in done.out
    assert "shard 1 of 1" in done.err


def test_download_takes_what_a_run_of_these_words_needs(
    command: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(data, cache, say):
        asked.append(data.num_shards)
        return scan(corpus, data.name)

    corpus = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(sources, "resolve", resolve)
    for words in ([], ["model=d12"], ["model=d12", "data.num_shards=5"]):
        done = command("download", "climbmix", *words)
        assert done.code == 0
        assert (f"{asked[-1]} training shards" in done.err) == (asked[-1] != 5)
    assert asked[0] < asked[1] and asked[2] == 5


def test_download_refuses_more_shards_than_there_are(command: Callable[..., Done]) -> None:
    done = command("download", "climbmix", "--shards", "7000")
    assert done.code == 2
    assert "num_shards" in done.err


@pytest.mark.parametrize("name", ["prepare", "inspect", "verify", "download"])
def test_help_teaches_with_an_example(command: Callable[..., Done], name: str) -> None:
    done = command(name, "--help")
    assert done.code == 0
    assert f"  picotrain data {name} " in done.out
