"""One Parquet file as a shard: what its footer says, and in words what is wrong with it, whatever pyarrow raises.

Without torch; pyarrow is imported inside functions.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter

from picotrain.data.thrift import Chunk, chunks
from picotrain.errors import DataError
from picotrain.text import first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

TEXT = "text"  # the column that is trained on
MOST = 2**53  # rows or bytes that a footer may claim
_MAGIC = b"PAR1"
# How files begin that are taken for Parquet.
_HEADS = (
    (b"version https://git-lfs.github.com/spec/", "it is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"PARE", "it is an encrypted Parquet file, and picotrain has no key: decrypt it"),
    (b"\x1f\x8b", "it is a gzip file: unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "it is a zstd file: unpack it (unzstd)"),
    (b"PK\x03\x04", "it is a zip file: unpack it"),
    (b"ARROW1", "it is an Arrow file, not Parquet"),
    (b"<", "it is a page of HTML or XML, perhaps a saved error message"),
    (b"{", "it is JSON, perhaps a saved error message"),
    (b"[", "it is JSON"),
)


class BadShard(DataError):
    """A Parquet file that cannot be a shard, by its footer; `name` is the file's."""

    name = ""


def _plain_name(name: str) -> str:
    """Shards are read from, and remote ones written to, the folder of their corpus; no name may lead elsewhere."""
    if Path(name).name != name or not name.endswith(".parquet") or "\0" in name:
        raise ValueError("a shard's name must be the plain name of a .parquet file")
    return name


Count = Annotated[int, Field(strict=True, ge=0, le=MOST)]
ShardName = Annotated[str, AfterValidator(_plain_name)]


class RowGroup(NamedTuple):
    """One row group: its rows and the bytes of its `text` column by the footer (uncompressed)."""

    rows: Count
    text_bytes: Count


@dataclass(frozen=True)
class Shard:
    """One Parquet file. `fingerprint` hashes its size and its footer. That is cheap, and every honest rewrite changes it. Bytes flipped
    inside a data page do not: reading them fails, or the page's own checks find them."""

    name: ShardName
    bytes: Count
    row_groups: tuple[RowGroup, ...]
    fingerprint: str

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def text_bytes(self) -> int:
        return sum(group.text_bytes for group in self.row_groups)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "fingerprint": self.fingerprint, "row_groups": [list(g) for g in self.row_groups]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shard:
        """Raises ValueError where `data` is none of `to_json`."""
        return reader_of(cls).validate_python(data)


@lru_cache
def reader_of(kind: type[Any]) -> TypeAdapter[Any]:
    """What turns plain JSON into `kind` and trusts nothing in it; built when it is first needed."""
    return TypeAdapter(kind)


def hash_bytes(data: bytes, size: int = 16) -> str:
    """BLAKE2b of `data` as 2 x `size` hex digits."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def read_footer(path: Path) -> Shard:
    """A shard from its Parquet footer, the `text` column checked. Raises BadShard."""
    try:
        return _read_footer(path)
    except BadShard as error:
        error.name = path.name
        raise


def _read_footer(path: Path) -> Shard:
    try:
        size, footer = _footer_bytes(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    with raising(lambda why: _unreadable(path, why)), opened(path) as file:
        metadata = file.metadata
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        schema = metadata.schema.to_arrow_schema()
        names = list(schema.names)
    if (count := names.count(TEXT)) > 1:
        raise BadShard(f"{path} has {count} columns named `{TEXT}`, and which is meant cannot be told; write it again with one")
    if TEXT not in names:
        raise BadShard(f"{path} has no `{TEXT}` column; its columns are {', '.join(names) or '(none)'}")
    if not _is_string(schema.field(TEXT).type) or TEXT not in columns:
        raise BadShard(f"{path}: the `{TEXT}` column holds {schema.field(TEXT).type}, not strings")
    with raising(lambda why: _unreadable(path, why)):
        column = metadata.schema.column(columns.index(TEXT))
        levels = (column.max_repetition_level, column.max_definition_level)
        found = chunks(footer, columns.index(TEXT))
        if any(chunk.encrypted for chunk in found):
            raise BadShard(f"{path}: its `{TEXT}` column is encrypted, and picotrain has no key: decrypt it, or remove the file")
        groups = tuple(_row_group(rg, chunk, levels, size) for rg, chunk in enumerate(found))
        if (rows := sum(group.rows for group in groups)) != metadata.num_rows:
            raise OSError(f"its footer promises {metadata.num_rows:,} rows, and its row groups {rows:,}")
    return Shard(path.name, size, groups, _fingerprint(size, footer))


def fingerprint_of(path: Path) -> str:
    """The fingerprint of a shard's file as it is now; its footer is not understood for it. Raises BadShard."""
    try:
        return _fingerprint(*_footer_bytes(path))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _fingerprint(size: int, footer: bytes) -> str:
    return hash_bytes(footer + size.to_bytes(8, "little"))


@contextmanager
def opened(path: Path) -> Generator[pq.ParquetFile]:
    """A Parquet file, read without threads a little at a time, checksums of pages compared."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # As bytes: pyarrow takes a text for UTF-8, whatever the locale's encoding of names is.
    with (
        pa.OSFile(os.fsencode(path)) as source,
        pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file,
    ):
        yield file


@contextmanager
def raising(refusal: Any) -> Generator[None]:
    """Whatever pyarrow raises, as `refusal(why)`. A DataError stays as it is. For blocks that only call pyarrow. Of a damaged file it
    raises KeyError, UnicodeDecodeError, OverflowError and more beside its own errors."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise refusal(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What an error of pyarrow's says, in one line, and what it means where that is known."""
    text = first_line(error)
    if isinstance(error, UnicodeError):
        text = f"a name in it is not UTF-8 ({text})"
    if "decrypt" in text.lower():  # of another column: the text's is said when the footer is read
        text = f"a column in it is encrypted, and picotrain has no key: decrypt it ({text})"
    return text.encode("utf-8", "backslashreplace").decode()[:300]


def first_undecodable(column: pa.Array | pa.ChunkedArray) -> int:
    """The index of the first text of a column that is not valid UTF-8."""
    return next(i for i, raw in enumerate(column.cast("binary").to_pylist()) if not _is_utf8(raw))


def require_regular(path: Path) -> os.stat_result:
    """Its status. Raises OSError for a folder, and for what would make its reader wait: a pipe, a socket, a device."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return status


def _unreadable(path: Path, why: str) -> BadShard:
    return BadShard(f"{path} is no readable Parquet file: {_what_it_is(path) or why}; fetch or write it again, or remove it")


def _what_it_is(path: Path) -> str:
    """What a file is instead of Parquet, as far as its first and last bytes tell; "" where they do not."""
    try:
        size = require_regular(path).st_size
        with open(path, "rb") as file:
            head = file.read(64)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except OSError:
        return ""
    if not size:
        return "it is empty (0 bytes)"
    if tail == b"PARE":
        return dict(_HEADS)[b"PARE"]
    if head[:4] == _MAGIC:
        return ""
    return next((words for begin, words in _HEADS if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(begin)), "")


def _row_group(number: int, chunk: Chunk, levels: tuple[int, int], file_bytes: int) -> RowGroup:
    rows, text_bytes, stored = chunk.rows, chunk.text_bytes, chunk.stored_bytes
    if not (0 <= rows <= MOST and 0 <= text_bytes <= MOST and 0 <= stored <= file_bytes):
        raise OSError(f"row group {number} claims {rows:,} rows, {text_bytes:,} bytes of text and {stored:,} of {file_bytes:,} bytes")
    if chunk.values != rows:
        raise OSError(f"row group {number} claims {rows:,} rows, and {chunk.values:,} texts")
    if any(count not in (0, most + 1) for count, most in zip(chunk.levels, levels, strict=True)):
        raise OSError(f"row group {number} has a histogram of levels of the wrong length")
    return RowGroup(rows, text_bytes)


def _footer_bytes(path: Path) -> tuple[int, bytes]:
    """File size and the raw footer: its last 8 bytes are the footer's length and the magic `PAR1`."""
    require_regular(path)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or length + 12 > size:
            raise OSError(f"it does not end in a Parquet footer ({size:,} bytes; truncated, or another format)")
        file.seek(size - 8 - length)
        return size, file.read(length)


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_utf8(raw: bytes | None) -> bool:
    try:
        return raw is None or raw.decode() is not None
    except UnicodeDecodeError:
        return False
