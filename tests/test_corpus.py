"""The corpus: what the footers say, units, the manifest, and the words for every way a folder can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picotrain.data import corpus as corpus_module
from picotrain.data.corpus import (
    MANIFEST,
    Corpus,
    RowGroup,
    Shard,
    default_lanes,
    default_unit_bytes,
    read_texts,
    sample_texts,
    scan,
    units,
)
from picotrain.errors import DataError


def write(folder: Path, name: str, texts: list[str | None], rows: int = 2, **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())}), folder / name, row_group_size=rows, **options
    )
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training shards of five documents and a validation shard of two."""
    root = tmp_path / "corpus"
    for name in ("b", "a"):
        write(root, f"{name}.parquet", [f"{name} document {i} " + "x" * 100 * i for i in range(5)])
    write(root, "c.parquet", ["val 0", "val 1"])
    (root / "README.md").write_text("no shard")
    return root


def forget(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def test_shards_are_sorted_and_the_last_validates(folder: Path) -> None:
    corpus = scan(folder, "mine")
    assert [shard.name for shard in corpus.shards] == ["a.parquet", "b.parquet"]
    assert corpus.val.name == "c.parquet"
    assert (corpus.name, corpus.root, corpus.documents, corpus.val.rows) == ("mine", folder, 10, 2)
    assert [group.rows for group in corpus.shards[0].row_groups] == [2, 2, 1]


def test_another_shard_validates_when_it_is_named(folder: Path) -> None:
    corpus = scan(folder, "mine", "a.parquet")
    assert [shard.name for shard in corpus.shards] == ["b.parquet", "c.parquet"]
    assert corpus.val.name == "a.parquet"
    assert corpus.fingerprint != scan(folder, "mine").fingerprint
    with pytest.raises(DataError, match=r"no shard 'd\.parquet'; the nearest is '.\.parquet'"):
        scan(folder, "mine", "d.parquet")


def test_text_bytes_are_those_of_the_text_column_alone(folder: Path) -> None:
    group = pq.read_metadata(folder / "a.parquet").row_group(1)
    assert group.column(1).path_in_schema == "text"
    assert scan(folder, "mine").shards[0].row_groups[1] == RowGroup(2, group.column(1).total_uncompressed_size)


def test_only_limits_the_corpus_to_the_named_shards(folder: Path) -> None:
    corpus = scan(folder, "mine", "c.parquet", only=["b.parquet", "c.parquet"])
    assert [shard.name for shard in corpus.shards] == ["b.parquet"]
    assert len(scan(folder, "mine").shards) == 2


def test_json_brings_back_the_same_corpus(folder: Path) -> None:
    corpus = scan(folder, "mine")
    again = Corpus.from_json(json.loads(json.dumps(corpus.to_json())))
    assert again == corpus
    assert again.fingerprint == corpus.fingerprint == corpus.to_json()["fingerprint"]


def test_a_known_folder_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan(folder, "mine")
    monkeypatch.setattr(corpus_module, "read_footer", lambda path: pytest.fail(f"{path} was read"))
    assert scan(folder, "mine") == first


def test_a_changed_shard_alone_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read, honest = scan(folder, "mine"), [], corpus_module.read_footer
    write(folder, "b.parquet", ["something else"] * 7)
    write(folder, "aa.parquet", ["new"])
    monkeypatch.setattr(corpus_module, "read_footer", lambda path: read.append(path.name) or honest(path))
    after = scan(folder, "mine")
    assert sorted(read) == ["aa.parquet", "b.parquet"]
    assert after.documents == 5 + 1 + 7
    assert after.fingerprint != before.fingerprint
    (folder / "aa.parquet").unlink()
    assert [shard.name for shard in scan(folder, "mine").shards] == ["a.parquet", "b.parquet"]


def test_a_touched_shard_keeps_its_fingerprint(folder: Path) -> None:
    before = scan(folder, "mine").fingerprint
    os.utime(folder / "a.parquet", (1, 1))
    assert scan(folder, "mine").fingerprint == before


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": []}', b'{"files": [{"name": "a.parquet"}]}', b"\xff"])
def test_a_file_that_is_no_manifest_is_left_as_it_is(folder: Path, tmp_path: Path, damage: bytes) -> None:
    first = scan(folder, "mine")
    (folder / MANIFEST).write_bytes(damage)
    assert scan(folder, "mine") == scan(folder, "mine", cache=tmp_path / "cache") == first
    assert (folder / MANIFEST).read_bytes() == damage


def test_a_read_only_folder_is_left_alone_even_by_root(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o555)
    try:
        first = scan(folder, "mine", cache=tmp_path / "cache")
        assert not (folder / MANIFEST).exists()
        assert len(list((tmp_path / "cache" / "manifests").iterdir())) == 1
        assert scan(folder, "mine", cache=tmp_path / "cache") == first
        assert scan(folder, "mine") == first  # without a cache: read each time
    finally:
        folder.chmod(0o755)


def test_a_missing_folder_names_what_is_there(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"no corpus folder .*/corpsu/x; {folder.parent} exists and holds 'corpus'"):
        scan(folder.parent / "corpsu" / "x", "mine")


def test_an_empty_folder_says_what_a_corpus_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.parquet file; a corpus is a folder"):
        scan(tmp_path, "mine")


def test_a_single_shard_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, "only.parquet", ["a"])
    with pytest.raises(DataError, match=rf"only one shard, only\.parquet, .*data\.path={path}"):
        scan(tmp_path, "mine")


@pytest.mark.parametrize("cut", [0, 3, 11, 200, -1, -9])
def test_a_truncated_shard_is_named(folder: Path, cut: int) -> None:
    path = folder / "b.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"{path} is no readable Parquet file: .*fetch or write it again"):
        scan(folder, "mine")


def test_a_damaged_footer_is_named(folder: Path) -> None:
    path = folder / "b.parquet"
    raw = bytearray(path.read_bytes())
    raw[-200:-100] = b"\xff" * 100
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{path} is no readable Parquet file"):
        scan(folder, "mine")


def test_a_missing_text_column_lists_the_columns_there_are(folder: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no `text` column; its columns are content, url"):
        scan(folder, "mine")


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [b"a", b"b"], [{"text": "a"}, {"text": "b"}]])
def test_a_text_column_of_another_type_is_refused(folder: Path, column: list[object]) -> None:
    pq.write_table(pa.table({"text": column}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: the `text` column holds .*, not strings"):
        scan(folder, "mine")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column_is_read(folder: Path, kind: pa.DataType) -> None:
    texts = ["é", "b", None, "é"]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), folder / "b.parquet")
    assert read_texts(folder, scan(folder, "mine").shards[1], 0) == ["é", "b", "", "é"]


def test_a_corpus_without_documents_on_one_side_is_refused(folder: Path) -> None:
    write(folder, "c.parquet", [])
    with pytest.raises(DataError, match=r"validation shard c\.parquet: there is no document in it"):
        scan(folder, "mine")


def test_texts_come_in_file_order_and_nulls_are_empty(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", ["a", None, "", "d", "naïve 🙂"])
    write(tmp_path, "b.parquet", ["v"])
    corpus = scan(tmp_path, "mine")
    assert [read_texts(tmp_path, corpus.shards[0], rg) for rg in range(3)] == [["a", ""], ["", "d"], ["naïve 🙂"]]


def test_a_shard_that_changed_since_the_scan_is_named(folder: Path) -> None:
    corpus = scan(folder, "mine")
    write(folder, "b.parquet", ["something else"] * 7)
    with pytest.raises(DataError, match=r"b\.parquet, row group 1 cannot be read: it has .* bytes, and had .* when the corpus was scanned"):
        read_texts(folder, corpus.shards[1], 1)
    (folder / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"a\.parquet, row group 0 cannot be read"):
        read_texts(folder, corpus.shards[0], 0)


def test_a_footer_that_lies_about_its_data_is_found_at_reading(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", ["some text " * 50] * 4, compression="zstd")
    write(tmp_path, "b.parquet", ["v"])
    raw = bytearray(path.read_bytes())
    raw[4:200] = b"\x00" * 196
    path.write_bytes(raw)
    corpus = scan(tmp_path, "mine")
    with pytest.raises(DataError, match=r"a\.parquet, row group 0 cannot be read"):
        read_texts(tmp_path, corpus.shards[0], 0)


def test_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"ba\xffd", b"x"]).buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    write(tmp_path, "b.parquet", ["v"])
    with pytest.raises(DataError, match=r"a\.parquet, row group 0, document 1: the text is not valid UTF-8"):
        read_texts(tmp_path, scan(tmp_path, "mine").shards[0], 0)


SIZES = st.lists(st.lists(st.integers(0, 300), max_size=12), max_size=4)


@given(sizes=SIZES, unit_bytes=st.integers(1, 1000))
def test_units_cut_every_shard_into_runs_that_are_long_enough(sizes: list[list[int]], unit_bytes: int) -> None:
    shards = [Shard(str(i), 0, tuple(RowGroup(1, size) for size in groups), "") for i, groups in enumerate(sizes)]
    found = units(shards, unit_bytes)
    covered = [(unit.shard, rg) for unit in found for rg in range(unit.rg_start, unit.rg_end)]
    assert covered == [(i, rg) for i, groups in enumerate(sizes) for rg in range(len(groups))]
    for unit in found:
        groups = sizes[unit.shard]
        assert unit.text_bytes == sum(groups[unit.rg_start : unit.rg_end])
        if unit.text_bytes < unit_bytes:  # only a shard that is too small as a whole
            assert (unit.rg_start, unit.rg_end) == (0, len(groups))
        elif unit.rg_end < len(groups):  # no longer than needed; a shard's last one may hold a short rest
            assert unit.text_bytes - groups[unit.rg_end - 1] < unit_bytes


def test_defaults_of_units_and_lanes() -> None:
    assert default_unit_bytes(512) == 1 << 20
    assert default_unit_bytes(8192) == 400 * 8193
    assert [default_lanes(n) for n in (1, 2, 3, 27, 64, 65, 10_000)] == [1, 2, 2, 16, 64, 64, 64]


def sampling_corpus(root: Path) -> Corpus:
    for shard in range(4):
        write(root, f"{shard}.parquet", [f"{shard}/{i} " + "x" * 50 for i in range(200)], rows=10)
    return scan(root, "mine")


def test_a_sample_of_everything_is_everything_in_order(tmp_path: Path) -> None:
    corpus = sampling_corpus(tmp_path)
    expected = [text for shard in corpus.shards for rg in range(len(shard.row_groups)) for text in read_texts(tmp_path, shard, rg)]
    assert list(sample_texts(corpus, 10**9)) == expected


@pytest.mark.parametrize("max_bytes", [500, 3_000, 10_000])
def test_a_sample_is_bounded_and_spread_over_the_training_shards(tmp_path: Path, max_bytes: int) -> None:
    texts = list(sample_texts(sampling_corpus(tmp_path), max_bytes))
    total = sum(map(len, texts))
    assert 0.5 * max_bytes <= total <= max_bytes
    shares = [sum(len(text) for text in texts if text.startswith(f"{shard}/")) / total for shard in range(3)]
    assert all(0.2 < share < 0.5 for share in shares), shares
    assert not any(text.startswith("3/") for text in texts)  # the validation shard


def test_a_huge_document_gives_only_its_share_to_a_sample(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", ["z" * 500_000, *["short"] * 9], rows=10)
    write(tmp_path, "b.parquet", ["v"])
    assert sum(map(len, sample_texts(scan(tmp_path, "mine"), 1_000))) <= 1_000


def test_importing_costs_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys, picotrain.data.corpus, picotrain.data.prepare, picotrain.data.sources\n"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'tokenizers', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
