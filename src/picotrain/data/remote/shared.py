"""What processes that share a folder of shards agree on: names and locks."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from picotrain.data.corpus import Shard
from picotrain.data.remote.errors import Cancelled
from picotrain.disk import is_at

PARTIAL = ".partial."
LOCK = ".lock"
LOOK_S = 0.05  # how often a lock that another one has is tried


def partial_path(folder: Path, shard: Shard) -> Path:
    """Where a shard grows: the same for all who want the same content."""
    return folder / f"{shard.name}{PARTIAL}{shard.fingerprint[:8]}"


def lock_path(partial: Path) -> Path:
    """The file whose lock is that of a partial file."""
    return partial.with_name(partial.name + LOCK)


def flock(file: IO[bytes] | IO[str], kind: int, stop: threading.Event) -> None:
    """Lock an open file, waiting for it in a way that can be given up. Raises Cancelled."""
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if stop.wait(LOOK_S):
                raise Cancelled from None


def try_lock(file: IO[bytes] | IO[str]) -> bool:
    """Whether nobody else has this file locked in any way; then we have it for ourselves."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(partial: Path, stop: threading.Event) -> Iterator[IO[str]]:
    """Be the only one who works on this partial file; the open lock file. It goes when the partial file has gone."""
    path = lock_path(partial)
    while True:
        file = open(path, "a+")  # noqa: SIM115  # held open: closing it ends the lock
        try:
            flock(file, fcntl.LOCK_EX, stop)
        except BaseException:
            file.close()
            raise
        if is_at(file.fileno(), path):
            break
        file.close()  # removed by who had it: this lock protects nothing
    try:
        yield file
    finally:
        if not partial.exists():
            path.unlink(missing_ok=True)
        file.close()
