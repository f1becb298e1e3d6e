"""`RemoteFiles`: the shards of one URL as verified local files, fetched ahead of need into a folder with a size cap.

All that processes have to agree on is in the folder, guarded by locks that the kernel drops with their process:

    NAME                a whole shard; a shared lock on it keeps it from being removed
    NAME.partial.HASH   what has arrived of it
    .NAME.lock          locked by who fetches it
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from picotrain.data.corpus import Shard
from picotrain.data.remote.errors import Cancelled
from picotrain.data.remote.fetch import Fetcher
from picotrain.data.remote.room import Room
from picotrain.errors import DataError
from picotrain.lock import LOOK_S, flock, is_current, locked
from picotrain.text import size

REST_S = 20.0  # a shard that could not be fetched ahead is left alone for so long
REMOVED_S = 5.0  # how often the threads look whether another process removed what is wanted
CLOSE_S = 2.0  # within which the threads are gone


class RemoteFiles:
    """The shards of folder `url` in the local `folder`, of which whole ones stay below `cap_bytes` (None: no cap) except for
    those that are in use. `downloads` shards are fetched ahead at once. Safe to use from several threads and processes."""

    def __init__(self, url: str, folder: Path, cap_bytes: int | None, *, say: Callable[[str], None], downloads: int = 4):
        self.folder, self._url, self._say, self._downloads = Path(folder), url, say, downloads
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = f"{self.folder} cannot be made: {error.strerror}"
            raise DataError(f"{where}; set PICOTRAIN_CACHE to a folder that can be written") from error
        self._room = Room(self.folder, cap_bytes, say)
        self._wake = threading.Condition()  # guards what follows
        self._fetcher = Fetcher(url, self.folder, say)
        self._threads: list[threading.Thread] = []
        self._wanted: tuple[Shard, ...] = ()
        self._busy: set[str] = set()
        self._no_room: set[str] = set()
        self._failed: dict[str, tuple[float, Exception]] = {}  # when, and why, a shard could not be fetched ahead

    @contextmanager
    def hold(self, shard: Shard) -> Generator[Path]:
        """The shard as a whole, verified local file that stays while the context lasts; fetched first if it is not there.

        Raises DataError when it cannot be had, is not what its footer promised, the disk is full, or `close` is called.
        """
        fetcher = self._fetcher
        try:
            file = self._open(shard, fetcher)
        except Cancelled:
            raise DataError(f"{fetcher.where(shard)}: the wait for it was given up, as its reader was closed") from None
        try:
            yield self.folder / shard.name
        finally:
            file.close()
            with self._wake:  # there may be room now
                self._no_room.clear()
                self._wake.notify_all()

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch these in the background, the most urgent first; replaces what was asked for before. Never raises: what fails
        is tried again when it is held, and fails there."""
        with self._wake:
            if self._wanted == (wanted := tuple(shards)):
                return
            self._wanted = wanted
            self._no_room.clear()
            while len(self._threads) < min(self._downloads, len(wanted)):
                self._threads.append(threading.Thread(target=self._work, args=[self._fetcher], name="picotrain-fetch", daemon=True))
                self._threads[-1].start()
            self._wake.notify_all()

    def missing(self, shards: Sequence[Shard]) -> list[str]:
        """Nothing: what the store lacks is known when it is asked."""
        return []

    def close(self) -> None:
        """Stop all transfers and waits; what has arrived is kept. A later `hold` or `prefetch` starts afresh."""
        with self._wake:
            self._fetcher.stop.set()
            self._fetcher = Fetcher(self._url, self.folder, self._say)
            threads, self._threads, self._wanted = self._threads, [], ()
            self._wake.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _open(self, shard: Shard, fetcher: Fetcher) -> IO[bytes]:
        """The whole shard, opened under a shared lock, marked as used now."""
        path = self.folder / shard.name
        while True:
            if not fetcher.is_whole(shard):
                self._say(f"waiting for {fetcher.where(shard)} ({size(shard.bytes)})")
                self._obtain(shard, fetcher, urgent=True)
            try:
                file = open(path, "rb")  # noqa: SIM115  # held open: closing it ends the lock
            except FileNotFoundError:
                continue  # removed in this moment
            while not flock(file, fcntl.LOCK_SH):  # by who is about to remove it
                time.sleep(LOOK_S)
            if is_current(file, path) and fetcher.is_whole(shard):
                os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
                return file
            file.close()

    def _obtain(self, shard: Shard, fetcher: Fetcher, urgent: bool) -> None:
        """See to it that the shard is there, whole; unless it is not urgent and there is no room for it."""
        began = time.monotonic()

        def wait() -> None:
            if fetcher.stop.wait(LOOK_S):
                raise Cancelled

        with locked(self.folder / shard.name, wait):
            if fetcher.is_whole(shard):
                return
            if urgent and shard.name in self._failed and self._failed[shard.name][0] > began:
                raise self._failed[shard.name][1]  # just now, while we waited for that attempt
            with self._room.reserved(shard, self._wanted, urgent) as granted:
                if granted:
                    fetcher.fetch(shard)
                    self._failed.pop(shard.name, None)
                else:
                    self._no_room.add(shard.name)

    def _work(self, fetcher: Fetcher) -> None:
        """A background thread: fetches the most urgent shard that nobody else does, until its fetcher is stopped."""
        while not fetcher.stop.is_set():
            with self._wake:
                if (shard := self._next(fetcher)) is None:
                    self._wake.wait(REMOVED_S)
                    continue
                self._busy.add(shard.name)
            try:
                self._obtain(shard, fetcher, urgent=False)
            except Cancelled:
                return
            except Exception as error:  # it surfaces at `hold`
                self._failed[shard.name] = (time.monotonic(), error)
            finally:
                with self._wake:
                    self._busy.discard(shard.name)

    def _next(self, fetcher: Fetcher) -> Shard | None:
        rested = time.monotonic() - REST_S
        for shard in self._wanted:
            waits = shard.name in self._busy or shard.name in self._no_room or self._failed.get(shard.name, (rested,))[0] > rested
            if not waits and not fetcher.is_whole(shard):
                return shard
        return None
