"""The second pass: a range of hashes, read from every segment, without copies, in a seeded order, becomes one shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.data.corpus import TEXT
from picotrain.data.prepare.documents import DUPLICATE, place_name
from picotrain.data.prepare.inputs import Input
from picotrain.data.prepare.segments import DIGEST_BYTES, Mapped, Sizes, Task, line_of
from picotrain.data.prepare.workers import tick
from picotrain.disk import content_hash, find_json, write_whole

VAL_FRACTION = 0.05  # of the documents, as long as that is no more than one shard
MIN_ROW_GROUP_BYTES = 16 << 10
END = 1 << (8 * DIGEST_BYTES)  # above every hash


class Document(NamedTuple):
    """One that is written: `order` decides where."""

    order: bytes
    file: int
    text: bytes


@dataclass(frozen=True)
class Job:
    """One job of the second pass: the documents with low <= hash < high. It writes `shard` and, last, `done`."""

    number: int
    low: int
    high: int
    bytes: int  # of text that it has to read, about
    segments: tuple[tuple[Path, tuple[int, ...]], ...]  # the batches that hold such documents, and others
    folder: Path
    files: Path  # the list of inputs
    shards: int  # how many there are of this side, training or validation
    options: ShardOptions

    @property
    def shard(self) -> Path:
        return self.folder / f"job_{self.number:06d}.parquet"

    @property
    def skipped(self) -> Path:
        return self.folder / f"job_{self.number:06d}.skipped.jsonl"

    @property
    def done(self) -> Path:
        return self.folder / f"job_{self.number:06d}.json"


@dataclass(frozen=True)
class ShardOptions:
    """What is the same for all jobs."""

    identity: str
    seed: int
    keep_duplicates: bool
    row_group_bytes: int


def plan_jobs(
    tasks: Sequence[Task], mapped: Sequence[Mapped], buckets: int, folder: Path, files: Path, sizes: Sizes, options: ShardOptions
) -> list[Job]:
    """The validation shard and then the training shards, each a range of hashes: the first range validates.

    It has at least one text and leaves one: the caller has seen that there are two.
    """
    import numpy as np

    per_bucket = np.zeros(buckets, dtype=np.int64)
    batches = [np.frombuffer(found.batches, dtype=np.uint32) for found in mapped]
    for found, which in zip(mapped, batches, strict=True):
        np.add.at(per_bucket, which, np.frombuffer(found.batch_bytes, dtype=np.uint64).astype(np.int64))
    limit = _val_limit(mapped, int(per_bucket.sum()), sizes.shard)
    edges = [0, limit, *_shard_edges(per_bucket.tolist(), limit, sizes.shard), END]

    def job(number: int) -> Job:
        low, high = edges[number], edges[number + 1]
        first, last = low * buckets // END, (high - 1) * buckets // END
        chosen = [np.flatnonzero((which >= first) & (which <= last)).tolist() for which in batches]
        segments = tuple((task.segment, tuple(ids)) for task, ids in zip(tasks, chosen, strict=True) if ids)
        size = int(per_bucket[first : last + 1].sum())
        return Job(number, low, high, size, segments, folder, files, len(edges) - 2 if number else 1, options)

    return [job(number) for number in range(len(edges) - 1)]


def _val_limit(mapped: Sequence[Mapped], total_bytes: int, shard_bytes: int) -> int:
    """The first hash that is trained on."""
    least = min(found.low for found in mapped if found.low is not None)
    greatest = max(found.high for found in mapped if found.high is not None)
    fraction = min(VAL_FRACTION, shard_bytes / total_bytes)
    return min(max(int(fraction * 2**64) << (8 * DIGEST_BYTES - 64), least + 1), greatest)


def _shard_edges(per_bucket: list[int], limit: int, shard_bytes: int) -> list[int]:
    """Where one training shard ends and the next begins: at the first bucket with which it is full."""
    buckets, edges, filled = len(per_bucket), [], 0
    first = limit * len(per_bucket) // END
    rest = sum(per_bucket[first:])
    for bucket in range(first, buckets):
        filled += per_bucket[bucket]
        rest -= per_bucket[bucket]
        if filled >= shard_bytes and rest >= shard_bytes // 2:  # a short rest joins the last
            edges.append(-(-(bucket + 1) * END // buckets))  # rounded up: the first hash of the next bucket
            filled = 0
    return edges


def write_job(job: Job) -> None:
    """Run a job unless it is done. A range without a document gives no shard."""
    if job.done.exists():
        return
    files = [Input(Path(path), source) for path, source in json.loads(job.files.read_bytes())]
    found: dict[str, Any] = {"documents": 0, "bytes": 0, "duplicates": 0}
    with open(job.skipped, "w", encoding="utf-8") as skipped:
        documents = list(_documents(job, files, skipped.write, found))
    documents.sort()
    if documents:
        total = sum(len(document.text) for document in documents)
        row_group_bytes = min(job.options.row_group_bytes, max(MIN_ROW_GROUP_BYTES, total * job.shards // 16))
        write_shard(documents, [file.source for file in files], job.shard, row_group_bytes, job.options.identity)
        found |= {"documents": len(documents), "bytes": total, "file_bytes": job.shard.stat().st_size, "xxh3_64": content_hash(job.shard)}
    write_whole(job.done, json.dumps(found).encode())


def load_written(job: Job) -> dict[str, Any]:
    """What `write_job` found: documents, bytes of text, duplicates, and of a shard its file_bytes and xxh3_64."""
    found = find_json(job.done)
    assert found is not None, job.done
    return found


def _documents(job: Job, files: Sequence[Input], skip: Any, found: dict[str, Any]) -> Iterator[Document]:
    """The documents of a job's range, the first of equal ones, in the order of the input."""
    first: dict[bytes, tuple[int, int]] = {}
    low, high = (min(edge, END - 1).to_bytes(DIGEST_BYTES, "big") for edge in (job.low, job.high))
    above_all = job.high == END
    seed = hashlib.blake2b(str(job.options.seed).encode(), digest_size=16).digest()
    for digest, file, place, text in _rows(job):
        if digest < low or (digest >= high and not above_all):
            continue
        if not job.options.keep_duplicates and (earlier := first.setdefault(digest, (file, place))) != (file, place):
            where = place_name(files[earlier[0]], earlier[1])
            reason = f"the same text as {files[earlier[0]].source}{', ' * bool(where)}{where}"
            skip(line_of(files[file].source, place_name(files[file], place), DUPLICATE, reason))
            found["duplicates"] += 1
            continue
        name = digest + f"{files[file].source}:{place}".encode()
        yield Document(hashlib.blake2b(name, digest_size=16, key=seed).digest(), file, text)


def _rows(job: Job) -> Iterator[tuple[bytes, int, int, bytes]]:
    """(digest, file, place, text) of every document in the job's batches, in the order of the input within a bucket."""
    import pyarrow as pa

    for path, batches in job.segments:
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in batches:
                batch = reader.get_batch(number)
                tick(batch.column("text").nbytes)
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def write_shard(documents: list[Document], sources: Sequence[str], path: Path, row_group_bytes: int, identity: str) -> None:
    """A Parquet file with the columns `text` and `source`, in row groups of about `row_group_bytes` of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The identity of inputs and options stands in the footer, so that a shard's fingerprint is one of its content.
    schema = pa.schema([(TEXT, pa.string()), ("source", pa.string())], metadata={"picotrain.identity": identity})
    # Statistics of text are whole documents, and stand where no checksum covers them.
    with pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    ) as writer:
        for start, end in _runs(documents, row_group_bytes):
            group = documents[start:end]
            columns = [[document.text for document in group], [sources[document.file] for document in group]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))


def _runs(documents: list[Document], size: int) -> list[tuple[int, int]]:
    """Consecutive documents in runs of at least `size` bytes; a short rest of less than half joins the run before."""
    starts, filled = [], size
    for index, document in enumerate(documents):
        if filled >= size:
            starts.append(index)
            filled = 0
        filled += len(document.text)
    if len(starts) > 1 and filled < size // 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], len(documents)], strict=True))
