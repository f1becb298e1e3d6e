"""The second pass: a range of hashes, read from every segment, without copies, in a seeded order, becomes one shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.data.corpus import TEXT
from picotrain.data.prepare.found import DUPLICATE, line_of, place_name
from picotrain.data.prepare.inputs import Input
from picotrain.data.prepare.parts import Job, Sizes, runs
from picotrain.data.prepare.segments import DIGEST_BYTES, END, Task
from picotrain.data.prepare.workers import tick
from picotrain.disk import content_hash

VAL_FRACTION = 0.05  # of the documents, as long as that is no more than one shard
MIN_ROW_GROUP_BYTES = 16 << 10


class Document(NamedTuple):
    """One that is written: `order` decides where."""

    order: bytes
    file: int
    text: bytes


class ShardOptions(NamedTuple):
    """What is the same for all jobs. files: where the list of inputs is."""

    files: Path
    identity: str
    seed: int
    keep_duplicates: bool
    row_group_bytes: int


@dataclass(frozen=True)
class ShardJob(Job):
    """One job of the second pass: the documents with low <= hash < high. Its output is a shard, if there are any.

    It finds: documents, bytes of their text, duplicates, and of a shard its file_bytes and xxh3_64.
    """

    low: int
    high: int
    bytes: int  # of text that it has to read, about
    segments: tuple[tuple[Path, tuple[int, ...]], ...]  # the batches that hold such documents, and others
    shards: int  # how many there are of this side, training or validation
    options: ShardOptions


def plan_jobs(tasks: Sequence[Task], mapped: Sequence[dict[str, Any]], sizes: Sizes, options: ShardOptions) -> list[ShardJob]:
    """The validation shard and then the training shards, each a range of hashes: the first range validates.

    It has at least one text and leaves one: the caller has seen that there are two.
    """
    import numpy as np

    buckets, folder = tasks[0].buckets, tasks[0].base.parent
    batches = [found["batches"] for found in mapped]
    per_bucket = np.zeros(buckets, dtype=np.int64)
    for of_task in batches:
        np.add.at(per_bucket, of_task[:, 0], of_task[:, 1])
    fraction = min(VAL_FRACTION, sizes.shard / int(per_bucket.sum()))
    least, greatest = min(found["low"] for found in mapped), max(found["high"] for found in mapped)
    limit = min(max(int(fraction * 2**64) << (8 * DIGEST_BYTES - 64), least + 1), greatest)  # the first hash that is trained on
    first = limit * buckets // END
    # A shard ends with the bucket that fills it; rounded up: the first hash of the next one.
    ends = [-(-(first + end) * END // buckets) for _, end in runs(per_bucket[first:].tolist(), sizes.shard)]
    edges = [0, limit, *ends]

    def job(number: int) -> ShardJob:
        low, high = edges[number], edges[number + 1]
        first, last = low * buckets // END, (high - 1) * buckets // END
        chosen = [np.flatnonzero((of_task[:, 0] >= first) & (of_task[:, 0] <= last)).tolist() for of_task in batches]
        segments = tuple((task.output, tuple(ids)) for task, ids in zip(tasks, chosen, strict=True) if ids)
        size = int(per_bucket[first : last + 1].sum())
        return ShardJob(folder / f"shard_{number:06d}", low, high, size, segments, len(ends) if number else 1, options)

    return [job(number) for number in range(len(edges) - 1)]


def write_job(job: ShardJob) -> None:
    """Run a job. A range without a document gives no shard."""
    options = job.options
    files = [Input(Path(path), source) for path, source in json.loads(options.files.read_bytes())]
    found: dict[str, Any] = {"documents": 0, "bytes": 0, "duplicates": 0}
    with open(job.skipped, "w", encoding="utf-8") as skipped:
        documents = sorted(_documents(job, files, skipped.write, found))
    if documents:
        total = sum(len(document.text) for document in documents)
        row_group_bytes = min(options.row_group_bytes, max(MIN_ROW_GROUP_BYTES, total * job.shards // 16))
        write_shard(documents, [file.source for file in files], job.output, row_group_bytes, options.identity)
        found |= {"documents": len(documents), "bytes": total}
        found |= {"file_bytes": job.output.stat().st_size, "xxh3_64": content_hash(job.output)}
    job.finish(found)


def _documents(job: ShardJob, files: Sequence[Input], skip: Callable[[str], object], found: dict[str, Any]) -> Iterator[Document]:
    """The documents of a job's range, the first of equal ones, in the order of the input."""
    import pyarrow as pa

    first: dict[bytes, tuple[int, int]] = {}
    seed = hashlib.blake2b(str(job.options.seed).encode(), digest_size=16).digest()
    for path, batches in job.segments:
        with pa.OSFile(str(path)) as stream:
            reader = pa.ipc.open_file(stream)
            for number in batches:
                batch = reader.get_batch(number)
                tick(batch.column("text").nbytes)
                for digest, file, place, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    if not job.low <= int.from_bytes(digest, "big") < job.high:
                        continue
                    source, where = files[file].source, place_name(files[file], place)
                    if not job.options.keep_duplicates and (earlier := first.setdefault(digest, (file, place))) != (file, place):
                        other, there = files[earlier[0]], place_name(files[earlier[0]], earlier[1])
                        skip(line_of(source, where, DUPLICATE, f"the same text as {other.source}{', ' * bool(there)}{there}"))
                        found["duplicates"] += 1
                        continue
                    order = hashlib.blake2b(digest + f"{source}:{place}".encode(), digest_size=16, key=seed).digest()
                    yield Document(order, file, text)


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
        for start, end in runs([len(document.text) for document in documents], row_group_bytes):
            group = documents[start:end]
            columns = [[document.text for document in group], [sources[document.file] for document in group]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))
