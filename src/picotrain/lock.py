"""Locks between processes, which the kernel drops with their process: `locked` for a file or folder that is being made, `RunLock`
for a run directory: one start at a time, and none while a worker of an earlier one still lives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TextIO

from picotrain.errors import DataError, RunError
from picotrain.terminal import say

LOCK_FILE = ".lock"
# Workers look for their launcher every half second (see `picotrain.worker`); the rest is for a loaded machine.
ORPHAN_WAIT_S = 10.0
OPENING_TRIES = 20  # against starts that fail at the same moment and take the folder away
LOOK_S = 0.05  # how often a lock that another one has is tried


def open_lock(path: Path, mode: str = "a+") -> TextIO:
    """The file of a lock, not followed through a link, not emptied, and not waited for where it is a pipe. Raises OSError."""
    file: Any = open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def flock(file: IO[Any], kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock was got, without waiting; True with a warning where the file system knows no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _warn(Path(file.name).parent, error.strerror)
    return True


@lru_cache
def _warn(folder: Path, why: str) -> None:
    """Once for each folder."""
    say(f"picotrain: files in {folder} cannot be locked ({why}): other processes will not be noticed")


def is_current(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one with this name: else whoever had its lock has taken it away."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, wait: Callable[[], object] = lambda: time.sleep(LOOK_S)) -> Generator[None]:
    """Hold `path`, which need not be there, by an empty file beside it that vanishes with the lock.

    `wait` is called again and again while another process has it; what it raises gives the wait up. Raises DataError where no lock can be
    made, or the file is somebody's.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            file = open_lock(lock)
        except OSError as error:
            raise DataError(f"{lock if os.path.lexists(lock) else path.parent} cannot be written: {error.strerror}") from error
        try:
            if os.fstat(file.fileno()).st_size:
                raise DataError(f"{lock} is no lock of picotrain's, which are empty files; move it elsewhere")
            while not flock(file):
                wait()
            if is_current(file, lock):
                break
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it when it was done: this lock protects nothing
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


class RunLock:
    """A flock on RUN/.lock: taken exclusively to get in, held shared while in.

    The workers share it with their launcher (`share`), so it is free exactly when the last process that could write is
    gone, however it ended: the kernel releases it. The file says who came in last: {"pid", "host", "since"}.

    The file stays, and so does the folder, once anything has been written beside it. A start that has failed before takes away what it
    made: the file, and the folders that were not there before. It does so while it has the lock exclusively. Whoever has meanwhile opened
    the file that goes sees, once it has the lock, that the path leads to another one, and begins anew.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir.absolute() / LOCK_FILE
        self._file: TextIO | None = None
        self._made: list[Path] = []  # what was not there before: the file, then its folder and those above
        self._beside: set[str] = set()  # what was in the folder when the file was made

    def __enter__(self) -> RunLock:
        """Raise RunError, naming pid and host, while another start has the directory.

        A start that died leaves workers for the moment it takes them to notice: those are waited for.
        """
        if self._file is not None:  # shared
            return self
        file = self._open()
        if not _is_own(file):
            file.close()
            raise RunError(f"{self.path} is no lock of picotrain's and would be written over; move it away, or name another run.dir")
        deadline = time.monotonic() + ORPHAN_WAIT_S
        while not flock(file) or not is_current(file, self.path):
            if not is_current(file, self.path):  # a start that failed has taken it away
                file.close()
                file = self._open()
                continue
            holder = _holder(file)
            if not _is_dead(holder) or time.monotonic() > deadline:
                file.close()
                raise RunError(_refusal(self.path.parent, holder))
            time.sleep(0.1)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), (json.dumps(me) + "\n").encode(), 0)  # unbuffered: nothing is left that closing would write again
        except OSError as error:  # a full disk
            self._remove_what_was_made()
            file.close()
            raise RunError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._keep(file)
        return self

    def share(self) -> RunLock:
        """Hold the lock beside the launcher that took it, for as long as this process lives."""
        self._keep(self._open())
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Let go of the directory, and take away what this start has made and left empty. Nothing where it is not held."""
        if self._file is None:
            return
        if self._made and flock(self._file):  # nobody shares it
            self._remove_what_was_made()
        self._file.close()
        self._file = None

    def _remove_what_was_made(self) -> None:
        with suppress(OSError):  # whatever is in the way stays
            if {path.name for path in self.path.parent.iterdir()} != {LOCK_FILE, *self._beside}:
                return
            for path in self._made:
                path.unlink() if path == self.path else path.rmdir()

    def _open(self) -> TextIO:
        """The lock's file, made where there is none; what is made is remembered."""
        folder, problem = self.path.parent, OSError()
        for _ in range(OPENING_TRIES):
            try:
                missing = [place for place in (folder, *folder.parents) if not place.is_dir()]
                self._made = [place for place in reversed(missing) if _make(place)][::-1]
                try:
                    file = open_lock(self.path, "x+")
                except FileExistsError:
                    return open_lock(self.path)
                self._made.insert(0, self.path)
                self._beside = {path.name for path in folder.iterdir()} - {LOCK_FILE}
                return file
            except FileNotFoundError as error:  # a start that failed has taken its folder away in between
                problem = error
            except OSError as error:
                problem = error
                break
        for place in self._made:
            with suppress(OSError):
                place.rmdir()
        raise RunError(f"{folder} cannot be written: {problem.strerror or problem}") from problem

    def _keep(self, file: TextIO) -> None:
        # From exclusive to shared is not atomic: whoever gets in between has the directory, and this start has not.
        if not flock(file, fcntl.LOCK_SH):
            file.close()
            raise RunError(_refusal(self.path.parent, _holder(file := self._open())))
        self._file = file


def _make(folder: Path) -> bool:
    """Whether the folder was made just now; it may be another start's."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def is_locked(run_dir: Path) -> bool:
    """Whether a start or one of its workers has the directory now."""
    try:
        with open_lock(run_dir.absolute() / LOCK_FILE, "r+") as file:
            return not flock(file)
    except OSError:
        return False


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
