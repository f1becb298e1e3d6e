"""The documents of one input file, streamed, with a word for everything in it that is none."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from picotrain.data.footers import TEXT, opened, raising, read_footer, reason_of
from picotrain.data.prepare.cutting import cut_plain_text
from picotrain.data.prepare.found import BAD_LINE, MAX_DOCUMENT_BYTES, NOT_TEXT, NULL, UNREADABLE, Found, Skipped, Span, too_long
from picotrain.data.prepare.inputs import CSV, JSON_LINES, PARQUET, PLAIN, Input, kind_of
from picotrain.data.prepare.workers import tick
from picotrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

READ_BYTES = 1 << 20
TICK_LINES = 512  # progress is told so often
EXPANSION = 4  # text that a compressed byte gives, about

Items = Iterator[Found | Skipped]


def read(file: Input, span: Span | None = None) -> Items:
    """The texts of a file, or of a span of it, as they come, and what cannot be used."""
    try:
        if kind_of(file.path, PARQUET):
            yield from _read_parquet(file, span)
        elif kind_of(file.path, JSON_LINES):
            yield from _read_lines(file, _json_lines, span)
        elif kind_of(file.path, CSV):
            yield from _read_lines(file, _csv_rows, None)
        else:
            yield from _read_text(file)
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(file, "", UNREADABLE, f"cannot be read: {_why(error)}")


def _why(error: Exception) -> str:
    """What an error of the disk, or of what unpacks a file, says."""
    why = getattr(error, "strerror", None) or str(error).strip()
    if isinstance(error, gzip.BadGzipFile):
        return f"what stands there is no gzip, from its beginning or from the end of a part on ({why})"
    if "too much memory" in why:
        return f"{why}; it was made with a window above 128 MiB: unpack it (zstd -d --long=31) and compress it without --long"
    return why


# --- text ----------------------------------------------------------------------------------------


def _read_text(file: Input) -> Items:
    """One document, or the pieces of a long plain text. A file that is not text gives nothing, so it is read over before."""
    size, plain = file.path.stat().st_size, kind_of(file.path, PLAIN)
    if not plain and size > MAX_DOCUMENT_BYTES:
        yield too_long(file, "", size)
        return
    try:
        if size <= MAX_DOCUMENT_BYTES // 8:
            texts = ["".join(_decoded(file.path))]
        else:
            for _ in _decoded(file.path):
                pass
            texts = _decoded(file.path)
    except UnicodeError as error:
        yield Skipped(file, "", NOT_TEXT, f"{error}; convert it (iconv -f ... -t UTF-8) or leave it out")
    else:
        yield from map(Found._make, enumerate(cut_plain_text(texts) if plain else ["".join(texts)]))
    tick(size)


def _decoded(path: Path) -> Iterator[str]:
    """A file's text in chunks. Raises UnicodeError with the first bad place, also for a NUL, which no text has."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset, raw = 0, b"-"
    with open(path, "rb") as file:
        while raw:
            raw = file.read(READ_BYTES)
            if (nul := raw.find(b"\0")) >= 0:
                raise UnicodeError(f"is not UTF-8 text (a NUL at offset {offset + nul:,}: binary, or UTF-16)")
            offset += len(raw)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset - len(error.object) + error.start:,}"
                raise UnicodeError(f"is not UTF-8 ({where})") from None


def _is_text(text: str) -> bool:
    """Whether it holds no half of a character, which JSON can spell and which stands for bytes that are not UTF-8."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


# --- lines ---------------------------------------------------------------------------------------


class _AsItComes(io.RawIOBase):
    """A stream read a little at a time, so that all that stands before a damaged place has been read when it is met."""

    def __init__(self, inner: gzip.GzipFile):
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: Path) -> Generator[tuple[BinaryIO, Callable[[], int]]]:
    """A file as it was before compression, and how far it has been read, in bytes of text, about."""
    import pyarrow as pa

    suffix = path.suffix.lower()
    with open(path, "rb", buffering=READ_BYTES) as raw:
        if suffix == ".gz":  # pyarrow's refuses the zeros that some tools pad a file with
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(_AsItComes(stream), READ_BYTES), lambda: raw.tell() * EXPANSION  # type: ignore[type-var]
        elif suffix == ".zst":
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as stream:
                yield io.BufferedReader(stream, READ_BYTES), lambda: raw.tell() * EXPANSION  # type: ignore[type-var]  # a raw stream
        else:
            yield raw, raw.tell


def _read_lines(file: Input, parse: Callable[[Input, BinaryIO, Span | None], Items], span: Span | None) -> Items:
    with _opened(file.path) as (stream, position):
        if span is not None:
            stream.seek(span.start)
        seen = position()
        for number, item in enumerate(parse(file, stream, span)):
            if number % TICK_LINES == 0:
                tick((now := position()) - seen)
                seen = now
            yield item
        tick(position() - seen)


def _json_lines(file: Input, stream: BinaryIO, span: Span | None) -> Items:
    """The field `text` of every line; blank lines are nothing."""
    number = span.first_line - 1 if span else 0
    while (span is None or stream.tell() < span.end) and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            size = len(line)
            while line and not line.endswith(b"\n"):
                size += len(line := stream.readline(READ_BYTES))
            yield too_long(file, f"line {number}", size)
        elif line.strip():
            try:
                yield Found(number, _text_of(line))
            except ValueError as error:
                reason = f"{error}; each line must be a JSON object with a string `{TEXT}`"
                yield Skipped(file, f"line {number}", BAD_LINE, reason)


def _text_of(line: bytes) -> str:
    """The field `text` of a JSON object. Raises ValueError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if TEXT not in value:
        raise ValueError(f"no field `{TEXT}`; its fields are {', '.join(value) or '(none)'}")
    if not isinstance(text := value[TEXT], str):
        raise ValueError(f"`{TEXT}` is {type(text).__name__}, not a string")
    if not _is_text(text):
        raise ValueError(f"`{TEXT}` holds a lone surrogate")
    return text


def _csv_rows(file: Input, stream: BinaryIO, _span: Span | None) -> Items:
    """The column `text` of every row. By Python's csv: pyarrow's reader takes no row that is longer than its block."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if TEXT not in header:
            columns = ", ".join(header).encode("utf-8", "replace").decode()[:200]
            yield Skipped(file, "", UNREADABLE, f"has no `{TEXT}` column; its columns are {columns or '(none)'}")
            return
        column = header.index(TEXT)
        for row in rows:
            if row and len(row) != len(header):  # a blank line is nothing
                yield Skipped(file, f"line {rows.line_num}", BAD_LINE, f"{len(row)} fields, and the header has {len(header)}")
            elif row and not _is_text(row[column]):
                yield Skipped(file, f"line {rows.line_num}", NOT_TEXT, "the text is not valid UTF-8")
            elif row:
                yield Found(rows.line_num, row[column])
    except csv.Error as error:  # where the next row begins can only be guessed
        reason = f"no CSV from here on ({error}); quote fields that hold commas, quotes or line breaks"
        yield Skipped(file, f"line {rows.line_num}", BAD_LINE, reason)
    finally:
        lines.detach()  # its end would close the stream


# --- Parquet -------------------------------------------------------------------------------------


def _read_parquet(file: Input, span: Span | None) -> Items:
    """The column `text`, about 1 MiB or one document at a time. A row group that is damaged is left from there on."""
    try:
        shard = read_footer(file.path)
    except DataError as error:
        yield Skipped(file, "", UNREADABLE, str(error).removeprefix(str(file.path)).lstrip(": "))
        return
    groups = range(span.start, span.end) if span else range(len(shard.row_groups))
    row = sum(group.rows for group in shard.row_groups[: groups.start])
    with raising(OSError), opened(file.path) as parquet:
        for rg in groups:
            group = shard.row_groups[rg]
            batch_rows = max(1, min(group.rows, READ_BYTES * group.rows // max(1, group.text_bytes)))
            seen = 0
            try:
                for batch in parquet.iter_batches(batch_rows, row_groups=[rg], columns=[TEXT], use_threads=False):
                    for place, text in enumerate(_texts(batch.column(0)), row + seen):
                        if isinstance(text, str):
                            yield Found(place, text)
                        elif text is None:
                            yield Skipped(file, f"row {place}", NULL, "the text is null")
                        else:
                            yield Skipped(file, f"row {place}", NOT_TEXT, "the text is not valid UTF-8")
                    seen += len(batch)
                if seen != group.rows:
                    raise OSError(f"it holds {seen:,} rows, and the footer promised {group.rows:,}")
            except Exception as error:  # whatever pyarrow raises
                yield Skipped(file, f"row group {rg}", UNREADABLE, f"it cannot be read after {seen:,} rows: {reason_of(error)}")
            row += group.rows
            tick(group.text_bytes)


def _texts(column: pa.Array) -> list[str | bytes | None]:
    """Every text, as bytes where it is not UTF-8."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        found: list[Any] = plain.cast(pa.large_binary()).to_pylist()
        for index, raw in enumerate(found):
            try:
                found[index] = None if raw is None else raw.decode()
            except UnicodeDecodeError:
                continue
        return found
