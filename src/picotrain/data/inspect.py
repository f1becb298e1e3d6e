"""What is in a corpus (`inspect`), and whether every byte of it can still be read (`verify`).

Both read a folder of Parquet shards in batches of about 1 MiB of text and write nothing. Without torch; numpy and pyarrow
are imported inside functions.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from picotrain.data.corpus import MANIFEST, ORIGIN, TEXT, Shard, found_in, manifest_entries, manifest_of, read_footer
from picotrain.data.folder import Chosen, choose
from picotrain.data.footers import opened, raising, reason_of
from picotrain.disk import content_hash, find_json
from picotrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from picotrain.data.slices import Encoder

SPECIAL = re.compile(rb"<\|[A-Za-z0-9_]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|\[(?:CLS|SEP|PAD|UNK|MASK|INST|/INST)\]")
MAX_SPECIAL = 1000  # different ones that are told apart
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SAMPLE_BYTES = 300  # shown of a sample document
READ_BYTES = 1 << 20
READERS = 4  # shards read at once by `verify`

Progress = Callable[[str, int, int], None]  # what is being done, bytes of it, of all


class Place(NamedTuple):
    """Where a document is: `row` counts from 0 within the row group."""

    shard: str
    row_group: int
    row: int


@dataclass
class Inspection:
    """What was found. Bytes are of UTF-8 text; all counts but the first block are of the documents that were read."""

    folder: str
    shards: int
    validation_shard: str
    documents: int
    text_bytes: int  # by the footers: the `text` columns, uncompressed
    file_bytes: int
    row_groups: int
    largest_row_group_bytes: int

    documents_read: int = 0
    bytes_read: int = 0
    null_documents: int = 0
    empty_documents: int = 0  # of no text but white space
    invalid_utf8_documents: int = 0
    first_invalid_utf8: Place | None = None
    duplicate_documents: int = 0  # beyond the first of equal ones
    duplicated_texts: int = 0  # different texts that occur more than once
    validation_duplicates: int = 0  # validation documents that are trained on too
    special_text: dict[str, int] = field(default_factory=dict)  # such text -> documents that contain it
    quantiles_bytes: dict[str, int] = field(default_factory=dict)
    mean_bytes: float = 0.0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # documents of at least, and below, so many bytes
    tokens: int | None = None  # a `<|bos|>` before each document counted
    bytes_per_token: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"first_invalid_utf8": self.first_invalid_utf8 and self.first_invalid_utf8._asdict()}


def inspect(
    folder: Path,
    *,
    tokenizer: Encoder | None = None,
    max_bytes: int | None = None,
    samples: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Inspection:
    """Read a corpus folder, or row groups of about `max_bytes` of it, spread evenly, and count what is in it.

    `say` is told what is left out of it. Memory: about 20 bytes for each document read. Raises DataError when a shard cannot be read.
    """
    files = {path.name: path for path in shard_files(folder)}
    chosen = choose(sorted(files), str(folder), None) if len(files) > 1 else Chosen([], next(iter(files)), [])
    for line in (*found_in(folder).words, *chosen.words):
        say(line)
    shards = [read_footer(files[name]) for name in (*chosen.train, chosen.val)]
    groups = _chosen([(shard, rg) for shard in shards for rg in range(len(shard.row_groups))], max_bytes)
    sizes = [group.text_bytes for shard in shards for group in shard.row_groups]
    found = Inspection(
        folder=str(folder),
        shards=len(shards),
        validation_shard=shards[-1].name,
        documents=sum(shard.rows for shard in shards),
        text_bytes=sum(sizes),
        file_bytes=sum(shard.bytes for shard in shards),
        row_groups=len(sizes),
        largest_row_group_bytes=max(sizes, default=0),
    )
    rows = sum(shard.row_groups[rg].rows for shard, rg in groups)
    total = sum(shard.row_groups[rg].text_bytes for shard, rg in groups)
    reader = _Reader(found, tokenizer, set(random.Random(seed).sample(range(rows), min(samples, rows))))
    done = 0
    for place, column in _columns(folder, groups):
        reader.add(place, column)
        done += column.nbytes
        if progress is not None:
            progress("reading", min(done, total), total)
    if progress is not None:
        progress("reading", total, total)
    reader.finish()
    return found


def shard_files(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. Raises DataError when there are none."""
    files = [Path(folder) / name for name in found_in(folder).names]
    if not files:
        raise DataError(f"{folder} holds no *.parquet file; make a corpus of it with `picotrain data prepare {folder} --out DIR`")
    return files


def _chosen(groups: list[tuple[Shard, int]], max_bytes: int | None) -> list[tuple[Shard, int]]:
    """All row groups, or so many, evenly spread, that they have about `max_bytes` of text, at least one."""
    total = sum(shard.row_groups[rg].text_bytes for shard, rg in groups)
    if max_bytes is None or total <= max_bytes:
        return groups
    count = max(1, len(groups) * max_bytes // total)
    return [groups[i * len(groups) // count] for i in range(count)]


def _columns(folder: Path, groups: Sequence[tuple[Shard, int]]) -> Iterator[tuple[Place, pa.Array]]:
    """The text of row groups in batches, each with its first row's place. Raises DataError naming shard and row group."""
    row, where = 0, ""
    with raising(lambda why: DataError(f"{where} cannot be read: {why}; `picotrain data verify {folder}` lists all that is bad")):
        for shard, of_shard in groupby(groups, key=lambda group: group[0]):
            where = f"{folder / shard.name}"
            with opened(folder / shard.name) as file:
                for _, rg in of_shard:
                    row, where = 0, f"{folder / shard.name}, row group {rg}"
                    for batch in _batches(file, shard, rg, [TEXT]):
                        yield Place(shard.name, rg, row), batch.column(0)
                        row += batch.num_rows
                    if row != shard.row_groups[rg].rows:
                        raise OSError(f"it holds {row:,} rows, and the footer promises {shard.row_groups[rg].rows:,}")


def _batches(file: pq.ParquetFile, shard: Shard, rg: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    group = shard.row_groups[rg]
    rows = max(1, min(group.rows, READ_BYTES * group.rows // max(1, group.text_bytes)))
    yield from file.iter_batches(rows, row_groups=[rg], columns=columns, use_threads=False)


def _binary(column: pa.Array) -> pa.Array:
    """A text column as bytes, valid UTF-8 or not."""
    import pyarrow as pa

    plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
    return plain.cast(pa.large_binary())


class _Reader:
    """Adds batches up into an Inspection."""

    def __init__(self, found: Inspection, tokenizer: Encoder | None, sampled: set[int]):
        self.found, self.tokenizer, self.sampled = found, tokenizer, sampled
        self._digests: dict[bool, array[int]] = {False: array("Q"), True: array("Q")}  # of training, of validation documents
        self._lengths = array("q")
        self._special: Counter[str] = Counter()
        self._tokens = 0

    def add(self, place: Place, column: pa.Array) -> None:
        """A batch whose first document is at `place`."""
        import xxhash

        found, raws = self.found, _binary(column).to_pylist()
        digests = self._digests[place.shard == found.validation_shard]
        texts = self._decoded(place, raws)
        for index, raw in enumerate(raws):
            if found.documents_read + index in self.sampled:
                self._sample(place._replace(row=place.row + index), raw or b"")
            if raw is None:
                found.null_documents += 1
                continue
            self._lengths.append(len(raw))
            if not texts[index] or texts[index].isspace():
                found.empty_documents += 1
                continue
            digests.append(xxhash.xxh3_64_intdigest(raw))
            if b"<" in raw or b"[" in raw:
                self._count_special(raw)
        found.documents_read += len(raws)
        found.bytes_read += sum(len(raw) for raw in raws if raw)
        if self.tokenizer is not None:
            ids, _ = self.tokenizer.encode_flat([text for text in texts if text])
            self._tokens += len(ids) + sum(1 for text in texts if text)

    def _decoded(self, place: Place, raws: Sequence[bytes | None]) -> list[str]:
        texts = []
        for index, raw in enumerate(raws):
            try:
                texts.append((raw or b"").decode())
            except UnicodeDecodeError:
                texts.append((raw or b"").decode(errors="replace"))
                self.found.invalid_utf8_documents += 1
                self.found.first_invalid_utf8 = self.found.first_invalid_utf8 or place._replace(row=place.row + index)
        return texts

    def _count_special(self, raw: bytes) -> None:
        for match in set(SPECIAL.findall(raw)):
            name = match.decode()
            if name in self._special or len(self._special) < MAX_SPECIAL:
                self._special[name] += 1

    def _sample(self, place: Place, raw: bytes) -> None:
        text = raw[:SAMPLE_BYTES].decode(errors="ignore")
        self.found.samples.append({**place._asdict(), "bytes": len(raw), "text": text})

    def finish(self) -> None:
        """Work out what needs all documents at once."""
        import numpy as np

        found = self.found
        train, val = (np.frombuffer(self._digests[side], dtype=np.uint64) for side in (False, True))
        _, counts = np.unique(np.concatenate([train, val]), return_counts=True)
        found.duplicate_documents = int((counts - 1).sum())
        found.duplicated_texts = int((counts > 1).sum())
        found.validation_duplicates = int(np.isin(val, train).sum())
        found.special_text = dict(self._special.most_common())
        if self.tokenizer is not None and self._tokens:
            found.tokens, found.bytes_per_token = self._tokens, found.bytes_read / self._tokens
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        if len(lengths):
            values = np.quantile(lengths, QUANTILES, method="inverted_cdf")
            found.quantiles_bytes = {f"{q:.0%}": int(value) for q, value in zip(QUANTILES, values, strict=True)}
            found.mean_bytes = float(lengths.mean())
            found.histogram = _histogram(lengths)


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, below, documents) by powers of two, from the shortest to the longest document."""
    import numpy as np

    _, exponents = np.frexp(lengths.astype(np.float64))  # 2 ** (e - 1) <= length < 2 ** e; 0 gives 0
    counts = np.bincount(exponents)
    return [(1 << e >> 1, 1 << e, int(counts[e])) for e in range(int(exponents.min()), len(counts))]


# --- verify --------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """What is wrong with a shard; `row_group` is None when it concerns the whole file."""

    shard: str
    row_group: int | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.row_group is None else f", row group {self.row_group}"
        return f"{self.shard}{where}: {self.reason}"


@dataclass
class Verification:
    """What was read, and what is wrong with it. `unhashed` names shards without a hash in origin.json, `unlisted` those without an entry in
    data.json. There was nothing to compare them with: it is only known that they can be read."""

    folder: str
    shards: int
    file_bytes: int
    bad: list[Bad]
    unhashed: list[str]
    unlisted: list[str]


def verify(folder: Path, progress: Progress | None = None, cache: Path | None = None) -> Verification:
    """Read every shard of a folder wholly, page checksums on. Compare it with origin.json, and with data.json or what the `cache` remembers
    in its place.

    What is wrong with a shard is in the result, everything at once. Raises DataError only when there is no shard at all.
    """
    files = shard_files(folder)
    prints, hashes = _manifest(folder, cache), _hashes(folder)
    total = sum(path.stat().st_size for path in files)
    done, lock, stop = 0, Lock(), Event()

    def read(amount: int) -> None:
        nonlocal done
        if stop.is_set():
            raise KeyboardInterrupt  # in a thread that nobody waits for any more
        with lock:
            done += amount
            if progress is not None:  # each byte is read twice: to be hashed and to be decoded
                progress("verifying", min(done // 2, total), total)

    with ThreadPoolExecutor(READERS) as pool:
        try:
            bad = [item for found in pool.map(lambda path: _verify_shard(path, prints, hashes, read), files) for item in found]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    names = [path.name for path in files]
    for name in sorted({*prints, *hashes}.difference(names)):
        where = " and ".join(file for file, known in ((MANIFEST, prints), (ORIGIN, hashes)) if name in known)
        bad.append(Bad(name, None, f"it is missing; {where} has it"))
    return Verification(
        folder=str(folder),
        shards=len(files),
        file_bytes=total,
        bad=bad,
        unhashed=[name for name in names if name not in hashes],
        unlisted=[name for name in names if name not in prints],
    )


def _manifest(folder: Path, cache: Path | None) -> dict[str, Shard]:
    """The shards as data.json or the cache has them; read as it is: `scan` would bring it up to date first."""
    places = [folder / MANIFEST, *([] if cache is None else [manifest_of(folder, cache)])]
    return {name: shard for path in places for name, (_, shard) in (manifest_entries(path) or {}).items()}


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    shards = (find_json(folder / ORIGIN) or {}).get("shards")
    return shards if isinstance(shards, dict) else {}


def _verify_shard(path: Path, prints: dict[str, Shard], hashes: dict[str, dict[str, Any]], read: Callable[[int], None]) -> list[Bad]:
    bad: list[Bad] = []
    size = path.stat().st_size
    try:
        if (known := hashes.get(path.name)) is not None:
            if size != known["bytes"]:
                bad.append(Bad(path.name, None, f"it has {size:,} bytes, and had {known['bytes']:,} when it was made"))
                read(size)
            elif content_hash(path, read) != known["xxh3_64"]:
                bad.append(Bad(path.name, None, "its content is not what it was when it was made (XXH3)"))
        else:
            read(size)
        shard = read_footer(path)
        entry = prints.get(path.name)
        if entry is not None and entry.fingerprint != shard.fingerprint:
            bad.append(Bad(path.name, None, f"it is not the shard that {MANIFEST} has (fingerprint): rewritten or damaged"))
        per_group = size // max(1, len(shard.row_groups))
        with raising(lambda why: DataError(f"cannot be read: {why}")), opened(path) as file:
            for rg in range(len(shard.row_groups)):
                bad += [Bad(path.name, rg, reason) for reason in _verify_row_group(file, shard, rg)]
                read(per_group)
    except DataError as error:
        bad.append(Bad(path.name, None, str(error).removeprefix(str(path)).lstrip(": ")))
    except OSError as error:
        bad.append(Bad(path.name, None, f"cannot be read: {error.strerror or error}"))
    return bad


def _verify_row_group(file: pq.ParquetFile, shard: Shard, rg: int) -> Iterator[str]:
    """What is wrong with a row group, at most one thing."""
    import pyarrow as pa

    rows = 0
    try:
        for batch in _batches(file, shard, rg, None):
            try:
                _binary(batch.column(TEXT)).cast(pa.large_string())
            except pa.ArrowInvalid:
                yield f"text that is not valid UTF-8 in rows {rows} to {rows + batch.num_rows - 1}"
                return
            rows += batch.num_rows
        if rows != shard.row_groups[rg].rows:
            yield f"it holds {rows:,} rows, and the footer promises {shard.row_groups[rg].rows:,}"
    except Exception as error:  # whatever pyarrow raises
        yield f"cannot be read after {rows:,} rows: {reason_of(error)}"
