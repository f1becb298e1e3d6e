"""The first pass: every document once, hashed, into the segment file of its task, in the order of its hash's bucket.

A bucket is a range of hashes, so that equal texts meet in one, and consecutive buckets hold consecutive hashes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from picotrain.data.prepare.documents import read
from picotrain.data.prepare.found import EMPTY, MAX_DOCUMENT_BYTES, SHORT, Found, Skipped, line_of, place_name, too_long
from picotrain.data.prepare.inputs import PLAIN, Input, kind_of
from picotrain.data.prepare.parts import Job, Part, runs
from picotrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

DIGEST_BYTES = 16
END = 1 << (8 * DIGEST_BYTES)  # above every hash
OVERHEAD_BYTES = 256  # what a document costs in memory beside its text
BATCH_BYTES = 4 << 20  # of text in a batch of a segment file
EXAMPLES = 5  # of what was skipped, named on the terminal


@dataclass(frozen=True)
class Task(Job):
    """One job of the first pass; its output is a segment.

    It finds: documents; low and high, its least and greatest hash; batches, [bucket, bytes of text] of each
    batch of the segment; counts of what was skipped, by kind; examples of that; cut, the plain texts that gave several documents.
    """

    parts: tuple[Part, ...]
    files: tuple[Input, ...]  # of the parts
    buckets: int
    held_bytes: int
    min_chars: int
    tolerated: Collection[str]

    def found(self) -> dict[str, Any]:
        import numpy as np

        found = super().found()
        return found | {"batches": np.array(found["batches"], np.uint32).reshape(-1, 2)}  # of a terabyte there are many


def map_task(task: Task) -> None:
    """Run a task. Raises DataError for the first thing skipped that is not tolerated."""
    import pyarrow as pa

    counts: Counter[str] = Counter()
    cut: dict[str, int] = {}
    examples: list[str] = []
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with open(task.skipped, "w", encoding="utf-8") as skipped, pa.ipc.new_file(str(task.output), _schema(), options=options) as writer:
        segment = _Segment(writer, task)
        for part, file in zip(task.parts, task.files, strict=True):
            taken = 0
            for item in read(file, part.span):
                if isinstance(item, Found) and not isinstance(item := _checked(file, item, task.min_chars), Skipped):
                    segment.add(part.file, *item)
                    taken += 1
                    continue
                assert isinstance(item, Skipped)
                if item.kind not in task.tolerated:
                    raise DataError(item.error)
                counts[item.kind] += 1
                if item.kind not in (EMPTY, SHORT) and len(examples) < EXAMPLES:
                    examples.append(item.error)
                skipped.write(line_of(file.source, item.place, item.kind, item.reason))
            if taken > 1 and kind_of(file.path, PLAIN):
                cut[file.source] = taken
        segment.flush()
    task.finish(segment.found | {"counts": counts, "cut": cut, "examples": examples})


def _checked(file: Input, found: Found, min_chars: int) -> tuple[int, bytes] | Skipped:
    """A document's place and bytes, if it is one."""
    if not found.text or found.text.isspace():
        return Skipped(file, place_name(file, found.place), EMPTY, "no text")
    if len(found.text) < min_chars:
        return Skipped(file, place_name(file, found.place), SHORT, f"{len(found.text):,} characters")
    if len(raw := found.text.encode()) > MAX_DOCUMENT_BYTES:
        return too_long(file, place_name(file, found.place), len(raw))
    return found.place, raw


class _Segment:
    """The segment file of a task: Arrow IPC, each batch of one bucket and of a few MiB."""

    def __init__(self, writer: Any, task: Task):
        self._writer, self._task = writer, task
        self._held: list[tuple[int, bytes, int, int, bytes]] = []  # bucket, digest, file, place, text
        self._held_bytes = 0
        self.found: dict[str, Any] = {"documents": 0, "low": END, "high": -1, "batches": []}

    def add(self, file: int, place: int, raw: bytes) -> None:
        digest = hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest()
        number, found = int.from_bytes(digest, "big"), self.found
        found["documents"] += 1
        found["low"], found["high"] = min(found["low"], number), max(found["high"], number)
        self._held.append((number * self._task.buckets // END, digest, file, place, raw))
        self._held_bytes += len(raw) + OVERHEAD_BYTES
        if self._held_bytes >= self._task.held_bytes:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        self._held.sort(key=itemgetter(0))  # stable: within a bucket the order of the input
        for bucket, group in groupby(self._held, itemgetter(0)):
            documents = list(group)
            sizes = [len(document[-1]) for document in documents]
            for start, end in runs(sizes, BATCH_BYTES):
                columns = list(zip(*documents[start:end], strict=True))[1:]
                self._writer.write_batch(pa.record_batch(columns, schema=_schema()))
                self.found["batches"].append([bucket, sum(sizes[start:end])])
        self._held.clear()
        self._held_bytes = 0


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("digest", pa.binary(DIGEST_BYTES)), ("file", pa.int32()), ("place", pa.int64()), ("text", pa.large_binary())])
