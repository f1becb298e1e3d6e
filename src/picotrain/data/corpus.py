"""A corpus: a folder of Parquet shards with a `text` column, one of which validates.

Only footers are read here (and row groups by `read_texts`). Without torch; pyarrow is imported
inside functions, so that a plan on a cached corpus does not pay for it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from picotrain.data.files import Files, LocalFiles
from picotrain.data.folder import Chosen, Found, choose, find_shards, validating
from picotrain.data.footers import (  # noqa: F401
    TEXT,
    BadShard,
    Count,
    RowGroup,
    Shard,
    first_undecodable,
    hash_bytes,
    opened,
    raising,
    read_footer,
    reader_of,
    require_regular,
)
from picotrain.data.units import Unit, Units, default_lanes, default_unit_bytes, units  # noqa: F401
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError
from picotrain.places import expanded
from picotrain.terminal import say

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "data.json"  # the footers, kept beside the shards or in the cache
MADE_BY = {"made_by": "picotrain"}  # what tells our manifest from a user's file of that name
ORIGIN = "origin.json"  # what `picotrain.data.prepare` made the shards from
SAMPLED_SHARDS = 4  # at least, of a remote corpus
READERS = 8  # threads that read footers: they wait for the disk or the network, not for a core

OnBad = Callable[[DataError], None]  # is told what is passed over
Say = Callable[[str], None]


class Remote(NamedTuple):
    """Where shards are that are not on this machine, and how many bytes of them may be here at a time (None: all)."""

    url: str
    cache_bytes: Count | None


@dataclass(frozen=True)
class Corpus:
    """Training shards, sorted by name, and the shard that validates."""

    name: str
    root: Path
    shards: tuple[Shard, ...]
    val: Shard
    origin: dict[str, Any] | None = None  # where the shards come from, when picotrain made or fetched them
    remote: Remote | None = None  # the shards are elsewhere, and `root` is the cache they are fetched into

    @property
    def text_bytes(self) -> int:
        """Bytes of training text by the footers."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def documents(self) -> int:
        """Training documents."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that stand for every shard and for which one validates; the folder and the name do not count."""
        identity = [[shard.name, shard.fingerprint] for shard in (*self.shards, self.val)]
        return hash_bytes(json.dumps(identity).encode())

    @cached_property
    def files(self) -> Files:
        """The shards as local files; what is remote is fetched when it is needed."""
        if self.remote is None:
            return LocalFiles(self.root)
        from picotrain.data.remote import RemoteFiles

        return RemoteFiles(self.remote.url, self.root, self.remote.cache_bytes, say=say)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "root": str(self.root),
            "fingerprint": self.fingerprint,
            "shards": [shard.to_json() for shard in self.shards],
            "val": self.val.to_json(),
            "origin": self.origin,
            "remote": self.remote,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Corpus:
        """Raises DataError where `data` is none of `to_json`."""
        try:
            return reader_of(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"the description of a corpus is damaged: {place}: {first['msg']}, not {first['input']!r:.60}") from None


def short_hash(value: Any) -> str:
    """16 hex digits of what JSON can hold: the name of a place in the cache folder."""
    return hash_bytes(json.dumps(value).encode(), 8)


def scan(
    root: Path,
    name: str,
    val_shard: str | None = None,
    *,
    cache: Path | None = None,
    only: Iterable[str] | None = None,
    say: Say = lambda text: None,
    on_bad: OnBad | None = None,
) -> Corpus:
    """The corpus in folder `root`: its `*.parquet`. `picotrain.data.folder.choose` says what each shard is for.

    Footers are read in parallel and kept in `data.json` in the folder, or below `cache` where that is given. A shard whose size or
    modification time changed is read again. `only` limits the corpus to these names; the last one (or `val_shard`) validates. `say` is
    told what is left out. `on_bad` is told of a shard that cannot be read, and that shard is left out. Raises DataError when folder,
    shards, `text` column or validation shard are missing or unusable.
    """
    root = expanded(root).absolute()
    if not root.is_dir():
        raise DataError(f"there is no corpus folder {root}{hint_for(root)}")
    names, words = found_in(root)
    if only is not None:
        names, words = [name for name in names if name in set(only)], []
    if not names:
        raise DataError(
            "; ".join([f"{root} holds no *.parquet file; a corpus is a folder of Parquet shards with a `{TEXT}` column", *words])
        )
    shards = read_footers(root, names, cache, on_bad)
    names = [shard.name for shard in shards]
    if not names:
        raise DataError(f"{root} holds no *.parquet file that can be read")
    if only is None:
        chosen = choose(names, str(root), val_shard)
    else:
        val = validating(names, str(root), val_shard)
        chosen = Chosen([name for name in names if name != val], val, [])
    corpus = assemble(name, root, shards, chosen, find_json(root / ORIGIN))
    for line in (*words, *chosen.words):
        say(line)
    return corpus


def found_in(root: Path) -> Found:
    """The shards in a folder. Raises DataError where it cannot be looked into."""
    try:
        return find_shards(root)
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror}") from error


def assemble(
    name: str, root: Path, shards: Sequence[Shard], chosen: Chosen, origin: dict[str, Any] | None = None, remote: Remote | None = None
) -> Corpus:
    """The corpus of the shards that were chosen. Raises DataError when there is no document to train or to validate on."""
    by_name = {shard.name: shard for shard in shards}
    train, val = tuple(by_name[name] for name in chosen.train), by_name[chosen.val]
    for rows, what in ((sum(shard.rows for shard in train), "training shards"), (val.rows, f"validation shard {val.name}")):
        if rows == 0:
            raise DataError(f"{remote.url if remote else root}, {what}: there is no document in it")
    return Corpus(name, root, train, val, origin, remote)


def read_texts(root: Path, shard: Shard, rg: int) -> list[str]:
    """The documents of row group `rg`, in file order; nulls become "". Raises DataError naming shard and row group."""
    column = _read_column(root, shard, rg)
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        raise DataError(f"{root / shard.name}, row group {rg}, document {first_undecodable(column)}: the text is not valid UTF-8") from None


def sample_texts(corpus: Corpus, max_bytes: int, on_bad: OnBad | None = None) -> Iterator[str]:
    """At most about `max_bytes` (characters counted) of training text, spread evenly over all row groups. All of it when it is less.

    Of a remote corpus only a few shards are fetched for it, spread evenly, too. `on_bad` is told of a row group that cannot be read, and
    that row group is passed over. None: the error is raised.
    """
    shards = corpus.shards
    if corpus.remote:
        count = min(len(shards), max(SAMPLED_SHARDS, math.ceil(2 * max_bytes * len(shards) / max(1, corpus.text_bytes))))
        shards = tuple(shards[i * len(shards) // count] for i in range(count))
    groups = [(shard, rg) for shard in shards for rg, group in enumerate(shard.row_groups) if group.rows]
    text_bytes = sum(shard.text_bytes for shard in shards)
    if text_bytes > max_bytes:
        mean = text_bytes / len(groups)
        # At least 64 places, however large the row groups are, each giving an equal share.
        count = min(len(groups), max(64, int(max_bytes / mean)))
        groups = [groups[i * len(groups) // count] for i in range(count)]
    share = max(1, max_bytes // len(groups))
    for shard, rg in groups:
        try:
            with corpus.files.hold(shard) as path:
                texts = read_texts(path.parent, shard, rg)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        yield from _thin(texts, share) if text_bytes > max_bytes else texts


def hint_for(path: Path) -> str:
    """What to tell a user whose `path` does not exist: the longest part of it that does, and a similar name in there."""
    parent = next((p for p in path.parents if p.is_dir()), Path("/"))
    missing = path.relative_to(parent).parts[0]
    try:
        close = difflib.get_close_matches(missing, os.listdir(parent), n=1)
    except OSError:
        close = []
    return f"; {parent} exists" + (f" and holds {close[0]!r}" if close else f" and holds no {missing!r}")


def _thin(texts: list[str], share: int) -> Iterator[str]:
    """About `share` characters of these texts: every k-th document, the last one cut."""
    total = sum(map(len, texts))
    left = share
    for text in texts[:: max(1, total // share)]:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def read_footers(root: Path, names: Sequence[str], cache: Path | None = None, on_bad: OnBad | None = None) -> list[Shard]:
    """The footers of these shards. A footer is remembered as long as the shard's size and modification time agree.

    They are remembered in the folder, unless another's file has that name there. Where `cache` is given they are kept below it, so that a
    user's folder stays as it is. `on_bad` is told of a shard that cannot be read, and that shard is left out. None: BadShard is raised.
    """
    elsewhere = [] if cache is None else [manifest_of(root, cache)]
    manifests = [*elsewhere, root / MANIFEST]
    known: dict[str, tuple[list[int], Shard]] = {}
    for path in reversed(manifests):
        known |= manifest_entries(path) or {}
    stats: dict[str, list[int]] = {}
    missing: list[str] = []

    def read(name: str) -> Shard | BadShard:
        try:
            return read_footer(root / name)
        except BadShard as error:
            if on_bad is None:
                raise
            return error

    for name in names:
        with suppress(OSError):  # said when it is read
            stats[name] = [(stat := (root / name).stat()).st_size, stat.st_mtime_ns]
        if name not in stats or name not in known or known[name][0] != stats[name]:
            missing.append(name)
    with ThreadPoolExecutor(READERS) as pool:
        fresh = dict(zip(missing, pool.map(read, missing), strict=True))
    shards: list[Shard] = []
    for name in names:
        shard = fresh[name] if name in fresh else known[name][1]
        if isinstance(shard, Shard):
            shards.append(shard)
        elif on_bad is not None:
            on_bad(shard)
    if missing:
        entries = {name: entry for name, entry in known.items() if (root / name).exists()}
        entries |= {shard.name: (stats[shard.name], shard) for shard in shards if shard.name in stats}
        _write_manifest((elsewhere or manifests)[0], entries)
    return shards


def manifest_of(root: Path, cache: Path) -> Path:
    """Where the cache keeps the footers of a folder that is not its own."""
    return cache / "manifests" / f"{hash_bytes(os.fsencode(root), 8)}.json"


def manifest_entries(path: Path) -> dict[str, tuple[list[int], Shard]] | None:
    """What a manifest of ours holds: (size and time, shard) by name; None for any other file."""
    data = find_json(path) or {}
    try:
        entries = {entry["name"]: (entry["stat"], Shard.from_json(entry)) for entry in data["files"]}
    except (KeyError, TypeError, ValueError):
        return None
    return entries if entries or MADE_BY.items() <= data.items() else None  # those of earlier versions have no mark


def _write_manifest(path: Path, entries: dict[str, tuple[list[int], Shard]]) -> None:
    """Keep the manifest. It only saves time, so failing to write it is no error. A file that is not ours stays."""
    data = json.dumps({**MADE_BY, "files": [{**shard.to_json(), "stat": stat} for stat, shard in entries.values()]}).encode()
    with suppress(OSError):
        if os.path.lexists(path) and (path.is_symlink() or manifest_entries(path) is None):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_writable(path.parent):
            write_whole(path, data, shared=True)


def _is_writable(folder: Path) -> bool:
    """Whether a write is possible and meant: root could write into a folder that its owner made read-only, and must not."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _read_column(root: Path, shard: Shard, rg: int) -> pa.ChunkedArray:
    path = Path(root) / shard.name
    with raising(lambda why: DataError(f"{path}, row group {rg} cannot be read: {why}")):
        if (size := require_regular(path).st_size) != shard.bytes:
            raise OSError(f"it has {size:,} bytes, and had {shard.bytes:,} when the corpus was scanned")
        with opened(path) as file:
            column = file.read_row_group(rg, columns=[TEXT], use_threads=False).column(TEXT)
        if len(column) != shard.row_groups[rg].rows:
            raise OSError(f"it has {len(column):,} rows, and the footer promised {shard.row_groups[rg].rows:,}")
    return column
