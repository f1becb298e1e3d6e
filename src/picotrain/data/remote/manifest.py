"""Which shards a folder behind a URL holds, and their footers, read by range requests and remembered."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from picotrain.config.places import redacted
from picotrain.data.corpus import BadShard, OnBad, Shard, hash_bytes, read_footer
from picotrain.data.folder import is_shard_name, words_for_others
from picotrain.data.remote.errors import retry
from picotrain.data.remote.store import RemoteFile, Store, open_store
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError

READERS = 16  # footers read at once: each waits for the network, not for a core
TAIL_BYTES = 64 << 10  # holds most footers, so that one request does
SAY_EVERY = 1000  # footers

Say = Callable[[str], None]


def list_shards(url: str, say: Say = lambda text: None, also: Collection[str] = ()) -> list[RemoteFile]:
    """The `*.parquet` files directly in the folder `url`, sorted by name, from one listing; hidden ones never count, unless their names
    are in `also`. `say` is told what else is there. Raises DataError."""
    stop = threading.Event()
    store = open_store(url, stop)
    found = retry(store.files, store.where(), stop, say, lambda: 0)
    shards = sorted(file for file in found if file.name in also or is_shard_name(file.name))
    names = {file.name for file in shards}
    for line in words_for_others(file.name for file in found if file.name not in names):
        say(f"{store.where()}: {line}")
    if not shards:
        what = (
            "the URL must be one of their folder" if urlsplit(url).path.endswith(".parquet") else "a corpus is a folder of Parquet shards"
        )
        raise DataError(f"{store.where()} lists no *.parquet file; {what}")
    return shards


def manifest_name(url: str) -> str:
    """The file in the cache's `manifests` that keeps the footers of a URL; who reads it (user, password) does not count."""
    parts = urlsplit(url)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/"), fragment=""))
    return f"{hash_bytes(plain.encode(), 8)}.json"


def read_shards(url: str, files: Sequence[RemoteFile], cache: Path, say: Say, on_bad: OnBad | None = None) -> list[Shard]:
    """The footers of `files`, in their order: from `cache`/manifests where name, size and version are as they were, else read
    in parallel, of each file only its end where the server has ranges. `on_bad` is told of a file that is no shard, which is
    then left out; None: BadShard is raised. Raises DataError."""
    manifest = Path(cache) / "manifests" / manifest_name(url)
    known = _load(manifest)
    missing = [file for file in files if _key(file) not in known]
    if missing:
        try:
            manifest.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="footers-", dir=manifest.parent) as scratch:
                _read_all(url, missing, Path(scratch), known, say, on_bad)
        except OSError as error:
            raise DataError(f"{manifest.parent} cannot be written: {error.strerror}; free space, or set PICOTRAIN_CACHE") from error
        finally:  # also of what was read before an interruption
            _save(manifest, url, known)
    return [known[_key(file)] for file in files if _key(file) in known]


def _read_all(
    url: str, files: Sequence[RemoteFile], scratch: Path, known: dict[tuple[Any, ...], Shard], say: Say, on_bad: OnBad | None
) -> None:
    """The footers of `files` into `known`, each through a stand-in: a sparse file of the shard's size with only its end filled in."""
    stop = threading.Event()
    store = open_store(url, stop)
    say(f"reading the footers of {len(files):,} shards of {store.where()}")

    def read_one(file: RemoteFile) -> Shard | BadShard:
        where, path = store.where(file.name), scratch / file.name
        try:
            retry(lambda: _stand_in(store, file, path), where, stop, say, lambda: 0)
            return read_footer(path)
        except BadShard as error:
            error.args = (str(error).replace(str(path), where),)
            if on_bad is None:
                raise
            return error
        finally:
            path.unlink(missing_ok=True)

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for count, (file, shard) in enumerate(zip(files, pool.map(read_one, files), strict=True), 1):
                if isinstance(shard, Shard):
                    known[_key(file)] = shard
                elif on_bad is not None:
                    on_bad(shard)
                if count % SAY_EVERY == 0:
                    say(f"{count:,} of {len(files):,} footers")
        except BaseException:
            stop.set()  # the other readers end at once
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _stand_in(store: Store, file: RemoteFile, path: Path) -> None:
    """Write the end of the shard to where it belongs in `path`."""
    size = store.info(file.name).bytes if file.bytes is None else file.bytes
    if size is None:
        raise DataError(f"{store.where(file.name)}: the server does not tell its size")
    start = max(0, size - TAIL_BYTES)
    with open(path, "wb+") as out:
        _copy(store, file.name, start, size, out)
        out.seek(max(0, size - 8))
        tail = out.read(8)
        length = int.from_bytes(tail[:4], "little") + 8
        if tail[4:] == b"PAR1" and size - length < start and length <= size:
            _copy(store, file.name, size - length, start, out)


def _copy(store: Store, name: str, start: int, end: int, out: IO[bytes]) -> None:
    """Bytes [start, end) of a file into their place in `out`."""
    out.seek(start)
    with closing(store.read(name, start, end)) as blocks:
        out.writelines(blocks)


def _key(file: RemoteFile) -> tuple[Any, ...]:
    return file.name, file.bytes, file.version


def _load(path: Path) -> dict[tuple[Any, ...], Shard]:
    data = find_json(path)
    try:
        return {(entry["name"], *entry["listed"]): Shard.from_json(entry) for entry in data["files"]} if data else {}
    except (KeyError, TypeError, ValueError):
        return {}


def _save(path: Path, url: str, known: dict[tuple[Any, ...], Shard]) -> None:
    """A manifest only saves time, so that none is no error."""
    files = [{**shard.to_json(), "listed": key[1:]} for key, shard in known.items()]
    try:
        write_whole(path, json.dumps({"url": redacted(url), "files": files}).encode(), shared=True)
    except OSError:
        return
