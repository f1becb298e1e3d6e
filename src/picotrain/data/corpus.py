"""A corpus: a folder of Parquet shards with a `text` column, the last of which validates.

Only footers are read here (and row groups by `read_texts`). Without torch; pyarrow is imported
inside functions, so that a plan on a cached corpus does not pay for it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from picotrain.config.saved import parse_json, read_plain
from picotrain.data.files import Files, LocalFiles
from picotrain.data.units import Unit, Units, default_lanes, default_unit_bytes, units  # noqa: F401
from picotrain.errors import DataError
from picotrain.places import expanded
from picotrain.terminal import say

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

TEXT = "text"  # the column that is trained on
MANIFEST = "data.json"  # the footers, kept beside the shards
ORIGIN = "origin.json"  # what `picotrain.data.prepare` made the shards from
SAMPLED_SHARDS = 4  # at least, of a remote corpus
READERS = 8  # threads that read footers: they wait for the disk or the network, not for a core


def _plain_name(name: str) -> str:
    """Shards are read from, and remote ones written to, the folder of their corpus; no name may lead elsewhere."""
    if Path(name).name != name or not name.endswith(".parquet") or "\0" in name:
        raise ValueError("a shard's name must be the plain name of a .parquet file")
    return name


Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
ShardName = Annotated[str, AfterValidator(_plain_name)]


class RowGroup(NamedTuple):
    """One row group: its rows and the bytes of its `text` column by the footer (uncompressed)."""

    rows: Count
    text_bytes: Count


@dataclass(frozen=True)
class Shard:
    """One Parquet file. `fingerprint` hashes its size and its footer: cheap, and changed by any honest rewrite,
    but blind to bytes flipped inside a data page (reading those fails or is caught by the page's own checks)."""

    name: ShardName
    bytes: Count
    row_groups: tuple[RowGroup, ...]
    fingerprint: str

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def text_bytes(self) -> int:
        return sum(group.text_bytes for group in self.row_groups)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "fingerprint": self.fingerprint, "row_groups": [list(g) for g in self.row_groups]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shard:
        """Raises ValueError where `data` is none of `to_json`."""
        return _reader(cls).validate_python(data)


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
            return _reader(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"the description of a corpus is damaged: {place}: {first['msg']}, not {first['input']!r:.60}") from None


@lru_cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    """What turns plain JSON into `kind` and trusts nothing in it; built when it is first needed."""
    return TypeAdapter(kind)


def scan(root: Path, name: str, val_shard: str | None = None, *, cache: Path | None = None, only: Iterable[str] | None = None) -> Corpus:
    """The corpus in folder `root`: every `*.parquet` sorted by name, of which the last (or `val_shard`) validates.

    Footers are read in parallel and kept in `data.json` in the folder, or below `cache` where the folder cannot be
    written; a shard whose size or modification time changed is read again. `only` limits the corpus to these names.
    Raises DataError when folder, shards, `text` column or validation shard are missing or unusable.
    """
    root = expanded(root).absolute()
    if not root.is_dir():
        raise DataError(f"there is no corpus folder {root}{hint_for(root)}")
    wanted = None if only is None else set(only)
    files = sorted(path for path in root.glob("*.parquet") if path.is_file() and (wanted is None or path.name in wanted))
    if not files:
        raise DataError(f"{root} holds no *.parquet file; a corpus is a folder of Parquet shards with a `{TEXT}` column")
    val_name = validating([path.name for path in files], str(root), val_shard)
    return assemble(name, root, _read_footers(root, files, cache), val_name, read_json(root / ORIGIN))


def validating(names: Sequence[str], where: str, val_shard: str | None) -> str:
    """Which of a corpus' shards validates: `val_shard`, else the last. Raises DataError; `where` is the folder or URL for it."""
    val_name = names[-1] if val_shard is None else val_shard
    if val_name not in names:
        close = difflib.get_close_matches(val_name, names, n=1, cutoff=0)
        raise DataError(f"data.val_shard: {where} holds no shard {val_name!r}; the nearest is {close[0] if close else names[-1]!r}")
    if len(names) == 1:
        raise DataError(
            f"{where} holds only one shard, {names[0]}, and a corpus needs one to train on and one to validate on; "
            f"name the file itself (data.path={Path(where) / names[0]}) to have its documents split into both"
        )
    return val_name


def assemble(
    name: str, root: Path, shards: Sequence[Shard], val_name: str, origin: dict[str, Any] | None = None, remote: Remote | None = None
) -> Corpus:
    """The corpus of these shards, sorted by name. Raises DataError when there is no document to train or to validate on."""
    train = tuple(shard for shard in shards if shard.name != val_name)
    val = next(shard for shard in shards if shard.name == val_name)
    for rows, what in ((sum(shard.rows for shard in train), "training shards"), (val.rows, f"validation shard {val_name}")):
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


def first_undecodable(column: pa.Array | pa.ChunkedArray) -> int:
    """The index of the first text of a column that is not valid UTF-8."""
    return next(i for i, raw in enumerate(column.cast("binary").to_pylist()) if not _is_utf8(raw))


def sample_texts(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """At most about `max_bytes` (characters counted) of training text, spread evenly over all row groups; all of it when it is less.

    Of a remote corpus only a few shards are fetched for it, spread evenly too.
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
        with corpus.files.hold(shard) as path:
            texts = read_texts(path.parent, shard, rg)
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


def hash_bytes(data: bytes, size: int = 16) -> str:
    """BLAKE2b of `data` as 2 x `size` hex digits."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing or damaged."""
    try:
        data = parse_json(read_plain(path))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _thin(texts: list[str], share: int) -> Iterator[str]:
    """About `share` characters of these texts: every k-th document, the last one cut."""
    total = sum(map(len, texts))
    left = share
    for text in texts[:: max(1, total // share)]:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _read_footers(root: Path, files: list[Path], cache: Path | None) -> list[Shard]:
    """Every shard's footer, from the manifest where size and modification time still agree."""
    manifests = [root / MANIFEST]
    if cache is not None:
        manifests.append(cache / "manifests" / f"{hash_bytes(str(root).encode(), 8)}.json")
    known = next((entries for entries in map(_manifest_entries, manifests) if entries), {})
    stats = {path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files}
    missing = [path for path in files if path.name not in known or known[path.name][0] != stats[path.name]]
    with ThreadPoolExecutor(READERS) as pool:
        read = {shard.name: shard for shard in pool.map(read_footer, missing)}
    shards = [read.get(path.name) or known[path.name][1] for path in files]
    if missing:
        gone = {name for name in known if not (root / name).exists()}
        entries = {name: entry for name, entry in known.items() if name not in gone} | {s.name: (stats[s.name], s) for s in shards}
        _write_manifest(manifests, entries)
    return shards


def _manifest_entries(path: Path) -> dict[str, tuple[list[int], Shard]] | None:
    data = read_json(path)
    try:
        return {entry["name"]: (entry["stat"], Shard.from_json(entry)) for entry in data["files"]} if data else None
    except (KeyError, TypeError, ValueError):
        return None


def _write_manifest(manifests: list[Path], entries: dict[str, tuple[list[int], Shard]]) -> None:
    """Into the first place that may be written; a manifest only saves time, so that none is no error."""
    data = json.dumps({"files": [{**shard.to_json(), "stat": stat} for stat, shard in entries.values()]}).encode()
    for path in manifests:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _is_writable(path.parent):
                return write_atomic(path, data)
        except OSError:
            continue


def _is_writable(folder: Path) -> bool:
    """Whether a write is possible and meant: root could write into a folder that its owner made read-only, and must not."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def read_footer(path: Path) -> Shard:
    """A shard from its Parquet footer, the `text` column checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        size, footer = _footer_bytes(path)
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no readable Parquet file: {_first_line(error)}; fetch or write it again, or remove it") from error
    if TEXT not in schema.names:
        raise DataError(f"{path} has no `{TEXT}` column; its columns are {', '.join(schema.names) or '(none)'}")
    if not _is_string(schema.field(TEXT).type):
        raise DataError(f"{path}: the `{TEXT}` column holds {schema.field(TEXT).type}, not strings")
    groups = tuple(_row_group(metadata, rg) for rg in range(metadata.num_row_groups))
    return Shard(path.name, size, groups, hash_bytes(footer + size.to_bytes(8, "little")))


def _row_group(metadata: pq.FileMetaData, rg: int) -> RowGroup:
    group = metadata.row_group(rg)
    column = next(i for i in range(group.num_columns) if group.column(i).path_in_schema == TEXT)
    return RowGroup(group.num_rows, group.column(column).total_uncompressed_size)


def _footer_bytes(path: Path) -> tuple[int, bytes]:
    """File size and the raw footer: its last 8 bytes are the footer's length and the magic `PAR1`."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length + 12 > size:
            raise OSError(f"it does not end in a Parquet footer ({size:,} bytes; truncated, or another format)")
        file.seek(size - 8 - length)
        return size, file.read(length)


def _read_column(root: Path, shard: Shard, rg: int) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(root) / shard.name
    try:
        if (size := path.stat().st_size) != shard.bytes:
            raise OSError(f"it has {size:,} bytes, and had {shard.bytes:,} when the corpus was scanned")
        with pq.ParquetFile(path) as file:
            column = file.read_row_group(rg, columns=[TEXT], use_threads=False).column(TEXT)
        if len(column) != shard.row_groups[rg].rows:
            raise OSError(f"it has {len(column):,} rows, and the footer promised {shard.row_groups[rg].rows:,}")
        return column
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}, row group {rg} cannot be read: {_first_line(error)}") from error


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_utf8(raw: bytes | None) -> bool:
    try:
        return raw is None or raw.decode() is not None
    except UnicodeDecodeError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
