"""Where a corpus' shards are read from: a local folder, or a URL through a cache (`picotrain.data.remote`)."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from picotrain.errors import DataError

if TYPE_CHECKING:
    from picotrain.data.corpus import Shard


class Files(Protocol):
    """The shards of one corpus as local files."""

    def hold(self, shard: Shard) -> AbstractContextManager[Path]:
        """The shard's file, whole and unchanged, for as long as it is held. Raises DataError."""
        ...

    def prefetch(self, shards: Sequence[Shard], /) -> None:
        """Which shards will be needed next, the most urgent first."""
        ...

    def missing(self, shards: Sequence[Shard], /) -> list[str]:
        """What can be told at once, without reading anything, of shards that cannot be held."""
        ...

    def close(self) -> None:
        """End what works in the background; files may still be held afterwards."""
        ...


class LocalFiles:
    """The shards of a folder. A shard that changed since its footer was scanned is refused. Its size is compared at every look, the
    footer's hash whenever the modification time is new."""

    def __init__(self, root: Path):
        self._root = root
        self._seen: dict[str, int] = {}  # modification time (ns) at which a shard's fingerprint was right

    @contextmanager
    def hold(self, shard: Shard) -> Generator[Path]:
        yield self.check(shard)

    def prefetch(self, shards: Sequence[Shard], /) -> None:
        pass

    def missing(self, shards: Sequence[Shard], /) -> list[str]:
        found = []
        for shard in shards:
            try:
                self._stat(self._root / shard.name, shard)
            except DataError as error:
                found.append(str(error))
        return found

    def close(self) -> None:
        pass

    def _stat(self, path: Path, shard: Shard) -> os.stat_result:
        """The status of a shard's file, its size compared. Raises DataError."""
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; it was there when the corpus was scanned") from error
        if stat.st_size != shard.bytes:
            raise DataError(f"{path} cannot be read: it has {stat.st_size:,} bytes, and had {shard.bytes:,} when the corpus was scanned")
        return stat

    def check(self, shard: Shard) -> Path:
        """The shard's file. Raises DataError unless it is the one that was scanned."""
        from picotrain.data.footers import fingerprint_of

        path = self._root / shard.name
        stat = self._stat(path, shard)
        if self._seen.get(shard.name) != stat.st_mtime_ns:
            if fingerprint_of(path) != shard.fingerprint:
                raise DataError(f"{path} changed since the corpus was scanned: its footer is another one")
            self._seen[shard.name] = stat.st_mtime_ns
        return path
