"""The documents of one input file, streamed, with a word for everything in it that is none."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from picotrain.data.footers import TEXT, opened, raising, read_footer, reason_of
from picotrain.data.prepare.inputs import CSV, JSON_LINES, PARQUET, PLAIN, Input, kind_of
from picotrain.data.prepare.workers import tick
from picotrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

CUT_ABOVE, CUT_NEAR = 256 << 10, 64 << 10  # characters
MAX_DOCUMENT_BYTES = 256 << 20  # one document is held in memory as a whole
READ_BYTES = 1 << 20
TICK_LINES = 512  # progress is told so often
EXPANSION = 4  # text that a compressed byte gives, about

EMPTY, NULL, SHORT, DUPLICATE = "empty", "null", "short", "duplicate"
NOT_TEXT, BAD_LINE, UNREADABLE, TOO_LONG = "not text", "bad line", "unreadable", "too long"
HARMLESS = frozenset({EMPTY, SHORT, DUPLICATE})  # left out without anything being wrong
KINDS = frozenset({*HARMLESS, NULL, NOT_TEXT, BAD_LINE, UNREADABLE, TOO_LONG})


class Found(NamedTuple):
    """A document; `place` is its line, its row (from 0) or its piece (from 0) within the file."""

    place: int
    text: str


class Span(NamedTuple):
    """A part of a file: row groups of Parquet, or the bytes of whole JSON lines, of which the first has this number."""

    start: int
    end: int
    first_line: int = 1


class Skipped(NamedTuple):
    """Something that gives no document: where it is, one of KINDS, why, and the whole sentence for an error."""

    source: str
    place: str
    kind: str
    reason: str
    error: str


def place_name(file: Input, place: int) -> str:
    """How a place is called in this kind of file."""
    if kind_of(file.path, PARQUET):
        return f"row {place}"
    if kind_of(file.path, (*JSON_LINES, *CSV)):
        return f"line {place}"
    return f"piece {place}" if place else ""


def read(file: Input, span: Span | None = None) -> Iterator[Found | Skipped]:
    """The texts of a file, or of a span of it, as they come, and what cannot be used."""
    try:
        if kind_of(file.path, PARQUET):
            yield from _read_parquet(file, span)
        elif kind_of(file.path, JSON_LINES):
            yield from _read_lines(file, _json_lines, span)
        elif kind_of(file.path, CSV):
            yield from _read_lines(file, _csv_rows)
        else:
            yield from _read_text(file)
    except (OSError, EOFError, zlib.error) as error:
        why = _why(error)
        yield Skipped(file.source, "", UNREADABLE, why, f"{file.path} cannot be read: {why}")


def _why(error: Exception) -> str:
    """What an error of the disk, or of what unpacks a file, says."""
    why = getattr(error, "strerror", None) or str(error).strip()
    if isinstance(error, gzip.BadGzipFile):
        return f"what stands there is no gzip, from its beginning or from the end of a part on ({why})"
    if "too much memory" in why:
        return f"{why}; it was made with a window above 128 MiB: unpack it (zstd -d --long=31) and compress it without --long"
    return why


def cut_plain_text(text: str | Iterable[str]) -> Iterator[str]:
    """Pieces of about 64 K characters, cut after a blank line where there is one, else after a line, else after a word.

    Joined they are the text again, which may come in chunks. Up to 256 K characters a text stays whole.
    """
    held, whole = "", True
    for chunk in [text] if isinstance(text, str) else text:
        held += chunk
        start = 0
        while len(held) - start > CUT_ABOVE:
            whole, end = False, _cut_at(held, start)
            yield held[start:end]
            start = end
        held = held[start:]
    start = 0
    while not whole and len(held) - start > CUT_NEAR * 3 // 2:
        end = _cut_at(held, start)
        yield held[start:end]
        start = end
    if whole or start < len(held):
        yield held[start:]


def _cut_at(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: after the last good place in the second half of 64 K characters."""
    low, high = start + CUT_NEAR // 2, start + CUT_NEAR
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


# --- text ----------------------------------------------------------------------------------------


def _read_text(file: Input) -> Iterator[Found | Skipped]:
    """One document, or the pieces of a long plain text. A file that is not text gives nothing, so it is read over before."""
    size = file.path.stat().st_size
    plain = kind_of(file.path, PLAIN)
    if not plain and size > MAX_DOCUMENT_BYTES:
        yield _too_long(file, "", size)
        return
    try:
        if size <= MAX_DOCUMENT_BYTES // 8:
            texts = ["".join(_decoded(file.path))]
        else:
            for _ in _decoded(file.path):
                pass
            texts = _decoded(file.path)
    except UnicodeError as error:
        reason = str(error)
        yield Skipped(file.source, "", NOT_TEXT, reason, f"{file.path} {reason}; convert it (iconv -f ... -t UTF-8) or leave it out")
    else:
        pieces = cut_plain_text(texts) if plain else ["".join(texts)]
        yield from (Found(place, piece) for place, piece in enumerate(pieces))
    tick(size)


def _decoded(path: Path) -> Iterator[str]:
    """A file's text in chunks. Raises UnicodeError with the first bad place, also for a NUL, which no text has."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES)
            if (nul := raw.find(b"\0")) >= 0:
                raise UnicodeError(f"is not UTF-8 text (a NUL at offset {offset + nul:,}: binary, or UTF-16)")
            offset += len(raw)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset - len(error.object) + error.start:,}"
                raise UnicodeError(f"is not UTF-8 ({where})") from None
            yield text
            if not raw:
                return


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
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
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


def _read_lines(
    file: Input, parse: Callable[[Input, BinaryIO, Span | None], Iterator[Found | Skipped]], span: Span | None = None
) -> Iterator[Found | Skipped]:
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


def _json_lines(file: Input, stream: BinaryIO, span: Span | None) -> Iterator[Found | Skipped]:
    """The field `text` of every line; blank lines are nothing."""
    number = span.first_line - 1 if span else 0
    while (span is None or stream.tell() < span.end) and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            size = len(line)
            while line and not line.endswith(b"\n"):
                size += len(line := stream.readline(READ_BYTES))
            yield _too_long(file, f"line {number}", size)
        elif line.strip():
            text, reason = _text_of(line)
            yield (
                _bad_line(file, number, f"{reason}; each line must be a JSON object with a string `{TEXT}`")
                if reason
                else Found(number, text)
            )


def _text_of(line: bytes) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return "", f"a JSON {type(value).__name__}, not an object"
        if TEXT not in value:
            return "", f"no field `{TEXT}`; its fields are {', '.join(value) or '(none)'}"
        if not isinstance(text := value[TEXT], str):
            return "", f"`{TEXT}` is {type(text).__name__}, not a string"
        text.encode()
        return text, ""
    except UnicodeEncodeError:
        return "", f"`{TEXT}` holds a lone surrogate"
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        return "", f"not JSON ({error})"


def _csv_rows(file: Input, stream: BinaryIO, _span: Span | None) -> Iterator[Found | Skipped]:
    """The column `text` of every row. By Python's csv: pyarrow's reader takes no row that is longer than its block."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if TEXT not in header:
            reason = f"has no `{TEXT}` column; its columns are {_shown(', '.join(header)) or '(none)'}"
            yield Skipped(file.source, "", UNREADABLE, reason, f"{file.path} {reason}")
            return
        column = header.index(TEXT)
        for row in rows:
            if len(row) != len(header):
                if row:  # a blank line is nothing
                    yield _bad_line(file, rows.line_num, f"{len(row)} fields, and the header has {len(header)}")
            elif _has_surrogates(row[column]):
                reason = "the text is not valid UTF-8"
                yield Skipped(file.source, f"line {rows.line_num}", NOT_TEXT, reason, f"{file.path}:{rows.line_num}: {reason}")
            else:
                yield Found(rows.line_num, row[column])
    except csv.Error as error:  # where the next row begins can only be guessed
        yield _bad_line(file, rows.line_num, f"no CSV from here on ({error}); quote fields that hold commas, quotes or line breaks")
    finally:
        lines.detach()  # its end would close the stream


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shown(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:200]


def _bad_line(file: Input, line: int, reason: str) -> Skipped:
    return Skipped(file.source, f"line {line}", BAD_LINE, reason, f"{file.path}:{line}: {reason}")


def _too_long(file: Input, place: str, size: int) -> Skipped:
    reason = f"a document of {size:,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}"
    return Skipped(file.source, place, TOO_LONG, reason, f"{file.path}{', ' * bool(place)}{place}: {reason}")


# --- Parquet -------------------------------------------------------------------------------------


def _read_parquet(file: Input, span: Span | None) -> Iterator[Found | Skipped]:
    """The column `text`, about 1 MiB or one document at a time. A row group that is damaged is left from there on."""
    try:
        shard = read_footer(file.path)
    except DataError as error:
        yield Skipped(file.source, "", UNREADABLE, str(error).removeprefix(str(file.path)).lstrip(": "), str(error))
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
                    yield from _rows(file, batch.column(0), row + seen)
                    seen += len(batch)
                if seen != group.rows:
                    raise OSError(f"it holds {seen:,} rows, and the footer promised {group.rows:,}")
            except Exception as error:  # whatever pyarrow raises
                reason = f"cannot be read after {seen:,} rows: {reason_of(error)}"
                yield Skipped(file.source, f"row group {rg}", UNREADABLE, reason, f"{file.path}, row group {rg} {reason}")
            row += group.rows
            tick(group.text_bytes)


def _rows(file: Input, column: pa.Array, first: int) -> Iterator[Found | Skipped]:
    for row, text in enumerate(_texts(column), first):
        if isinstance(text, str):
            yield Found(row, text)
        else:
            kind, reason = (NULL, "the text is null") if text is None else (NOT_TEXT, "the text is not valid UTF-8")
            yield Skipped(file.source, f"row {row}", kind, reason, f"{file.path}, row {row}: {reason}")


def _texts(column: pa.Array) -> list[str | bytes | None]:
    """Every text, as bytes where it is not UTF-8."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        return [_decoded_or_raw(raw) for raw in plain.cast(pa.large_binary()).to_pylist()]


def _decoded_or_raw(raw: bytes | None) -> str | bytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return raw
