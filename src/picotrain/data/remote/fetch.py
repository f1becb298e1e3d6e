"""One shard from its store into the folder: transferred, resumed, verified, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from picotrain.config.places import redacted
from picotrain.data.corpus import ORIGIN, Shard, hash_bytes
from picotrain.data.files import LocalFiles
from picotrain.data.remote.errors import Cancelled, Transient, retry
from picotrain.data.remote.manifest import manifest_name
from picotrain.data.remote.store import Store, open_store
from picotrain.errors import DataError
from picotrain.text import size

PARTIAL = ".partial."
MAX_ORIGIN_BYTES = 64 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


class Fetcher:
    """Fetches shards of `url` into `folder` until `stop` is set. Any number of threads may use it.

    What has arrived of a shard is in NAME.partial.HASH; HASH stands for the content that is wanted and the version that is there.
    """

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]):
        self.stop = threading.Event()
        self._url, self._folder, self._say = url, folder, say
        self._lock = threading.Lock()  # guards what is found out once
        self._local = LocalFiles(folder)

    def where(self, shard: Shard) -> str:
        """What a shard is called in messages: its URL without credentials."""
        base, query, rest = redacted(self._url).partition("?")
        return f"{base.rstrip('/')}/{shard.name}{query}{rest}"

    def is_whole(self, shard: Shard) -> bool:
        """Whether the file is there with the size and the footer that are wanted; the footer is read once."""
        try:
            return bool(self._local.check(shard))
        except (OSError, DataError):
            return False

    def fetch(self, shard: Shard) -> None:
        """Transfer, verify, rename. The caller has the shard's lock. Raises DataError and Cancelled."""
        try:
            retry(lambda: self._attempt(shard), self.where(shard), self.stop, self._say, lambda: self._arrived(shard))
        except OSError as error:  # the network's are sorted by now
            if error.errno not in FULL:
                raise DataError(f"{self._folder} cannot be used: {error}; set PICOTRAIN_CACHE to another folder") from error
            raise DataError(
                f"the disk of {self._folder} is full: {shard.name} needs {shard.bytes - self._arrived(shard):,} more bytes "
                f"({error.strerror}); free some space, set data.cache_bytes below what it may take, or PICOTRAIN_CACHE to another disk; "
                f"what has arrived is kept"
            ) from error

    def _attempt(self, shard: Shard) -> None:
        with self._lock:
            store = self._store
        remote = store.info(shard.name)
        if remote.bytes not in (None, shard.bytes):
            raise self._other(f"it has {remote.bytes:,} bytes, and {shard.bytes:,} were expected")
        partial = self._folder / f"{shard.name}{PARTIAL}{hash_bytes(f'{shard.fingerprint} {remote.version}'.encode(), 4)}"
        self._transfer(store, shard, partial)
        with self._lock:
            known = self._hashes.get(shard.name) or remote.digest
        try:
            if not known and store.info(shard.name).version != remote.version:
                raise Transient("it was changed on the way")  # parts of two versions, which the footer need not tell
            self._verify(shard, partial, known)
        except Transient:
            partial.unlink()  # no resume could mend it
            raise
        os.replace(partial, self._folder / shard.name)
        for other in self._parts(shard):
            other.unlink()

    def _transfer(self, store: Store, shard: Shard, partial: Path) -> None:
        """What is missing of the shard to the end of `partial`."""
        with open(partial, "ab") as out:
            missing = shard.bytes - out.tell()
            if (free := shutil.disk_usage(self._folder).free) < missing:
                raise OSError(errno.ENOSPC, f"{size(free)} are free")
            with closing(store.read(shard.name, shard.bytes - missing, shard.bytes)) as blocks:
                for block in blocks:
                    out.write(block)
                    if self.stop.is_set():
                        raise Cancelled

    def _verify(self, shard: Shard, partial: Path, known: str) -> None:
        """The footer, and the hash `known` of the content where there is one. Raises Transient."""
        from picotrain.data.footers import fingerprint_of

        try:
            found = fingerprint_of(partial)
        except DataError as error:
            raise self._other(str(error).replace(str(partial), "what came")) from error
        if found != shard.fingerprint:
            raise self._other(f"its footer has the fingerprint {found}, and {shard.fingerprint} was expected")
        kind, _, expected = known.partition(":")
        if kind and (came := _hash_file(partial, kind, self.stop)) != expected:
            raise self._other(f"its content has the {kind} {came}, and {expected} was expected")

    def _parts(self, shard: Shard) -> Iterator[Path]:
        return (path for path in self._folder.iterdir() if path.name.startswith(f"{shard.name}{PARTIAL}"))

    def _arrived(self, shard: Shard) -> int:
        """Bytes that are here of a shard."""
        return max((path.stat().st_size for path in self._parts(shard)), default=0)

    @cached_property
    def _store(self) -> Store:
        """Opened when the first shard is missing: a run on a warm cache asks nobody."""
        return open_store(self._url, self.stop)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        """Hashes by shard from the origin.json that `picotrain data prepare` writes beside the shards; none where it is not ours."""
        try:
            data = retry(lambda: _read(self._store, ORIGIN), self._store.where(ORIGIN), self.stop, self._say, lambda: 0)
            return {name: f"xxh3_64:{entry['xxh3_64']}" for name, entry in json.loads(data)["shards"].items()}
        except (DataError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def _other(self, reason: str) -> Transient:
        """It is not what was promised, in transit or for good."""
        advice = (
            f"the shard is damaged there, or was changed since its footer was read; if it was changed on purpose, remove "
            f"manifests/{manifest_name(self._url)} in the cache folder and start a new run"
        )
        return Transient(reason, advice=advice)


def _read(store: Store, name: str) -> bytes:
    """A small file. Raises what a store raises, and ValueError where it is none."""
    data = b""
    with closing(store.read(name)) as blocks:
        for block in blocks:
            data += block
            if len(data) > MAX_ORIGIN_BYTES:
                raise ValueError
    return data


def _hash_file(path: Path, kind: str, stop: threading.Event) -> str:
    """The hash of a file as hex digits, given up when `stop` is set."""
    import xxhash

    digest: Any = xxhash.xxh3_64() if kind == "xxh3_64" else hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if stop.is_set():
                raise Cancelled
    return digest.hexdigest()
