"""Preparing a corpus: nothing lost, nothing on both sides, the same shards every time, and words for bad input."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain.data import prepare as prepare_module
from picotrain.data.corpus import ORIGIN, Corpus, Shard, default_unit_bytes, read_texts, units
from picotrain.data.prepare import CUT_ABOVE, CUT_NEAR, INPUTS, cut_plain_text, expand, locked, prepare
from picotrain.errors import DataError

DOCUMENTS = [f"document {i}: " + "lorem ipsum " * (i % 7) for i in range(60)]


def texts_of(corpus: Corpus, shard: Shard) -> list[str]:
    return [text for rg in range(len(shard.row_groups)) for text in read_texts(corpus.root, shard, rg)]


def split_of(corpus: Corpus) -> tuple[list[str], list[str]]:
    """(training, validation) texts in the order they are stored."""
    return [text for shard in corpus.shards for text in texts_of(corpus, shard)], texts_of(corpus, corpus.val)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every format that is read, nested, beside files that are not."""
    root = tmp_path / "input"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "a.txt").write_text("plain text")
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (root / "b.md").write_text("# markdown\n\nnaïve 🙂\n")
    (root / "sub" / "c.py").write_text("print('code')\n")
    (root / "sub" / "empty.txt").write_text(" \n ")
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n\n" for i in range(3)).encode()
    (root / "sub" / "d.jsonl").write_bytes(lines.replace(b"line", b"json"))
    (root / "sub" / "deep" / "e.jsonl.gz").write_bytes(gzip.compress(lines.replace(b"line", b"gzip")))
    with pa.CompressedOutputStream(str(root / "sub" / "deep" / "f.jsonl.zst"), "zstd") as stream:
        stream.write(lines.replace(b"line", b"zstd"))
    pq.write_table(pa.table({"text": ["parquet 0", None, "parquet 1"], "n": [1, 2, 3]}), root / "g.parquet", row_group_size=2)
    (root / "image.png").write_bytes(b"\x89PNG")
    (root / ".hidden" / "secret.txt").write_text("hidden")
    (root / ".dot.txt").write_text("hidden")
    return root


def test_every_format_gives_its_documents_and_their_sources(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    corpus = prepare(folder, tmp_path / "out", say=said.append)
    train, val = split_of(corpus)
    expected = ["plain text", "with a mark", "# markdown\n\nnaïve 🙂\n", "print('code')\n", "parquet 0", "parquet 1"]
    expected += [f"{kind} {i}" for kind in ("json", "gzip", "zstd") for i in range(3)]
    assert sorted(train + val) == sorted(expected)
    assert len(val) >= 1
    assert "left out 2 empty documents" in said
    sources = pq.read_table(corpus.root / corpus.shards[0].name).to_pylist()
    assert {row["source"] for row in sources if row["text"].startswith("gzip")} <= {"sub/deep/e.jsonl.gz"}


def test_the_last_shard_validates_and_no_text_stands_on_both_sides(tmp_path: Path) -> None:
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS + DOCUMENTS), tmp_path / "out")
    train, val = split_of(corpus)
    assert corpus.val.name > max(shard.name for shard in corpus.shards)
    assert sorted(train + val) == sorted(DOCUMENTS + DOCUMENTS)
    assert not set(train) & set(val)


def test_about_five_percent_validate(tmp_path: Path) -> None:
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", [f"document {i}" for i in range(4000)]), tmp_path / "out")
    assert 140 < corpus.val.rows < 260


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=12))
def test_any_two_different_documents_make_a_corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    real = [text for text in texts if text.strip()]
    if len(set(real)) < 2:
        with pytest.raises(DataError, match="at least two different ones"):
            prepare(path, tmp_path / "out")
        return
    train, val = split_of(prepare(path, tmp_path / "out"))
    assert sorted(train + val) == sorted(real)
    assert train
    assert val
    assert not set(train) & set(val)


def test_a_document_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    few = prepare(write_jsonl(tmp_path / "few.jsonl", DOCUMENTS), tmp_path / "few")
    more = prepare(write_jsonl(tmp_path / "more.jsonl", [*DOCUMENTS, *(f"new {i}" for i in range(100))]), tmp_path / "more")
    assert set(split_of(few)[1]) <= set(split_of(more)[1])


def test_the_order_is_shuffled_and_the_same_every_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    first, second = prepare(path, tmp_path / "one"), prepare(path, tmp_path / "two")
    train = split_of(first)[0]
    assert train == split_of(second)[0]
    assert first.fingerprint == second.fingerprint
    places = [DOCUMENTS.index(text) for text in train]
    assert places != sorted(places)
    assert abs(sum(places[:20]) / 20 - sum(places[-20:]) / 20) < 25  # no drift from early to late


def test_row_groups_give_the_lanes_work(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [f"{i} " + "word " * rng.randint(10, 4000) for i in range(500)]
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out")
    total = corpus.text_bytes
    found = units(corpus.shards, default_unit_bytes(512))
    assert len(found) >= total / (1.15 * (1 << 20)) - 1
    small = prepare(write_jsonl(tmp_path / "y.jsonl", texts[:100]), tmp_path / "small")
    assert 12 <= sum(len(shard.row_groups) for shard in small.shards) <= 17  # about a sixteenth each


def test_large_corpora_get_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1000)
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "out")
    assert len(corpus.shards) >= 2
    assert [shard.name for shard in (*corpus.shards, corpus.val)] == [f"shard_{i:05d}.parquet" for i in range(len(corpus.shards) + 1)]
    train, val = split_of(corpus)
    assert sorted(train + val) == sorted(DOCUMENTS)


def test_the_origin_says_what_was_made_of_what(folder: Path, tmp_path: Path) -> None:
    corpus = prepare(folder, tmp_path / "out")
    assert corpus.origin is not None
    assert corpus.origin["files"] == 9
    assert corpus.origin["train_documents"] == corpus.documents
    assert corpus.origin["val_documents"] == corpus.val.rows
    listed = json.loads((tmp_path / "out" / INPUTS).read_text())
    assert [entry[0] for entry in listed] == sorted(entry[0] for entry in listed)
    assert ["a.txt", 10] in [entry[:2] for entry in listed]


def test_unchanged_input_is_reused_and_changed_input_rebuilt(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "out"
    first = prepare(path, out)
    stamp = (out / ORIGIN).stat().st_mtime_ns
    os.utime(path)
    assert prepare(path, out) == first
    assert (out / ORIGIN).stat().st_mtime_ns == stamp
    write_jsonl(path, [*DOCUMENTS[:-1], DOCUMENTS[-1].replace("59", "95")])  # as many bytes as before
    changed = prepare(path, out)
    assert changed.fingerprint != first.fingerprint
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_a_folder_of_someone_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out is there and was not made by picotrain"):
        prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_a_failed_call_leaves_the_old_corpus_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "out"
    first = prepare(path, out)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    write_jsonl(path, DOCUMENTS[:-1])
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"out cannot be written: No space left on device; free space"):
        patch.setattr(prepare_module, "_write_shard", full)
        prepare(path, out)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "x.jsonl"]
    assert split_of(first)[0]


def _prepare_slowly(path: Path, out: Path) -> None:
    write = prepare_module._write_shard
    prepare_module._write_shard = lambda *arguments: (time.sleep(60), write(*arguments))
    prepare(path, out)


def test_a_killed_call_does_not_block_the_next(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(path, out))
    process.start()
    while not (tmp_path / ".out.partial").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not out.exists()
    assert prepare(path, out).documents > 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_processes_at_the_same_time_make_one_corpus(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    code = (
        "from pathlib import Path; from picotrain.data.prepare import prepare\n"
        f"print(prepare({str(path)!r}, Path({str(tmp_path / 'out')!r})).fingerprint)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert [process.returncode for process in started] == [0, 0, 0]


def test_a_lock_is_waited_for_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from picotrain.data.prepare import locked\n"
        f"with locked(Path({str(tmp_path / 'thing')!r})): print('held', flush=True); time.sleep(0.5)"
    )
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        started = time.monotonic()
        with locked(tmp_path / "thing", said.append):
            assert time.monotonic() - started > 0.2
    assert len(said) == 1
    assert "waiting for another process" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_one_document_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(DataError, match=r"one\.txt gave one document, .* at least two different ones.*over 256 KB"):
        prepare(tmp_path / "one.txt", tmp_path / "out")
    with pytest.raises(DataError, match="3 documents, all the same"):
        prepare(write_jsonl(tmp_path / "same.jsonl", ["same"] * 3), tmp_path / "out")
    (tmp_path / "one.txt").write_text("\n")
    with pytest.raises(DataError, match="gave no document"):
        prepare(tmp_path / "one.txt", tmp_path / "out")


def paragraphs(total: int) -> str:
    rng = random.Random(1)
    parts = []
    while sum(map(len, parts)) < total:
        parts.append(f"{len(parts)} " + "words and " * rng.randint(1, 60) + "\n\n")
    return "".join(parts)


def test_one_long_plain_text_is_cut_at_blank_lines_and_it_is_said(tmp_path: Path) -> None:
    text, said = paragraphs(CUT_ABOVE + 1000), []
    (tmp_path / "long.txt").write_text(text)
    corpus = prepare(tmp_path / "long.txt", tmp_path / "out", say=said.append)
    train, val = split_of(corpus)
    assert sum(map(len, train + val)) == len(text)
    assert all(piece.endswith("\n\n") and piece in text for piece in train + val)
    assert any("long.txt is a plain text over 256 KB: cut into" in line for line in said)
    (tmp_path / "long.py").write_text(text)
    with pytest.raises(DataError, match="one document"):  # source code is not cut
        prepare(tmp_path / "long.py", tmp_path / "code")


@settings(max_examples=40, deadline=None)
@given(unit=st.text(st.sampled_from("ab é\n\r"), min_size=1, max_size=40), size=st.integers(CUT_ABOVE - 50, CUT_ABOVE * 2))
def test_cutting_loses_nothing_and_makes_even_pieces(unit: str, size: int) -> None:
    text = (unit * (size // len(unit) + 1))[:size]
    pieces = cut_plain_text(text)
    assert "".join(pieces) == text
    if size <= CUT_ABOVE:
        assert pieces == [text]
    else:
        assert all(CUT_NEAR // 2 <= len(piece) <= CUT_NEAR * 3 // 2 for piece in pieces)


def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good" * 300 + b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 0xff at offset 1,200\); convert it"):
        prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_utf8_can_be_skipped_with_a_count(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xff")
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "c.py").write_text("c")
    said: list[str] = []
    corpus = prepare(tmp_path, tmp_path.parent / "out-skip", undecodable="skip", say=said.append)
    assert "skipped 1 files that are not UTF-8" in said
    assert corpus.origin is not None
    assert corpus.origin["undecodable"] == ["a.py"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not JSON"),
        ('{"text": "cut', "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"content": "x", "url": "y"}', "no field `text`; its fields are content, url"),
        ('{"text": 3}', "`text` is int, not a string"),
        ('{"text": null}', "`text` is NoneType, not a string"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_lines_are_counted_and_the_first_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    with path.open("a") as file:
        file.write(f"{line}\n\n[]\n")
    with pytest.raises(DataError) as error:
        prepare(path, tmp_path / "out")
    assert f"{path} has 2 bad lines, the first is {path}:61: " in str(error.value)
    assert reason in str(error.value)


def test_a_truncated_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        prepare(tmp_path, tmp_path / "out")


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has no `text` column; its columns are content"):
        prepare(tmp_path / "x.parquet", tmp_path / "out")


def test_globs_lists_and_single_files_name_their_files(folder: Path) -> None:
    assert [file.source for file in expand(folder / "*.txt")] == ["a.txt", "bom.txt"]
    assert [file.source for file in expand(str(folder / "**" / "*.jsonl*"))] == ["d.jsonl", "deep/e.jsonl.gz", "deep/f.jsonl.zst"]
    assert [file.source for file in expand([folder / "b.md", folder / "a.txt", folder / "b.md"])] == ["b.md", "a.txt"]
    (folder / "odd[1].txt").write_text("brackets")
    assert [file.source for file in expand(folder / "odd[1].txt")] == ["odd[1].txt"]
    assert not any(".hidden" in file.source or ".dot" in file.source for file in expand(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inptu", r"there is no .*/inptu; .* exists and holds 'input'"),
        ("input/image.png", r"image\.png: cannot read a \.png; known are \.txt, \.md"),
        ("input/*.doc", r"nothing that can be read matches .*\*\.doc"),
        ("input/.hidden/x", r"there is no .*/x"),
    ],
)
def test_inputs_that_cannot_be_used_are_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand(folder.parent / name)


def test_an_empty_folder_names_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file that can be read; known are \.txt, \.md, \.py, \.jsonl"):
        expand(tmp_path)


def test_progress_ends_at_all_bytes(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(folder, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 9
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(file.path.stat().st_size for file in expand(folder))
