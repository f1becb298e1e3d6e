"""One shard from its store into the folder: transferred, resumed, verified, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from picotrain.config.places import redacted
from picotrain.data.corpus import ORIGIN, Shard, read_footer
from picotrain.data.footers import fingerprint_of
from picotrain.data.remote.errors import Cancelled, Transient, retry
from picotrain.data.remote.manifest import manifest_name
from picotrain.data.remote.store import RemoteFile, Store, open_store
from picotrain.errors import DataError
from picotrain.text import size

MAX_ORIGIN_BYTES = 64 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


class Fetcher:
    """Fetches shards of `url` into `folder` until `stop` is set. Any number of threads may use it."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]):
        self.stop = threading.Event()
        self._url, self._folder, self._say = url, folder, say
        self._lock = threading.Lock()  # guards what is found out once: the next two
        self._opened: Store | None = None
        self._hashes: dict[str, str] | None = None
        self._verified: dict[str, tuple[Any, ...]] = {}
        self._came: dict[str, str] = {}  # the MD5 of what came where an ETag promised another one
        self._etags_are_md5 = True

    def where(self, shard: Shard) -> str:
        """What a shard is called in messages: its URL without credentials."""
        base, query, rest = redacted(self._url).partition("?")
        return f"{base.rstrip('/')}/{shard.name}{query}{rest}"

    def is_whole(self, shard: Shard) -> bool:
        """Whether the file is there with the size and the footer that are wanted; the footer is read once."""
        path = self._folder / shard.name
        try:
            stat = path.stat()
            key = (shard.fingerprint, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._verified.get(shard.name) == key:
                return True
            if stat.st_size != shard.bytes or fingerprint_of(path) != shard.fingerprint:
                return False
        except (OSError, DataError):
            return False
        self._verified[shard.name] = key
        return True

    def fetch(self, shard: Shard, partial: Path, lock: IO[str]) -> None:
        """Transfer to `partial`, verify, rename. The caller has the lock. Raises DataError, Cancelled, and OSError of the disk."""
        store = self._store()

        def attempt() -> None:
            remote = store.info(shard.name)
            if remote.bytes not in (None, shard.bytes):
                raise self._other(f"it has {remote.bytes:,} bytes, and {shard.bytes:,} were expected")
            self._transfer(store, shard, partial, lock, remote)
            try:
                self._verify(store, shard, partial, remote)
            except Transient:
                partial.unlink()  # no resume could mend it
                raise

        retry(attempt, self.where(shard), self.stop, self._say, lambda: partial.stat().st_size if partial.exists() else 0)
        os.replace(partial, self._folder / shard.name)

    def disk_error(self, error: OSError, shard: Shard, partial: Path) -> DataError:
        """What an error of the local disk means."""
        if error.errno not in FULL:
            return DataError(f"{self._folder} cannot be used: {error}; set PICOTRAIN_CACHE to another folder")
        have = partial.stat().st_size if partial.exists() else 0
        return DataError(
            f"the disk of {self._folder} is full: {shard.name} needs {shard.bytes - have:,} more bytes ({error.strerror}); free some "
            f"space, set data.cache_bytes below what it may take, or PICOTRAIN_CACHE to another disk; what has arrived is kept"
        )

    def _transfer(self, store: Store, shard: Shard, partial: Path, lock: IO[str], remote: RemoteFile) -> None:
        """What is missing of the shard to the end of `partial`; from the start when that is of another version."""
        with open(partial, "ab") as out:
            have = self._resumable(out, shard, lock, remote.version)
            if have == shard.bytes:
                return
            if (free := shutil.disk_usage(self._folder).free) < shard.bytes - have:
                raise OSError(errno.ENOSPC, f"{size(free)} are free")
            have, blocks = store.read(shard.name, have, shard.bytes if have else None, remote.version)
            out.truncate(have)  # a server without ranges starts over
            with closing(blocks):
                for block in blocks:
                    have += out.write(block)
                    if have > shard.bytes or self.stop.is_set():
                        break
        if have > shard.bytes:
            partial.unlink()
            raise self._other(f"more than the expected {shard.bytes:,} bytes came")
        if self.stop.is_set():
            raise Cancelled
        if have < shard.bytes:
            raise Transient(f"it ended after {have:,} of {shard.bytes:,} bytes")

    def _resumable(self, out: IO[bytes], shard: Shard, lock: IO[str], version: str) -> int:
        """How many bytes of the partial file are good: none of another version, which from now on is `version`."""
        have = out.tell()
        lock.seek(0)
        if have > shard.bytes or lock.read() != version:
            have = 0
            out.truncate(0)
            lock.truncate(0)
            lock.write(version)
            lock.flush()
        return have

    def _verify(self, store: Store, shard: Shard, partial: Path, remote: RemoteFile) -> None:
        """The footer, and a hash of the content where one is known; the size is the transfer's. Raises Transient."""
        try:
            found = read_footer(partial).fingerprint
        except DataError as error:
            raise self._other(str(error).replace(str(partial), "what came")) from error
        if found != shard.fingerprint:
            raise self._other(f"its footer has the fingerprint {found}, and {shard.fingerprint} was expected")
        digest = self._known_hashes(store).get(shard.name) or remote.digest
        kind, _, expected = digest.partition(":")
        if not digest or (kind == "etag" and not self._etags_are_md5):
            return
        came = _hash_file(partial, kind, self.stop)
        if came == expected:
            return
        if kind == "etag" and self._came.get(shard.name) == came:
            # The same bytes twice: then it is the ETag that is no MD5, as in buckets that encrypt with keys of their own.
            self._etags_are_md5 = False
            return
        self._came[shard.name] = came
        raise self._other(f"its content has the {'MD5' if kind == 'etag' else kind} {came}, and {expected} was expected")

    def _store(self) -> Store:
        """Opened when the first shard is missing: a run on a warm cache asks nobody."""
        with self._lock:
            if self._opened is None:
                self._opened = open_store(self._url, self.stop)
            return self._opened

    def _known_hashes(self, store: Store) -> dict[str, str]:
        """Hashes by shard from the origin.json that `picotrain data prepare` writes beside the shards; read once."""
        with self._lock:
            if self._hashes is None:
                try:
                    self._hashes = retry(lambda: _read_hashes(store), store.where(ORIGIN), self.stop, self._say, lambda: 0)
                except DataError:
                    self._hashes = {}  # size and footer are checked all the same
            return self._hashes

    def _other(self, reason: str) -> Transient:
        advice = (
            f"the shard is damaged there, or was changed since its footer was read; if it was changed on purpose, remove "
            f"manifests/{manifest_name(self._url)} in the cache folder and start a new run"
        )
        return Transient(reason, advice=advice)


def _read_hashes(store: Store) -> dict[str, str]:
    """{shard: "xxh3_64:hex"}; none where there is no such file, or it is not ours."""
    try:
        _, blocks = store.read(ORIGIN)
    except DataError:
        return {}
    data = b""
    with closing(blocks):
        for block in blocks:
            data += block
            if len(data) > MAX_ORIGIN_BYTES:
                return {}
    try:
        return {name: f"xxh3_64:{entry['xxh3_64']}" for name, entry in json.loads(data)["shards"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _hash_file(path: Path, kind: str, stop: threading.Event) -> str:
    """The hash of a file as hex digits, given up when `stop` is set."""
    if kind == "xxh3_64":
        import xxhash

        digest: Any = xxhash.xxh3_64()
    else:
        digest = hashlib.new("md5" if kind == "etag" else kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if stop.is_set():
                raise Cancelled
    return digest.hexdigest()
