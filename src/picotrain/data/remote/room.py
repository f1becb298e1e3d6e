"""The size cap of a folder of shards: what is removed to make room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from picotrain.data.corpus import Shard
from picotrain.data.remote.fetch import PARTIAL
from picotrain.lock import flock, is_current, locked
from picotrain.text import size


class Room:
    """Keeps the shards in `folder` below `cap_bytes`, by removing the least recently used that nobody holds."""

    def __init__(self, folder: Path, cap_bytes: int | None, say: Callable[[str], None]):
        self._folder, self._cap, self._say = folder, cap_bytes, say
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}  # bytes of the shards that we are fetching, by name
        self._said = False

    @contextmanager
    def reserved(self, shard: Shard, wanted: Sequence[Shard], urgent: bool) -> Generator[bool]:
        """Room for a shard while it is fetched: whether there is. Of the shards `wanted` soon, given most urgent first, none
        is removed unless this one is urgent. Where all are held, an urgent one gets its room all the same."""
        with self._lock:
            over = self._make({**self._coming, shard.name: shard.bytes}, [other.name for other in wanted], urgent)
            if granted := over <= 0 or urgent:
                self._coming[shard.name] = shard.bytes
        if over > 0 and urgent and not self._said:
            self._said = True
            excess = f"{self._folder} goes {size(over)} above data.cache_bytes={self._cap}"
            self._say(f"{excess}: the shards in use at once are larger than that")
        try:
            yield granted
        finally:
            with self._lock:
                self._coming.pop(shard.name, None)

    def _make(self, coming: dict[str, int], wanted: list[str], urgent: bool) -> int:
        """Remove what may go: forgotten parts, whole shards by last use, and for an urgent one the wanted shards, the least
        urgent first. The bytes above the cap that remain."""
        if self._cap is None:
            return 0
        over = sum(coming.values()) - self._cap
        rank = {name: place for place, name in enumerate(reversed(wanted), start=1)}
        found: list[tuple[tuple[bool, int, int], Path, int]] = []
        for path in self._folder.iterdir():
            name, part, _ = path.name.partition(PARTIAL)
            with suppress(FileNotFoundError):  # another process has taken it away
                if not name.endswith(".parquet") or (part and name in coming):  # what is coming counts with what it will be
                    continue
                status = path.stat()
                over += status.st_size
                if name not in coming and (urgent or part or name not in rank):
                    found.append(((not part, rank.get(name, 0), status.st_atime_ns), path, status.st_size))
        for _, path, bytes_ in sorted(found):
            if over <= 0:
                break
            over -= bytes_ * _remove(path)
        return over


def _remove(path: Path) -> bool:
    """Whether it was removed: not while a part is being fetched, or a whole shard held."""
    name, part, _ = path.name.partition(PARTIAL)
    with suppress(FileNotFoundError, BlockingIOError):
        if part:
            with locked(path.with_name(name), _give_up):
                path.unlink()
                return True
        with open(path, "rb") as file:
            if flock(file) and is_current(file, path):
                path.unlink()
                return True
    return False


def _give_up() -> None:
    raise BlockingIOError
