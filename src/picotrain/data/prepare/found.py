"""What is found in input files: documents, and a word for everything that is none."""

from __future__ import annotations

import json
from typing import NamedTuple

from picotrain.data.prepare.inputs import CSV, JSON_LINES, PARQUET, Input, kind_of

MAX_DOCUMENT_BYTES = 256 << 20  # one document is held in memory as a whole

EMPTY, NULL, SHORT, DUPLICATE = "empty", "null", "short", "duplicate"
NOT_TEXT, BAD_LINE, UNREADABLE, TOO_LONG = "not text", "bad line", "unreadable", "too long"
HARMLESS = frozenset({EMPTY, SHORT, DUPLICATE})  # left out without anything being wrong
KINDS = frozenset({*HARMLESS, NULL, NOT_TEXT, BAD_LINE, UNREADABLE, TOO_LONG})


class Span(NamedTuple):
    """A part of a file: row groups of Parquet, or the bytes of whole JSON lines, of which the first has this number."""

    start: int
    end: int
    first_line: int = 1


class Found(NamedTuple):
    """A document; `place` is its line, its row (from 0) or its piece (from 0) within the file."""

    place: int
    text: str


class Skipped(NamedTuple):
    """Something that gives no document: where it is ("" for the whole file), one of KINDS, and why."""

    file: Input
    place: str
    kind: str
    reason: str

    @property
    def error(self) -> str:
        """The whole sentence."""
        if self.place.startswith("line "):
            return f"{self.file.path}:{self.place.removeprefix('line ')}: {self.reason}"
        return f"{self.file.path}, {self.place}: {self.reason}" if self.place else f"{self.file.path} {self.reason}"


def too_long(file: Input, place: str, size: int) -> Skipped:
    """A document above the limit."""
    return Skipped(file, place, TOO_LONG, f"has a document of {size:,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}")


def place_name(file: Input, place: int) -> str:
    """How a place is called in this kind of file."""
    if kind_of(file.path, PARQUET):
        return f"row {place}"
    if kind_of(file.path, (*JSON_LINES, *CSV)):
        return f"line {place}"
    return f"piece {place}" if place else ""


def line_of(source: str, place: str, kind: str, reason: str) -> str:
    """One line of skipped.jsonl."""
    return json.dumps({"source": source, "place": place, "kind": kind, "reason": reason}) + "\n"
