"""The size cap of a folder of shards: what is removed to make room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from picotrain.data.corpus import Shard
from picotrain.data.remote.shared import LOCK, PARTIAL, lock_path, try_lock
from picotrain.disk import is_at
from picotrain.text import size


class Room:
    """Keeps the shards in `folder` below `cap_bytes`, by removing the least recently used that nobody holds."""

    def __init__(self, folder: Path, cap_bytes: int | None, say: Callable[[str], None]):
        self._folder, self._cap, self._say = folder, cap_bytes, say
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}  # bytes of the shards that we are fetching, by name
        self._said = False

    @contextmanager
    def reserved(self, shard: Shard, wanted: Sequence[Shard], urgent: bool) -> Iterator[bool]:
        """Room for a shard while it is fetched: whether there is. Of the shards `wanted` soon, given most urgent first, none
        is removed unless this one is urgent. Where all are held, an urgent one gets its room all the same."""
        with self._lock:
            granted = self._make(shard, [other.name for other in wanted], urgent)
            if granted:
                self._coming[shard.name] = shard.bytes
        try:
            yield granted
        finally:
            with self._lock:
                self._coming.pop(shard.name, None)

    def _make(self, shard: Shard, wanted: list[str], urgent: bool) -> bool:
        if self._cap is None:
            return True
        over = self._used(shard) + sum(self._coming.values()) + shard.bytes - self._cap
        for path in self._removable(shard, wanted, urgent) if over > 0 else []:
            over -= _remove_partial(path) if PARTIAL in path.name else _remove_whole(path)
            if over <= 0:
                break
        if over > 0 and urgent and not self._said:
            self._said = True
            self._say(
                f"{self._folder} goes {size(over)} above data.cache_bytes={self._cap}: the shards in use at once are larger than that"
            )
        return over <= 0 or urgent

    def _used(self, shard: Shard) -> int:
        """Bytes in the folder, but for the shards that are coming: those count with what they will be."""
        coming = {shard.name, *self._coming}
        return sum(_bytes(path) for path in self._shards() if path.name.split(PARTIAL)[0] not in coming or PARTIAL not in path.name)

    def _removable(self, shard: Shard, wanted: list[str], urgent: bool) -> list[Path]:
        """In the order in which they may go: forgotten parts, whole shards by last use, and for an urgent one the wanted
        shards, the least urgent first."""
        rank = {name: len(wanted) - place for place, name in enumerate(wanted)}
        found = []
        for path in self._shards():
            name, is_part = path.name.split(PARTIAL)[0], PARTIAL in path.name
            if name != shard.name and name not in self._coming and (urgent or is_part or name not in rank):
                found.append(((not is_part, rank.get(name, 0), _used_at(path)), path))
        return [path for _, path in sorted(found)]

    def _shards(self) -> list[Path]:
        """Whole shards and parts of some."""
        return [path for path in self._folder.iterdir() if ".parquet" in path.name and not path.name.endswith(LOCK)]


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used_at(path: Path) -> int:
    try:
        return path.stat().st_atime_ns
    except FileNotFoundError:
        return 0


def _remove_whole(path: Path) -> int:
    """The bytes that were freed: 0 when it is held."""
    try:
        with open(path, "rb") as file:
            if not try_lock(file) or not is_at(file.fileno(), path):
                return 0
            freed = _bytes(path)
            path.unlink()
            return freed
    except FileNotFoundError:
        return 0


def _remove_partial(path: Path) -> int:
    """The bytes that were freed: 0 when it is being fetched."""
    lock = lock_path(path)
    with open(lock, "a+") as file:
        if not try_lock(file) or not is_at(file.fileno(), lock):
            return 0
        freed = _bytes(path)
        path.unlink(missing_ok=True)
        lock.unlink()
        return freed
