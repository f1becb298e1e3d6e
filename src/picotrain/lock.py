"""The lock of a run directory: one start at a time, and none while a worker of an earlier one still lives."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TextIO

from picotrain.errors import RunError

LOCK_FILE = ".lock"
# Workers look for their launcher every half second (see `picotrain.worker`); the rest is for a loaded machine.
ORPHAN_WAIT_S = 10.0


class RunLock:
    """A flock on RUN/.lock: taken exclusively to get in, held shared while in. Reentrant within a process.

    The workers share it with their launcher (`share`), so it is free exactly when the last process that could write is
    gone, however it ended: the kernel releases it. The file says who came in last: {"pid", "host", "since"}.
    """

    _held: ClassVar[set[Path]] = set()

    def __init__(self, run_dir: Path):
        self.path = run_dir.absolute() / LOCK_FILE
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        """Raise RunError, naming pid and host, while another start has the directory.

        A start that died leaves workers for the moment it takes them to notice: those are waited for.
        """
        if self.path in self._held:
            return self
        file = self._open()
        if not _is_own(file):
            file.close()
            raise RunError(f"{self.path} is no lock of picotrain's and would be written over; move it away, or name another run.dir")
        deadline = time.monotonic() + ORPHAN_WAIT_S
        while not _flock(file, fcntl.LOCK_EX):
            holder = _holder(file)
            if not _is_dead(holder) or time.monotonic() > deadline:
                file.close()
                raise RunError(_refusal(self.path.parent, holder))
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        file.write(json.dumps(me) + "\n")
        file.flush()
        self._keep(file)
        return self

    def share(self) -> RunLock:
        """Hold the lock beside the launcher that took it, for as long as this process lives."""
        self._keep(self._open())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()  # the file stays: removing it would let two starts hold two different ones
            self._file = None
            self._held.discard(self.path)

    def _open(self) -> TextIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path, "a+", opener=_no_link)
        except OSError as error:
            raise RunError(f"{self.path.parent} cannot be written: {error.strerror or error}") from error

    def _keep(self, file: TextIO) -> None:
        # From exclusive to shared is not atomic: whoever gets in between has the directory, and this start has not.
        if not _flock(file, fcntl.LOCK_SH):
            file.close()
            raise RunError(_refusal(self.path.parent, _holder(file := self._open())))
        self._file = file
        self._held.add(self.path)


def _no_link(path: str, flags: int) -> int:
    """Open a file that is no symlink, which in a stranger's run could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def is_locked(run_dir: Path) -> bool:
    """Whether a start or one of its workers has the directory now."""
    try:
        with open(run_dir.absolute() / LOCK_FILE, "a+", opener=_no_link) as file:
            return not _flock(file, fcntl.LOCK_EX)
    except OSError:
        return False


def _flock(file: TextIO, kind: int) -> bool:
    """Whether the lock was got; True with a warning where the file system knows no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"picotrain: {file.name} cannot be locked ({error.strerror}): a second start will not be noticed", file=sys.stderr)
    return True


def _holder(file: TextIO) -> dict[str, Any]:
    """Who wrote the file, {} when nobody has yet."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_own(file: TextIO) -> bool:
    """Whether a file is empty or says who wrote it last."""
    try:
        file.seek(0)
        return not file.read().strip() or "pid" in _holder(file)
    except ValueError:  # not even text
        return False


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _refusal(run_dir: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{run_dir} is in use by another process; wait for it to end, or name another run.dir"
    who = f"pid {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    if _is_dead(holder):
        return f"{run_dir} is still in use by workers of a start that died ({who}); end them first"
    return f"{run_dir} is in use by {who}; wait for it, or stop it with `kill -TERM {holder.get('pid')}` (it saves), then start again"
