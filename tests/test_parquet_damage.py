"""Parquet that is damaged anywhere, or encrypted: one message with the file's name, and never fewer documents in silence."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from conftest import picotrain

from picotrain.data import inspect as inspecting
from picotrain.data.corpus import scan
from picotrain.data.origins import validation_origins
from picotrain.data.prepare import KINDS, Options, prepare
from picotrain.data.slices import documents
from picotrain.data.thrift import chunks
from picotrain.data.units import units
from picotrain.errors import DataError

TEXTS = [None if row % 31 == 0 else f"document {row} {'with words ' * (row % 7)}ä" for row in range(400)]


def parquet(rows_per_group: int = 50, columns: int = 0, metadata: dict[str, str] | None = None, **options: Any) -> bytes:
    table = pa.table({"text": TEXTS, **{f"c{number}": range(len(TEXTS)) for number in range(columns)}})
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), stream, row_group_size=rows_per_group, **options)
    return stream.getvalue()


def footer(data: bytes) -> bytes:
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def with_footer(data: bytes, changed: bytes) -> bytes:
    return data[: -8 - len(footer(data))] + changed + len(changed).to_bytes(4, "little") + b"PAR1"


def with_short_histogram(data: bytes, which: int) -> bytes:
    """That row group's definition levels counted for one level instead of two. A list of counts follows an empty one of repetition."""
    parts = footer(data).split(b"\x06\x19\x26")
    assert len(parts) > which + 1
    joined = b"\x06\x19\x26".join(parts[: which + 1]) + b"\x06\x19\x16" + parts[which + 1][1:]
    return with_footer(data, b"\x06\x19\x26".join([joined, *parts[which + 2 :]]))


def encrypted(path: Path, *columns: str) -> Path:
    """A file whose footer is plain and whose columns are not."""

    class Keys(encryption.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return base64.b64decode(wrapped_key)

    config = encryption.EncryptionConfiguration(footer_key="a", column_keys={"b": list(columns)}, plaintext_footer=True)
    properties = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(encryption.KmsConnectionConfig(), config)
    table = pa.table({"text": ["one", "two", "three"], "source": ["a:1", "b:2", "a:3"]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one good shard, a.parquet to come, that validates."""
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"text": ["one", "two"], "source": ["a:1", "b:2"]}), tmp_path / "c" / "z.parquet")
    return tmp_path / "c"


def stream(root: Path) -> list[str]:
    """The documents of a.parquet as training reads them."""
    corpus = scan(root, "c", cache=root.parent / "cache")
    shard = next(shard for shard in corpus.shards if shard.name == "a.parquet")
    return [text for unit in units([shard], 1) for text in documents(corpus.files, shard, unit)]


def refusals(root: Path, *more: Callable[[], Any]) -> list[str]:
    """What the readers of a folder refuse, verify's findings among it."""
    found = [str(bad) for bad in inspecting.verify(root).bad]
    for read in (lambda: stream(root), lambda: inspecting.inspect(root), *more):
        try:
            read()
        except DataError as error:
            found.append(str(error))
    assert all("a.parquet" in said and "\n" not in said for said in found)
    return found


# --- footers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"columns": 5, "rows_per_group": 3}, {"metadata": {"long": "x" * 90_000}}, {"use_dictionary": False}]
)
def test_a_footer_is_read_as_pyarrow_reads_it(options: dict[str, Any]):
    data = parquet(**options)
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    for column in range(metadata.num_columns):
        groups = [metadata.row_group(rg) for rg in range(metadata.num_row_groups)]
        parts = [group.column(column) for group in groups]
        sizes = [(part.num_values, part.total_uncompressed_size, part.total_compressed_size) for part in parts]
        assert [chunk[:4] for chunk in chunks(footer(data), column)] == [(group.num_rows, *size) for group, size in zip(groups, sizes)]  # noqa: B905


def test_a_large_footer_that_ends_pyarrow_is_refused_and_nothing_ends(root: Path):
    for name, data in {"a": parquet(2, columns=2), "b": parquet(metadata={"long": "x" * 90_000})}.items():
        assert len(footer(data)) > 65_536
        (root / f"{name}.parquet").write_bytes(with_short_histogram(data, 3))
    done = picotrain("data", "verify", str(root))
    assert done.returncode == 2, done.stderr
    assert all(f"{name}.parquet" in done.stdout + done.stderr for name in "ab")


@pytest.mark.parametrize(
    "wrong",
    [
        b"\x19" * 100_000,
        b"\x1c" * 100_000,
        b"\x16" + b"\xff" * 1_000_000,
        b"\x19\xfc\xff\xff\xff\xff\x0f",
        b"\x49\xfc\xff\xff\x03",
        b"",
        b"\x00",
    ],
    ids=["lists in lists", "structs in structs", "endless number", "list of 4 G", "row groups of 64 K", "empty", "no field"],
)
def test_a_footer_of_nonsense_takes_no_time_and_no_memory(root: Path, wrong: bytes):
    if len(wrong) > 1:
        with pytest.raises(ValueError):
            chunks(wrong, 0)
    (root / "a.parquet").write_bytes(with_footer(parquet(), wrong))
    assert len(refusals(root)) == 3


# --- anywhere ------------------------------------------------------------------------------------


def damaged(data: bytes, low: int, high: int, rng: random.Random) -> bytes:
    """A file changed between `low` and `high`: bits, noise, zeros or ones over some of it, or a part cut out or put in."""
    changed = bytearray(data)
    at = rng.randrange(low, high)
    length = min(rng.choice([1, 2, 8, 40, 300, high]), high - at)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        case 1:
            changed[at : at + length] = rng.randbytes(length)
        case 2:
            changed[at : at + length] = bytes(length)
        case 3:
            changed[at : at + min(length, 12)] = b"\xff" * min(length, 12)
        case 4:
            del changed[at : at + length]
        case _:
            changed[at:at] = rng.randbytes(min(length, 50))
    if high == len(data) - 8:  # of the footer: its length is to fit
        return with_footer(data, bytes(changed[low:-8]))
    return bytes(changed)


FILES: dict[str, dict[str, Any]] = {
    "footer of row groups": {"rows_per_group": 2, "columns": 1},
    "footer of words": {"metadata": {"long": "x" * 70_000}},
    "pages with checksums": {"write_page_checksum": True, "use_dictionary": False, "data_page_size": 500},
    "pages": {"compression": "zstd", "data_page_version": "2.0"},
    "plain pages": {"compression": "none", "use_dictionary": False},
}


@pytest.mark.parametrize("kind", FILES)
def test_damage_anywhere_is_refused_in_words_or_every_document_is_there(root: Path, kind: str):
    data = parquet(**FILES[kind])
    begin = len(data) - 8 - len(footer(data))
    low, high = (begin, len(data) - 8) if "footer" in kind else (4, begin)
    rng, refused = random.Random(16), 0
    for _ in range(8 if kind == "footer of row groups" else 25):
        (root / "a.parquet").write_bytes(damaged(data, low, high, rng))

        def prepared() -> None:
            prepare(root, root.parent / "out", options=Options(tolerated=KINDS, keep_duplicates=True), workers=1)

        said = refusals(root, prepared)
        refused += bool(said)
        if not said:
            texts = stream(root)
            assert len(texts) == len(TEXTS)
            assert "checksums" not in kind or texts == [text or "" for text in TEXTS]
    assert refused


# --- encrypted -----------------------------------------------------------------------------------


def test_encrypted_text_behind_a_plain_footer_is_called_so_everywhere(root: Path):
    encrypted(root / "a.parquet", "text")
    done = picotrain("data", "verify", str(root))
    assert done.returncode == 2 and "encrypted" in done.stdout + done.stderr
    said = refusals(root, lambda: prepare(root, root.parent / "out"))
    assert len(said) == 4 and all("encrypted" in one for one in said)
    told: list[str] = []
    corpus = prepare(root, root.parent / "out", options=Options(tolerated=KINDS), say=told.append)
    assert corpus.documents + corpus.val.rows == 2 and "encrypted" in "\n".join(told)


def test_plain_text_beside_encrypted_columns_is_read(root: Path):
    encrypted(root / "a.parquet", "source")
    assert stream(root) == ["one", "two", "three"]
    (bad,) = inspecting.verify(root).bad  # of that column nothing is known
    assert "encrypted" in str(bad)
    with pytest.raises(DataError, match="encrypted"):
        validation_origins(scan(root, "c", "a.parquet"))
