"""Looking at a corpus and proving it: counts that are right, and every damage found, all at once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picotrain.data.corpus import MANIFEST, scan
from picotrain.data.inspect import Bad, Place, inspect, verify
from picotrain.data.prepare import prepare
from picotrain.errors import DataError
from picotrain.tokenizer import load_tokenizer, train_tokenizer


def write(folder: Path, name: str, texts: list[str | None] | pa.Array, rows: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    pq.write_table(pa.table({"text": column}), folder / name, row_group_size=rows)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with one of everything that is counted."""
    root = tmp_path / "corpus"
    write(root, "0.parquet", ["a", "twice", "x" * 100, "", None, "twice", "<|endoftext|> and <|endoftext|>", " \n", "also validated"])
    write(root, "1.parquet", ["naïve", "also validated", "<|bos|></s>"])
    return root


def test_sizes_and_counts(folder: Path) -> None:
    found = inspect(folder)
    assert (found.shards, found.validation_shard, found.documents, found.row_groups) == (2, "1.parquet", 12, 4)
    assert found.file_bytes == sum(path.stat().st_size for path in folder.glob("*.parquet"))
    assert (found.documents_read, found.null_documents, found.empty_documents) == (12, 1, 2)
    assert found.bytes_read == 1 + 5 + 100 + 5 + 31 + 2 + 14 + 6 + 14 + 11


def test_copies_are_counted_and_those_across_the_split_too(folder: Path) -> None:
    found = inspect(folder)
    assert (found.duplicate_documents, found.duplicated_texts, found.validation_duplicates) == (2, 2, 1)


def test_special_token_text_is_counted_by_documents(folder: Path) -> None:
    assert inspect(folder).special_text == {"<|endoftext|>": 1, "<|bos|>": 1, "</s>": 1}


def test_lengths(folder: Path) -> None:
    found = inspect(folder)
    assert (found.quantiles_bytes["0%"], found.quantiles_bytes["50%"], found.quantiles_bytes["100%"]) == (0, 6, 100)
    assert found.mean_bytes == pytest.approx(found.bytes_read / 11)
    bins = [entry for entry in found.histogram if entry[2]]
    assert bins == [(0, 1, 1), (1, 2, 1), (2, 4, 1), (4, 8, 3), (8, 16, 3), (16, 32, 1), (64, 128, 1)]


def test_text_that_is_not_utf8_is_counted_and_the_first_is_named(folder: Path) -> None:
    bad = pa.array([b"good"] * 5 + [b"ba\xffd", b"x", b"\x80"]).view(pa.string())
    write(folder, "00.parquet", bad)
    found = inspect(folder)
    assert found.invalid_utf8_documents == 2
    assert found.first_invalid_utf8 == Place("00.parquet", 1, 1)
    assert json.loads(json.dumps(found.to_json()))["first_invalid_utf8"] == {"shard": "00.parquet", "row_group": 1, "row": 1}


def test_tokens_under_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from, twice and twice"], 260, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    found = inspect(folder, tokenizer=tokenizer)
    texts = [text for path in sorted(folder.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist() if text]
    assert found.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert found.bytes_per_token == pytest.approx(found.bytes_read / found.tokens)
    assert inspect(folder).tokens is None


def test_samples_are_seeded_and_cut(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet", [f"{i} " + "é" * 1000 for i in range(50)], rows=7)
    write(tmp_path, "1.parquet", ["v"])
    first, again, other = (inspect(tmp_path, samples=4, seed=seed).samples for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 4
    for sample in first:
        row = sample["row_group"] * 7 + sample["row"]
        assert sample["shard"] == "1.parquet" or sample["text"].startswith(f"{row} éé")
        assert len(sample["text"].encode()) <= 300
    assert len(inspect(tmp_path, samples=1000).samples) == 51


def test_a_part_is_read_evenly_spread(tmp_path: Path) -> None:
    for shard in range(4):
        write(tmp_path, f"{shard}.parquet", [f"{shard} {i} " + "x" * 100 for i in range(100)], rows=10)
    found = inspect(tmp_path, max_bytes=9000, samples=10**6)
    assert found.documents == 400
    assert 50 <= found.documents_read <= 90
    assert {sample["shard"] for sample in found.samples} == {f"{shard}.parquet" for shard in range(4)}


def test_progress_ends_at_all(folder: Path) -> None:
    for function in (inspect, verify):
        seen: list[tuple[int, int]] = []
        function(folder, progress=lambda what, done, total, seen=seen: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1][0] >= 0.99 * seen[-1][1] > 0


def test_a_folder_without_shards_says_what_to_do(tmp_path: Path) -> None:
    for function in (inspect, verify):
        with pytest.raises(DataError, match=r"holds no \*\.parquet file; make a corpus of it with `picotrain data prepare"):
            function(tmp_path)


# --- verify --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three shards or so with content hashes, scanned."""
    root, rng = tmp_path_factory.mktemp("prepared"), random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=3000)) for _ in range(200)]
    (root / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(root / "x.jsonl", root / "corpus")
    return root / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "corpus")


def test_a_good_corpus_is_good_and_all_of_it_compared(corpus: Path) -> None:
    found = verify(corpus)
    assert (found.shards, found.bad, found.unhashed, found.unlisted) == (2, [], [], [])


def test_a_flipped_byte_is_found_by_hash_and_by_row_group(corpus: Path) -> None:
    path = corpus / "shard_00000.parquet"
    offset = pq.read_metadata(path).row_group(3).column(0).data_page_offset + 500
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    first, second = verify(corpus).bad
    assert first == Bad("shard_00000.parquet", None, "its content is not what it was when it was made (XXH3)")
    assert (second.shard, second.row_group) == ("shard_00000.parquet", 3)
    assert "CRC" in second.reason


def test_everything_that_is_bad_is_listed_at_once(corpus: Path) -> None:
    path = corpus / "shard_00000.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    (corpus / "shard_00001.parquet").rename(corpus / "shard_00009.parquet")
    found = verify(corpus)
    assert [(item.shard, item.row_group) for item in found.bad] == [
        ("shard_00000.parquet", None),
        ("shard_00000.parquet", None),
        ("shard_00001.parquet", None),
    ]
    assert "it has 1,000 bytes, and had" in found.bad[0].reason
    assert "does not end in a Parquet footer" in found.bad[1].reason
    assert found.bad[2].reason == "it is missing; data.json and origin.json has it"
    assert found.unhashed == found.unlisted == ["shard_00009.parquet"]


def test_another_shard_of_that_name_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    write(tmp_path, "0.parquet", ["a", "b"])
    write(tmp_path, "1.parquet", ["c"])
    assert verify(tmp_path).unlisted == ["0.parquet", "1.parquet"]
    scan(tmp_path, "mine")
    manifest = (tmp_path / MANIFEST).read_bytes()
    write(tmp_path, "0.parquet", ["a", "other"])
    found = verify(tmp_path)
    assert [(item.shard, item.row_group) for item in found.bad] == [("0.parquet", None)]
    assert "not the shard that data.json has" in found.bad[0].reason
    assert found.unhashed == ["0.parquet", "1.parquet"]
    assert (tmp_path / MANIFEST).read_bytes() == manifest  # verifying does not make it true


def test_damage_without_a_checksum_is_found_and_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write(tmp_path, "0.parquet", ["".join(rng.choices("abcd", k=500)) for _ in range(12)])
    write(tmp_path, "1.parquet", pa.array([b"good", b"ba\xffd"]).view(pa.string()))
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 300] = bytes(300)
    path.write_bytes(raw)
    bad = verify(tmp_path).bad
    assert [(item.shard, item.row_group) for item in bad] == [("0.parquet", 1), ("1.parquet", 0)]
    assert str(bad[1]) == "1.parquet, row group 0: text that is not valid UTF-8 in rows 0 to 1"
