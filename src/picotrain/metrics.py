"""metrics.jsonl: what a run measured, one JSON object a line.

    {"step": 12, "kind": "train", "loss": 3.21, ...}

`kind` is train, val, core, sample, checkpoint, event or that of another package's evaluation (`picotrain.contracts.Evaluation`).
Each line is strict JSON: a number that is not finite stands there as null.
One process writes (rank 0 of the run that holds the lock); anyone may read at any time. A line is whole when its newline is there.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from picotrain.errors import RunError

METRICS = "metrics.jsonl"
CUT = "metrics.cut.jsonl"  # what resumes have cut off, one after the other
HAPPENED = ("event", "checkpoint")  # lines that stay true when the steps after them are trained again
MAX_LINE_BYTES = 16 << 20  # a line of samples has some kilobytes
# Line ends to some readers (Python's str.splitlines among them), though not to JSON: written as escapes.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: numpy and torch scalars as numbers, tuples as lists, NaN and infinity as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names that trackers show: {"kind": "val", "val_bpb": 1.2} -> {"val/val_bpb": 1.2}."""
    numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}
    return {f"{record['kind']}/{key}": float(value) for key, value in numbers.items()}


@dataclass(frozen=True)
class Cut:
    """What `truncate_to` found: bytes cut off, where they are kept, or bytes that should have been there and are not."""

    cut_bytes: int = 0
    kept_in: Path | None = None
    missing_bytes: int = 0


class MetricsFile:
    """Appends records to metrics.jsonl, each line by one write to an O_APPEND descriptor: whole or not at all.

    A line that cannot be written (disk full) waits in memory for the next write: a full disk costs no step of a run that could go on.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._error: OSError | None = None
        try:
            # Not through a link: what a resume cuts off must be this run's.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.close(self._fd)
                raise OSError(0, "it is no regular file")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from error
        # A kill can tear the last line; the next one must not be glued to it.
        self._cut_at(path.read_bytes().rfind(b"\n") + 1)

    @property
    def waiting_lines(self) -> int:
        """Lines that could not be written yet."""
        return len(self._waiting)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record (and, first, those that wait)."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        self._waiting.append(line.translate(_LINE_ENDS).encode("utf-8", errors="replace") + b"\n")
        self._drain()

    def size_bytes(self) -> int:
        """The file's length, after it has reached the disk: what a checkpoint records must still be there after a power cut.

        Raises RunError if lines wait that cannot be written.
        """
        self._drain()
        if self._waiting:
            reason = self._error.strerror if self._error else "short write"
            raise RunError(f"{self.path}: {len(self._waiting)} lines cannot be written: {reason}; free space on this disk")
        os.fsync(self._fd)
        return os.fstat(self._fd).st_size

    def truncate_to(self, n_bytes: int) -> Cut:
        """Cut the file back to `n_bytes`, the length a checkpoint recorded, where steps or measurements follow that will come again; they
        are kept in metrics.cut.jsonl. Events and checkpoints that follow first stay: after a clean stop nothing is cut.

        A shorter file is left as it is and the lack is reported. Raises RunError where `n_bytes` is not at the end of a line.
        """
        size_bytes = os.fstat(self._fd).st_size
        if n_bytes > size_bytes:
            return Cut(missing_bytes=n_bytes - size_bytes)
        if n_bytes > 0 and os.pread(self._fd, 1, n_bytes - 1) != b"\n":
            raise RunError(
                f"{self.path}: byte {n_bytes:,} does not end a line, so this is not the file that the checkpoint was saved with; "
                "restore it, or move it away to go on without the earlier lines"
            )
        return self._cut_at(n_bytes + _happened_bytes(self._tail(n_bytes)))

    def close(self) -> None:
        """Try once more to write the lines that wait, then close."""
        self._drain()
        os.close(self._fd)

    def _drain(self) -> None:
        while self._waiting and self._append(self._waiting[0]):
            self._waiting.popleft()

    def _append(self, line: bytes) -> bool:
        before_bytes = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) == len(line):
                return True
        except OSError as error:
            self._error = error
        os.ftruncate(self._fd, before_bytes)
        return False

    def _tail(self, n_bytes: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(n_bytes)
            return file.read()

    def _cut_at(self, n_bytes: int) -> Cut:
        """Keep everything from `n_bytes` on in the file of what was cut, then drop it here: in this order, so that a kill loses nothing."""
        tail = self._tail(n_bytes)
        if not tail:
            return Cut()
        kept_in = self.path.with_name(CUT)
        whole, newline, torn = tail.rpartition(b"\n")
        kept = whole + newline
        if torn:  # by a kill; as a line of its own, which is JSON like the others
            kept += json.dumps({"kind": "torn", "text": torn.decode(errors="replace")}).encode() + b"\n"
        try:
            fd = os.open(kept_in, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            with open(fd, "a+b") as file:
                size_bytes = file.seek(0, os.SEEK_END)
                file.seek(max(0, size_bytes - len(kept)))
                if file.read() != kept:  # else a kill came between the keeping and the dropping
                    file.write(kept)
                    file.flush()
                    os.fsync(fd)
        except OSError as error:
            raise RunError(f"{kept_in} cannot be written: {error.strerror}") from error
        os.ftruncate(self._fd, n_bytes)
        return Cut(cut_bytes=len(tail), kept_in=kept_in)


def _happened_bytes(tail: bytes) -> int:
    """The length of the lines at the beginning that tell what happened, not what was measured."""
    length = 0
    for line in tail.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("kind") not in HAPPENED:
            break
        length += len(line)
    return length


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, also while it is being written: a torn last line is passed over.

    Raises RunError, with the line, where the file is damaged before its end, and where there is no such file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO without a writer would block
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RunError(f"{path} cannot be read: it is no regular file")
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES:
                raise RunError(f"{path}, line {number} is damaged: it is longer than {MAX_LINE_BYTES:,} bytes")
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise RunError(f"{path}, line {number} is damaged: it is no JSON ({error}); remove that line to read the rest") from error
            if not isinstance(record, dict):
                raise RunError(f"{path}, line {number} is damaged: expected a JSON object, found {type(record).__name__}")
            yield record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} stands in it")
