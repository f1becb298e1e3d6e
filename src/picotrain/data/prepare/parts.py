"""How the work is cut: inputs into parts of a bounded size, and what a job leaves on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.data.corpus import read_footer
from picotrain.data.prepare.documents import EXPANSION, READ_BYTES
from picotrain.data.prepare.found import Span
from picotrain.data.prepare.inputs import PARQUET, Input, kind_of
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError


@dataclass(frozen=True)
class Sizes:
    """How much is done at once, all in bytes of text. Part of the identity: other sizes give other shards."""

    task: int = 64 << 20  # one task of the first pass, if files can be taken apart so far
    held: int = 64 << 20  # documents that the first pass holds before it writes them
    bucket: int = 8 << 20
    shard: int = 64 << 20
    row_group: int = 1 << 20


@dataclass(frozen=True)
class Job:
    """A piece of work that is done once: it writes `output` and `skipped`, and last `done`, which holds what was found."""

    base: Path  # of the names of its files

    @property
    def output(self) -> Path:
        return self.base.with_suffix(".arrow")

    @property
    def skipped(self) -> Path:
        return self.base.with_suffix(".skipped.jsonl")

    @property
    def done(self) -> Path:
        return self.base.with_suffix(".json")

    def finish(self, found: dict[str, Any]) -> None:
        write_whole(self.done, json.dumps(found).encode())

    def found(self) -> dict[str, Any]:
        found = find_json(self.done)
        assert found is not None, self.done
        return found


class Part(NamedTuple):
    """A file or a span of it; `bytes` is about how much text it has."""

    file: int
    span: Span | None
    bytes: int


def runs(sizes: Sequence[int], at_least: int) -> list[tuple[int, int]]:
    """Consecutive things of these sizes in runs [start, end) of at least so much; a rest of less than half joins the run before."""
    starts, filled = [], at_least
    for index, size in enumerate(sizes):
        if filled >= at_least:
            starts.append(index)
            filled = 0
        filled += size
    if len(starts) > 1 and filled < at_least // 2:
        starts.pop()
    return list(pairwise([*starts, len(sizes)]))


def cut_into_parts(files: Sequence[Input], sizes: Sizes) -> list[list[Part]]:
    """The tasks: runs of files, or of row groups, of about `sizes.task` bytes of text. The machine does not enter."""
    parts = [part for number, file in enumerate(files) for part in _parts(number, file, sizes.task)]
    return [parts[start:end] for start, end in runs([part.bytes for part in parts], sizes.task)]


def _parts(number: int, file: Input, task_bytes: int) -> Iterator[Part]:
    try:
        if kind_of(file.path, PARQUET):
            texts = [group.text_bytes for group in read_footer(file.path).row_groups]
            cuts = runs(texts, task_bytes) if texts else []
            yield from (Part(number, Span(start, end), sum(texts[start:end])) for start, end in cuts)
            if not cuts:
                yield Part(number, None, 0)
            return
        size = file.path.stat().st_size * (EXPANSION if kind_of(file.path, (".gz", ".zst")) else 1)
    except (OSError, DataError):  # said when it is read
        yield Part(number, None, 0)
        return
    if size > task_bytes and kind_of(file.path, ".jsonl"):
        yield from (Part(number, span, span.end - span.start) for span in _line_spans(file.path, task_bytes))
    else:
        yield Part(number, None, size)


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
