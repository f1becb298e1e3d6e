"""Folders as people have them: split names, odd things in them, files of somebody else, shards that go away; each in words."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import benchmark, lines, losses, picotrain, write_corpus
from servers import FileServer
from test_bundle import tar_info, tar_of

from picotrain import report
from picotrain.checkpoint.folder import is_checkpoint
from picotrain.config.schema import DataConfig
from picotrain.data import inspect as inspecting
from picotrain.data.corpus import MANIFEST, ORIGIN, BadShard, read_footer, scan
from picotrain.data.prepare import HARMLESS, KINDS, SKIPPED, Options, prepare
from picotrain.data.sources import known, resolve
from picotrain.errors import DataError, RunError
from picotrain.evaluation import fetch as fetching
from picotrain.evaluation.fetch import unpack
from picotrain.lock import RunLock

Tiny = Callable[..., list[str]]


def shard(folder: Path, name: str, rows: int = 4, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [f"{name} {row}" for row in range(rows)], **columns}), folder / name)
    return folder / name


def shards(folder: Path, *names: str) -> Path:
    for name in names:
        shard(folder, name)
    return folder


def split(root: Path, **options: Any) -> tuple[list[str], str, str]:
    """The shards that train, the one that validates, and what was said."""
    said: list[str] = []
    corpus = scan(root, "mine", say=said.append, **options)
    return [one.name for one in corpus.shards], corpus.val.name, "\n".join(said)


# --- which shards train --------------------------------------------------------------------------

SPLITS: dict[str, tuple[list[str], list[str], str]] = {  # all names -> those that train, the one that validates
    "hub": (["test-0.parquet", "train-0.parquet", "train-1.parquet"], ["train-0.parquet", "train-1.parquet"], "test-0.parquet"),
    "three": (["test-0.parquet", "train-0.parquet", "validation-0.parquet"], ["train-0.parquet"], "validation-0.parquet"),
    "words": (["a.training.parquet", "b_dev.parquet", "c-testing-1.parquet"], ["a.training.parquet"], "b_dev.parquet"),
    "unnamed": (["part-0.parquet", "part-1.parquet", "Valid.parquet"], ["part-0.parquet", "part-1.parquet"], "Valid.parquet"),
    "extra": (["extra.parquet", "train.parquet", "val.parquet"], ["train.parquet"], "val.parquet"),
    "many": (["train_0.parquet", "val_0.parquet", "val_1.parquet"], ["train_0.parquet"], "val_0.parquet"),
    "prefix": (["test-set-train.parquet", "test-set-val.parquet"], ["test-set-train.parquet"], "test-set-val.parquet"),
    "no split": (["a.parquet", "b.parquet", "latest.parquet"], ["a.parquet", "b.parquet"], "latest.parquet"),
    "one split": (["train-0.parquet", "train-1.parquet", "x.parquet"], ["train-0.parquet", "train-1.parquet"], "x.parquet"),
    "inside a word": (["a.parquet", "contest.parquet", "devices.parquet"], ["a.parquet", "contest.parquet"], "devices.parquet"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_names_of_splits_say_what_trains_and_what_validates(tmp_path: Path, case: str) -> None:
    names, train, val = SPLITS[case]
    found = split(shards(tmp_path / "c", *names))
    assert found[:2] == (train, val)
    left = set(names) - {*train, val}
    assert all(name in found[2] for name in left) and (val in found[2] or not left)


def test_a_named_validation_shard_beats_the_names_and_what_is_held_out_never_trains(tmp_path: Path) -> None:
    root = shards(tmp_path / "c", "test-0.parquet", "train-0.parquet", "train-1.parquet", "val-0.parquet")
    assert split(root, val_shard="train-1.parquet")[:2] == (["train-0.parquet"], "train-1.parquet")


def test_a_folder_behind_a_url_follows_the_same_rules(tmp_path: Path) -> None:
    root = shards(tmp_path / "c", "._a.parquet", "test-0.parquet", "train-0.parquet", "train-1.parquet")
    (root / "notes.txt").write_text("x")
    server, said = FileServer(root), []
    try:
        corpus = resolve(DataConfig(kind="files", name="c", path=server.url), tmp_path / "cache", said.append)
    finally:
        server.close()
    assert [one.name for one in corpus.shards] == ["train-0.parquet", "train-1.parquet"] and corpus.val.name == "test-0.parquet"
    assert "test-0.parquet validates" in "\n".join(said) and "1 .txt, 1 hidden" in "\n".join(said)


def test_hidden_files_are_no_shards_and_odd_things_are_left_out_with_a_word(tmp_path: Path) -> None:
    root = shards(tmp_path / "c", "a.parquet", "b.parquet")
    for name in ("._a.parquet", ".~tmp.parquet", "z.parquet.part"):
        shutil.copy(root / "a.parquet", root / name)
    (root / "c.parquet").symlink_to(root / "c.parquet")
    (root / "d.parquet").symlink_to(tmp_path / "nowhere")
    (root / "e.parquet").mkdir()
    os.mkfifo(root / "f.parquet")
    (root / "g.parquet").symlink_to(root / "a.parquet")
    (root / "texts.jsonl.gz").write_bytes(b"")
    (root / "sub").mkdir()
    (Path(os.fsdecode(os.fsencode(root) + b"/h\xff.parquet"))).write_bytes(b"x")
    train, val, said = split(root)
    assert (train, val) == (["a.parquet", "b.parquet"], "g.parquet")
    for word in ("c.parquet", "d.parquet", "e.parquet", "f.parquet is left out: named pipe", "udcff", "2 hidden", "1 .jsonl.gz", "1 .part"):
        assert word in said, (word, said)
    assert inspecting.verify(root).shards == 3 and inspecting.inspect(root).validation_shard == "g.parquet"


# --- nothing of somebody else's is replaced ------------------------------------------------------

FOREIGN = [b'{"title": "mine"}', b'{"files": []}', b"no json", b"[1, 2]"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_data_json_of_the_users_stays_and_their_folder_gets_no_file(tmp_path: Path, content: bytes) -> None:
    root, data = shards(tmp_path / "c", "a.parquet", "b.parquet"), DataConfig(kind="files", name="c", path=str(tmp_path / "c"))
    assert known(data, tmp_path / "cache") and not (root / MANIFEST).exists()
    (root / MANIFEST).write_bytes(content)
    os.utime(root / "a.parquet", (1, 1))
    assert known(data, tmp_path / "cache") == scan(root, "c")
    assert (root / MANIFEST).read_bytes() == content


def test_a_folder_is_looked_at_once_and_remembered_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from picotrain.data import corpus

    root, cache = shards(tmp_path / "c", "a.parquet", "b.parquet"), tmp_path / "cache"
    first = scan(root, "c", cache=cache)
    monkeypatch.setattr(corpus, "read_footer", lambda path: pytest.fail(f"{path} was read"))
    assert scan(root, "c", cache=cache) == first
    write = root / "a.parquet"
    write.write_bytes(write.read_bytes()[:-8] + b"\0\0\0\0PAR1")
    assert "fingerprint" in str(inspecting.verify(root, cache=cache).bad) or "Parquet" in str(inspecting.verify(root, cache=cache).bad)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text {number}")
    return folder


@pytest.mark.parametrize("name", ["out/precious.txt", "out/notes/a.txt", ".out.partial/a.txt", ".out.old/a.txt", ".out.lock", "out"])
def test_preparing_removes_nothing_that_it_did_not_make(texts: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    if name.startswith("out/"):
        prepare(texts, out)
    precious = tmp_path / name
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("mine")
    (texts / "new.txt").write_text("a new text")
    with pytest.raises(DataError, match="picotrain"):
        prepare(texts, out)
    assert precious.read_text() == "mine"


def test_a_folder_of_another_program_with_an_origin_json_is_not_replaced(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ORIGIN).write_text('{"kind": "roses"}')
    with pytest.raises(DataError, match="not made by picotrain"):
        prepare(texts, tmp_path / "out")


def test_a_lock_file_of_another_program_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(RunError, match="no lock"), RunLock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


# --- what prepare leaves -------------------------------------------------------------------------


def listed(out: Path) -> dict[str, str]:
    return {entry["source"]: entry["kind"] for entry in map(json.loads, (out / SKIPPED).read_text().splitlines())}


def test_what_is_not_read_is_counted_by_kind_and_listed(texts: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("a secret outside")
    for name in ("a.log", "b.log", "c.doc", "README", ".hidden.txt"):
        (texts / name).write_text("x")
    (texts / "leads_out.txt").symlink_to(outside)
    (texts / "stays.txt").symlink_to(texts / "0.txt")
    (texts / "loop").symlink_to(texts)
    os.mkfifo(texts / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(texts / "s.txt"))
        (texts / ".git").mkdir()
        said: list[str] = []
        corpus = prepare(texts, tmp_path / "out", say=said.append)
    assert corpus.documents + corpus.val.rows == 6
    kinds = listed(tmp_path / "out")
    assert {"leads_out.txt": "link", "loop": "link", "pipe.txt": "no file", "s.txt": "no file", ".git": "hidden"}.items() <= kinds.items()
    assert {name for name, kind in kinds.items() if kind == "not read"} == {"a.log", "b.log", "c.doc", "README"}
    assert any("4 files" in line and "2 .log" in line and "1 .doc" in line and "1 without a suffix" in line for line in said), said
    assert corpus.origin is not None and corpus.origin["skipped"]["not read"] == 4


def test_training_on_a_folder_with_a_pipe_does_not_wait_and_says_what_is_not_read(texts: Path, tmp_path: Path) -> None:
    os.mkfifo(texts / "pipe.txt")
    (texts / "a.log").write_text("x")
    said: list[str] = []
    corpus = resolve(DataConfig(kind="files", name="texts", path=str(texts)), tmp_path / "cache", said.append)
    assert corpus.documents + corpus.val.rows == 6
    assert sum("1 .log" in line for line in said) == 1 and any("named pipe" in line for line in said)


def test_names_that_are_not_utf8_are_written_by_their_bytes(texts: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(texts) + b"/n\xff.txt")).write_text("odd name")
    corpus = prepare(texts, tmp_path / "out")
    names = [name for one in (*corpus.shards, corpus.val) for name in pq.read_table(corpus.root / one.name)["source"].to_pylist()]
    assert "n\\xff.txt" in names


# --- Parquet -------------------------------------------------------------------------------------


def renamed(path: Path, old: bytes, new: bytes) -> bytes:
    raw = path.read_bytes()
    assert len(old) == len(new) and old in raw
    return raw.replace(old, new)


def bad_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """File -> its bytes, and what has to be said."""
    good = shard(folder, "good.parquet").read_bytes()
    other = shard(folder, "other.parquet", tex2=["x"] * 4)
    named = shard(folder, "named.parquet", odd=["x"] * 4)
    pq.write_table(pa.table({"text": pa.nulls(3)}), folder / "nulls.parquet")
    pq.write_table(pa.table({"text": pa.array([[b"a"]])}), folder / "list.parquet")
    pq.write_table(pa.table({"meta": [{"text": "a"}]}), folder / "nested.parquet")
    pq.write_table(pa.table({"text": [b"a"]}), folder / "binary.parquet")
    return {
        "twice": (renamed(other, b"tex2", b"text"), "2 columns named `text`"),
        "name": (renamed(named, b"odd", b"\xff\xfed"), "not UTF-8"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        "encrypted": (b"PARE" + good[4:-4] + b"PARE", "encrypted Parquet"),
        "gzip": (gzip.compress(good), "gzip"),
        "html": (b"<!DOCTYPE html><html>404</html>", "HTML"),
        "json": (b'{"error": "no access"}', "JSON"),
        "empty": (b"", "empty"),
        "cut": (good[: len(good) // 2], "truncated"),
        "nulls": ((folder / "nulls.parquet").read_bytes(), "holds null, not strings"),
        "list": ((folder / "list.parquet").read_bytes(), "not strings"),
        "nested": ((folder / "nested.parquet").read_bytes(), "no `text` column"),
        "binary": ((folder / "binary.parquet").read_bytes(), "holds binary, not strings"),
    }


BAD = ["twice", "name", "lfs", "encrypted", "gzip", "html", "json", "empty", "cut", "nulls", "list", "nested", "binary"]


@pytest.mark.parametrize("case", BAD)
def test_a_parquet_file_that_is_no_shard_is_called_by_name_everywhere(tmp_path: Path, case: str) -> None:
    content, says = bad_files(tmp_path / "files")[case]
    root = shards(tmp_path / "c", "a.parquet", "c.parquet")
    (root / "b.parquet").write_bytes(content)
    for look in (lambda: scan(root, "c"), lambda: inspecting.inspect(root), lambda: prepare(root, tmp_path / "x", options=Options())):
        with pytest.raises(DataError) as error:
            look()
        assert "b.parquet" in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert [one.shard for one in inspecting.verify(root).bad] == ["b.parquet"]
    assert prepare(root, tmp_path / "out", options=Options(tolerated=KINDS)).documents
    assert listed(tmp_path / "out") == {"b.parquet": "unreadable"}


def test_a_footer_changed_anywhere_is_read_or_refused_in_words(tmp_path: Path) -> None:
    """Every byte of a small footer, and 2 values of each: among them what ends pyarrow's process where it is not found before."""
    path = shard(tmp_path, "a.parquet", extra=["x"] * 4)
    raw = path.read_bytes()
    length = struct.unpack("<I", raw[-8:-4])[0]
    refused = 0
    for place in range(len(raw) - 8 - length, len(raw) - 4):
        for mask in (0x01, 0x10):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :])
            try:
                one = read_footer(path)
                assert all(group.rows >= 0 and group.text_bytes >= 0 for group in one.row_groups)
            except BadShard as error:
                refused += 1
                assert error.name == "a.parquet" and "a.parquet" in str(error)
    assert refused > 50


def test_row_groups_without_rows_are_read(tmp_path: Path) -> None:
    root = shards(tmp_path / "c", "a.parquet", "c.parquet")
    table = pa.table({"text": ["x", "y"]})
    with pq.ParquetWriter(root / "b.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)
    corpus = scan(root, "c")
    assert [group.rows for group in corpus.shards[1].row_groups][-2:] == [2, 0] or corpus.shards[1].rows == 2
    assert not inspecting.verify(root).bad


# --- compressed lines ----------------------------------------------------------------------------

LINES = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)).encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
LONG = b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + struct.pack("<I", (4 << 3) | 1)[:3] + b"abcd"  # a window of 2 GiB


@pytest.mark.parametrize(
    ("name", "data", "count", "says"),
    [
        ("zeros.jsonl.gz", gzip.compress(LINES) + bytes(5000), 20, ""),
        ("parts.jsonl.gz", gzip.compress(LINES[:200]) + gzip.compress(LINES[200:]), 20, ""),
        ("padded.jsonl.gz", gzip.compress(LINES[:200]) + bytes(512) + gzip.compress(LINES[200:]), 20, ""),
        ("rest.jsonl.gz", gzip.compress(LINES) + b"garbage", 20, "no gzip"),
        ("cut.jsonl.gz", gzip.compress(LINES * 50)[:-30], None, "end"),
        ("parts.jsonl.zst", SKIPPABLE + zstd(LINES[:200]) + SKIPPABLE + zstd(LINES[200:]), 20, ""),
        ("rest.jsonl.zst", zstd(LINES) + bytes(64), None, "ZSTD"),
        ("long.jsonl.zst", LONG, None, "--long"),
    ],
)
def test_compressed_files_are_read_wholly_or_named(tmp_path: Path, name: str, data: bytes, count: int | None, says: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "more.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    corpus = prepare(tmp_path / "in", tmp_path / "out", options=Options(tolerated=KINDS))
    if count is not None:
        assert corpus.documents + corpus.val.rows == count + 2
    if says:
        entries = [json.loads(line) for line in (tmp_path / "out" / SKIPPED).read_text().splitlines()]
        assert [entry["source"] for entry in entries if says in entry["reason"]] == [name], entries
        with pytest.raises(DataError, match=name):
            prepare(tmp_path / "in", tmp_path / "strict", options=Options(tolerated=HARMLESS))


# --- bundles -------------------------------------------------------------------------------------


def test_a_small_zip_that_unpacks_to_far_more_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(str(number), bytes(30 << 20))
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_asked_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", "x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, fetching.SPARE_BYTES + 10))
    with pytest.raises(DataError, match="disk has room for"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a", "a/"), ("a/", "a")])
def test_a_name_that_is_file_and_folder_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    tar_of(
        tmp_path / "a.tar",
        *((tar_info(name.rstrip("/"), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE), b"") for name in names),
    )
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in names:
            file.writestr(name, "")
    for archive in ("a.tar", "a.zip"):
        with pytest.raises(DataError, match="'a"):
            unpack(tmp_path / archive, tmp_path / f"{archive}.out")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_huge_extended_header_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    info = tar_info("header", kind)
    info.size = 3 << 30
    for name, wrap in (("a.tar", open), ("a.tar.gz", gzip.open)):
        with wrap(tmp_path / name, "wb") as file:  # type: ignore[operator]
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))
        with pytest.raises(DataError, match="header of 3,221,225,"):
            unpack(tmp_path / name, tmp_path / f"{name}.out")


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """A folder with a corpus and a run of 12 steps on it."""
    home = tmp_path_factory.mktemp("original")
    corpus = write_corpus(home / "corpus", shards=4)
    done = picotrain("train", *tiny(home / "run", f"data.path={corpus}", "train.eval_every=0"))
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def run(tmp_path: Path, original: Path) -> tuple[Path, Path]:
    """A run of 12 steps and its corpus, moved here."""
    home = tmp_path / "home"
    shutil.copytree(original, home)
    for name in ("run/config.yaml", "run/data.json"):
        (home / name).write_text((home / name).read_text().replace(str(original), str(home)))
    return home / "run", home / "corpus"


CHANGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "no readable Parquet file": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_whose_shard_went_bad_names_it_and_goes_on_without_it(run: tuple[Path, Path], what: str) -> None:
    run_dir, corpus = run
    CHANGES[what](corpus / "shard_00001.parquet")
    done = picotrain("resume", str(run_dir), "train.max_steps=40")
    assert done.returncode == 2 and "shard_00001.parquet" in done.stderr and what in done.stderr, done.stderr
    advice = done.stderr.split("picotrain resume ", 1)[1].split()[:2]
    assert "shard_00000" not in done.stderr
    done = picotrain("resume", *advice, "train.max_steps=40")
    assert done.returncode == 0, done.stderr
    assert len(losses(run_dir)) == 40 and {line["pq"] for line in lines(run_dir, "train") if line["step"] > 16} <= {0, 2}
    events = [event["message"] for event in lines(run_dir, "event") if event["name"] == "skipped_data"]
    assert events and all("shard_00001.parquet" in text for text in events) and len(events) == len(set(events))


def test_the_shard_that_validates_cannot_be_passed_over_and_new_ones_are_named(run: tuple[Path, Path]) -> None:
    run_dir, corpus = run
    shutil.copy(corpus / "shard_00000.parquet", corpus / "shard_00009.parquet")
    done = picotrain("resume", str(run_dir), "train.max_steps=20")
    assert done.returncode == 2 and "shard_00009.parquet was added" in done.stderr
    done = picotrain("resume", str(run_dir), "train.max_steps=20", "data.on_bad_shard=skip")
    assert done.returncode == 0 and "shard_00009.parquet was added" in done.stderr
    (corpus / "shard_00003.parquet").unlink()
    done = picotrain("resume", str(run_dir), "train.max_steps=30", "data.on_bad_shard=skip")
    assert done.returncode == 2 and "shard_00003.parquet is missing, and it validates" in done.stderr


def test_rows_of_the_other_units_come_in_the_same_order_without_a_shard(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from picotrain.data.lanes import Cursor, Reader, Stream
    from picotrain.data.mixture import Source

    root = write_corpus(tmp_path / "c", shards=4)
    corpus = scan(root, "c")

    def rows(count: int, cursor: Cursor) -> tuple[list[tuple[int, bytes]], Reader]:
        stream = Stream(Source(corpus), benchmark("corpus").Bytes(), 32, 8192, 2, 0, lambda error: None)
        with ThreadPoolExecutor(1) as pool:
            reader, found = Reader(stream, 0, cursor, pool, 0.5), []
            while len(found) < count:
                row = reader.next_row()
                assert row is not None
                found.append((stream.unit(reader.cursor.position).shard, row.tobytes()))
        return found, reader

    whole, _ = rows(4000, Cursor(0))
    lost = whole[0][0]
    _, reader = rows(5, Cursor(0))  # in the middle of a slice of the shard that is lost
    (root / corpus.shards[lost].name).unlink()
    kept = [row for shard, row in whole[5:] if shard != lost]
    assert [row for _, row in rows(1000, reader.cursor)[0]] == kept[:1000]


def test_a_start_that_skips_passes_over_what_cannot_be_read(tmp_path: Path, tiny: Tiny) -> None:
    corpus = write_corpus(tmp_path / "corpus", shards=4)
    (corpus / "shard_00001.parquet").write_bytes((corpus / "shard_00001.parquet").read_bytes()[:-9])
    raw = bytearray((corpus / "shard_00000.parquet").read_bytes())
    raw[4:400] = b"\xff" * 396  # its first page, which the tokenizer wants
    (corpus / "shard_00000.parquet").write_bytes(raw)
    words = tiny(tmp_path / "run", f"data.path={corpus}", "train.eval_every=0")
    assert picotrain("train", *words).returncode == 2
    done = picotrain("train", *words, "data.on_bad_shard=skip")
    assert done.returncode == 0, done.stderr
    assert "shard_00001.parquet" in done.stderr and "shard_00000.parquet" in done.stderr
    assert len(losses(tmp_path / "run")) == 12
    done = picotrain("resume", str(tmp_path / "run"), "train.max_steps=14")
    assert done.returncode == 0, done.stderr


def test_a_run_of_the_old_rule_goes_on_with_the_shards_that_its_data_json_names(run: tuple[Path, Path], tiny: Tiny) -> None:
    """What an earlier version recorded: a hidden file, the test split trained on, the last by name validates."""
    run_dir, corpus = run
    names = {"shard_00000.parquet": "._a.parquet", "shard_00001.parquet": "test-0.parquet", "shard_00002.parquet": "train-0.parquet"}
    names["shard_00003.parquet"] = "train-1.parquet"
    for old, new in names.items():
        (corpus / old).rename(corpus / new)
    text = (run_dir / "data.json").read_text()
    for old, new in names.items():
        text = text.replace(old, new)
    data = json.loads(text)
    from picotrain.data.mixture import Mixture

    data["corpus"]["fingerprint"] = Mixture.from_json(data["corpus"]).fingerprint
    (run_dir / "data.json").write_text(json.dumps(data))
    done = picotrain("resume", str(run_dir), "train.max_steps=14")
    assert done.returncode == 0, done.stderr
    now = json.loads((run_dir / "data.json").read_text())["corpus"]
    assert [one["name"] for one in now["shards"]] == ["._a.parquet", "test-0.parquet", "train-0.parquet"]
    (corpus / "._a.parquet").unlink()
    done = picotrain("resume", str(run_dir), "train.max_steps=16")
    assert done.returncode == 2 and "._a.parquet is missing" in done.stderr


@pytest.mark.parametrize("name", ["checkpoints/best", "checkpoints/latest", "checkpoints/step_00000012/metrics.json", "summary.json"])
def test_a_folder_in_the_place_of_a_file_is_named(run: tuple[Path, Path], name: str) -> None:
    run_dir, _ = run
    path = run_dir / name
    path.unlink(missing_ok=True)
    path.mkdir()
    done = picotrain("resume", str(run_dir), "train.max_steps=14")
    assert done.returncode == 2 and f"{path} is a folder" in done.stderr and "Traceback" not in done.stderr


def test_a_report_replaces_no_file_of_somebody_else(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = run
    foreign = {
        "report.md": b"# My own notes\n",
        "report.html": b"<html>mine</html>",
        "summary.json": b'{"mine": 1}',
        "loss.png": b"\x89PNG\r\n!Software",
    }
    for name, content in foreign.items():
        (run_dir / name).write_bytes(content)
    report.write_report(run_dir)
    said = capsys.readouterr().err
    for name, content in foreign.items():
        assert (run_dir / name).read_bytes() == content and name in said
        (run_dir / name).unlink()
    report.write_report(run_dir)
    report.write_report(run_dir)
    assert capsys.readouterr().err == "" and all((run_dir / name).read_bytes() != content for name, content in foreign.items())


def test_a_run_is_not_created_over_files_that_it_did_not_write(tmp_path: Path, tiny: Tiny) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "attempts").mkdir(parents=True)
    (run_dir / "data.json").write_text('{"mine": 1}')
    done = picotrain("train", *tiny(run_dir))
    assert done.returncode == 2 and "is no run and not empty" in done.stderr
    assert (run_dir / "data.json").read_text() == '{"mine": 1}'


def test_a_foreign_folder_under_a_steps_name_is_no_checkpoint_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "thesis.tex").write_text("x")
    assert not is_checkpoint(tmp_path / "step_00000001")


def test_an_archive_in_a_folder_of_somebody_else_replaces_nothing(original: Path, tmp_path: Path) -> None:
    from picotrain.checkpoint.archive import Archive

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "plan.json").write_text('{"mine": 1}')
    run_dir = shutil.copytree(original / "run", tmp_path / "run")
    archive = Archive(str(tmp_path / "there"), run_dir, interval_s=60, min_age_s=0, keep_last=None, say=lambda text: None)
    with pytest.raises(RunError, match=r"plan\.json"):
        archive.start()
    assert (tmp_path / "there" / "plan.json").read_text() == '{"mine": 1}'


def test_a_page_or_a_table_of_somebody_else_is_not_written_over(original: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    done = picotrain("compare", str(original / "run"), str(original / "run"), "--html", str(mine))
    assert done.returncode == 2 and "no page of picotrain's" in done.stderr
    done = picotrain("bench", "matmul", "--out", str(mine))
    assert done.returncode == 2 and "no results of picotrain's" in done.stderr
    folder = original / "run" / "eval" / "step_00000012"
    folder.mkdir(parents=True)
    (folder / "results.md").write_text("mine")
    done = picotrain("eval", str(original / "run"))
    assert done.returncode == 2 and "results.md was not written by" in done.stderr
    assert mine.read_text() == "<html>mine</html>" and (folder / "results.md").read_text() == "mine"
    shutil.rmtree(folder.parent)


def test_a_path_that_the_locale_cannot_write_is_a_message(tmp_path: Path) -> None:
    root = shards(tmp_path / "é", "a.parquet", "b.parquet")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = picotrain("plan", "model=d2", "data=files", "data.path=.", env=ascii_only, cwd=root)
    assert done.returncode == 2 and "PYTHONUTF8=1" in done.stderr and "Traceback" not in done.stderr
    assert picotrain("data", "verify", str(root), env=ascii_only).returncode == 0
