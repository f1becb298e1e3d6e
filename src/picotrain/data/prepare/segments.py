"""The first pass: every document once, hashed, into the segment file of its task, in the order of its hash's bucket.

A bucket is a range of hashes, so that equal texts meet in one, and consecutive buckets hold consecutive hashes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.data.corpus import read_footer
from picotrain.data.prepare.documents import (
    EMPTY,
    EXPANSION,
    MAX_DOCUMENT_BYTES,
    NOT_TEXT,
    READ_BYTES,
    SHORT,
    TOO_LONG,
    Found,
    Skipped,
    Span,
    place_name,
    read,
)
from picotrain.data.prepare.inputs import PARQUET, PLAIN, Input, kind_of
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError

DIGEST_BYTES = 16
OVERHEAD_BYTES = 256  # what a document costs in memory beside its text
MAX_BUCKETS = 1 << 14
BATCH_BYTES = 4 << 20  # of text in a batch of a segment file
EXAMPLES = 5  # of what was skipped, named on the terminal


@dataclass(frozen=True)
class Sizes:
    """How much is done at once, all in bytes of text. Part of the identity: other sizes give other shards."""

    task: int = 64 << 20  # one task of the first pass, if files can be taken apart so far
    held: int = 64 << 20  # documents that the first pass holds before it writes them
    bucket: int = 8 << 20
    shard: int = 64 << 20
    row_group: int = 1 << 20


class Part(NamedTuple):
    """A file or a span of it; `bytes` is about how much text it has."""

    file: int
    span: Span | None
    bytes: int


@dataclass(frozen=True)
class Task:
    """One job of the first pass; it writes `segment` and, last, `done`."""

    number: int
    parts: tuple[Part, ...]
    files: tuple[Input, ...]  # of the parts
    folder: Path
    buckets: int
    held_bytes: int
    min_chars: int
    tolerated: Collection[str]

    @property
    def segment(self) -> Path:
        return self.folder / f"task_{self.number:06d}.arrow"

    @property
    def skipped(self) -> Path:
        return self.folder / f"task_{self.number:06d}.skipped.jsonl"

    @property
    def done(self) -> Path:
        return self.folder / f"task_{self.number:06d}.json"


class Mapped(NamedTuple):
    """What a finished task found. `low` and `high` are its least and greatest hash, None without documents."""

    documents: int
    bytes: int
    low: int | None
    high: int | None
    batches: array[int]  # the bucket of each batch of the segment file
    batch_bytes: array[int]  # and the text in it
    counts: Counter[str]  # what was skipped, by kind
    undecodable: list[str]
    cut: dict[str, int]  # plain text that was cut -> pieces
    examples: list[str]


def cut_into_parts(files: Sequence[Input], sizes: Sizes) -> list[list[Part]]:
    """The tasks: runs of files, or of row groups, of about `sizes.task` bytes of text. The machine does not enter."""
    tasks: list[list[Part]] = []
    filled = 0
    for part in (part for number, file in enumerate(files) for part in _parts(number, file, sizes.task)):
        if not tasks or filled + part.bytes > sizes.task:
            tasks.append([])
            filled = 0
        tasks[-1].append(part)
        filled += part.bytes
    return tasks


def _parts(number: int, file: Input, task_bytes: int) -> Iterator[Part]:
    try:
        if not kind_of(file.path, PARQUET):
            factor = EXPANSION if kind_of(file.path, (".gz", ".zst")) else 1
            size = file.path.stat().st_size * factor
            if size > task_bytes and kind_of(file.path, ".jsonl"):
                yield from (Part(number, span, span.end - span.start) for span in _line_spans(file.path, task_bytes))
            else:
                yield Part(number, None, size)
            return
        groups = read_footer(file.path).row_groups
    except (OSError, DataError):  # said when it is read
        yield Part(number, None, 0)
        return
    start = size = 0
    for end, group in enumerate(groups, 1):
        size += group.text_bytes
        if size >= task_bytes or end == len(groups):
            yield Part(number, Span(start, end), size)
            start, size = end, 0
    if not groups:
        yield Part(number, None, 0)


def _line_spans(path: Path, task_bytes: int) -> Iterator[Span]:
    """A file of lines in spans of whole lines, about `task_bytes` long. It is read for that: lines have numbers."""
    start = end = 0
    first = line = 1
    with open(path, "rb", buffering=READ_BYTES) as file:
        while lines := file.readlines(min(READ_BYTES, task_bytes)):
            end += sum(map(len, lines))
            line += len(lines)
            if end - start >= task_bytes:
                yield Span(start, end, first)
                start, first = end, line
    if end > start:
        yield Span(start, end, first)


def map_task(task: Task) -> None:
    """Run a task unless it is done. Raises DataError for the first thing skipped that is not tolerated."""
    if task.done.exists():
        return
    notes = _Notes(task)
    with open(task.skipped, "w", encoding="utf-8") as skipped, _Segment(task) as segment:
        for part, file in zip(task.parts, task.files, strict=True):
            taken = 0
            for item in read(file, part.span):
                item = item if isinstance(item, Skipped) else _checked(file, item, task.min_chars)
                if isinstance(item, Skipped):
                    notes.skip(item)
                    skipped.write(line_of(item.source, item.place, item.kind, item.reason))
                else:
                    segment.add(part.file, *item)
                    taken += 1
            if taken > 1 and kind_of(file.path, PLAIN):
                notes.cut[file.source] = taken
    write_whole(task.done, json.dumps(segment.summary() | notes.summary()).encode())


def line_of(source: str, place: str, kind: str, reason: str) -> str:
    """One line of skipped.jsonl."""
    return json.dumps({"source": source, "place": place, "kind": kind, "reason": reason}) + "\n"


def load_mapped(task: Task) -> Mapped:
    """What `map_task` wrote."""
    found = find_json(task.done)
    assert found is not None, task.done
    found["batches"], found["batch_bytes"] = array("I", found["batches"]), array("Q", found["batch_bytes"])
    found["counts"] = Counter(found["counts"])
    return Mapped(**found)


def _checked(file: Input, found: Found, min_chars: int) -> tuple[int, bytes] | Skipped:
    """A document's place and bytes, if it is one."""
    kind = reason = ""
    raw = b""
    if not found.text or found.text.isspace():
        kind, reason = EMPTY, "no text"
    elif len(found.text) < min_chars:
        kind, reason = SHORT, f"{len(found.text):,} characters"
    elif len(raw := found.text.encode()) > MAX_DOCUMENT_BYTES:
        kind, reason = TOO_LONG, f"a document of {len(raw):,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}"
    if not kind:
        return found.place, raw
    place = place_name(file, found.place)
    return Skipped(file.source, place, kind, reason, f"{file.path}{', ' * bool(place)}{place}: {reason}")


class _Notes:
    """What a task did not take as it was."""

    def __init__(self, task: Task):
        self._tolerated = task.tolerated
        self.counts: Counter[str] = Counter()
        self.undecodable: list[str] = []
        self.cut: dict[str, int] = {}
        self.examples: list[str] = []

    def skip(self, item: Skipped) -> None:
        if item.kind not in self._tolerated:
            raise DataError(item.error)
        self.counts[item.kind] += 1
        if item.kind == NOT_TEXT and not item.place:
            self.undecodable.append(item.source)
        if item.kind not in (EMPTY, SHORT) and len(self.examples) < EXAMPLES:
            self.examples.append(item.error)

    def summary(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "undecodable": self.undecodable, "cut": self.cut, "examples": self.examples}


class _Segment:
    """The segment file of a task: Arrow IPC, each batch of one bucket and of a few MiB."""

    def __init__(self, task: Task):
        import pyarrow as pa

        self._task = task
        self._schema = pa.schema(
            [("digest", pa.binary(DIGEST_BYTES)), ("file", pa.int32()), ("place", pa.int64()), ("text", pa.large_binary())]
        )
        self._held: list[tuple[int, bytes, int, int, bytes]] = []  # bucket, digest, file, place, text
        self._held_bytes = 0
        self._found: dict[str, Any] = {"documents": 0, "bytes": 0, "low": None, "high": None, "batches": [], "batch_bytes": []}

    def __enter__(self) -> _Segment:
        import pyarrow as pa

        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_file(str(self._task.segment), self._schema, options=options)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._flush()
        finally:
            self._writer.close()

    def add(self, file: int, place: int, raw: bytes) -> None:
        digest = hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest()
        self._held.append((bucket_of(digest, self._task.buckets), digest, file, place, raw))
        self._held_bytes += len(raw) + OVERHEAD_BYTES
        if self._held_bytes >= self._task.held_bytes:
            self._flush()

    def summary(self) -> dict[str, Any]:
        return self._found

    def _flush(self) -> None:
        self._held.sort(key=lambda document: document[0])  # stable: within a bucket the order of the input
        start = size = 0
        for end, (bucket, *_, raw) in enumerate(self._held, 1):
            size += len(raw)
            last = end == len(self._held) or self._held[end][0] != bucket
            if last or size >= BATCH_BYTES:
                self._write(self._held[start:end], bucket, size)
                start, size = end, 0
        self._held.clear()
        self._held_bytes = 0

    def _write(self, documents: list[tuple[int, bytes, int, int, bytes]], bucket: int, size: int) -> None:
        import pyarrow as pa

        _, digests, *_ = columns = list(zip(*documents, strict=True))
        self._writer.write_batch(pa.record_batch(columns[1:], schema=self._schema))
        found = self._found
        found["documents"] += len(documents)
        found["bytes"] += size
        found["batches"].append(bucket)
        found["batch_bytes"].append(size)
        ends = [int.from_bytes(digest, "big") for digest in (min(digests), max(digests))]
        found["low"] = ends[0] if found["low"] is None else min(found["low"], ends[0])
        found["high"] = ends[1] if found["high"] is None else max(found["high"], ends[1])


def bucket_of(digest: bytes, buckets: int) -> int:
    """Which of the equal ranges of hashes a hash falls into."""
    return int.from_bytes(digest, "big") * buckets >> (8 * DIGEST_BYTES)
