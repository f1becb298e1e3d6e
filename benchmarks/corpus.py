"""A corpus of thousands of shards: how long a start takes, and what 1,024 ranks would read. One JSON line each, no model.

    python benchmarks/corpus.py [--shards 6543] [--folder DIR] [--ranks 1 8 64 1024]

start: a process of its own each time, from the scan of the folder to the first batch: once with nothing cached (every footer
is read), then from the cached manifest.

ranks: a simulation of one epoch. Every rank's lanes are read to the end of their share of the epoch, all ranks one after the
other in this process, and each row is checked to come exactly once over all ranks. rows_per_rank: how many rows the ranks
find in their lanes of one epoch, least and most; a step takes the same number from each, and a lane that is through goes on
with the next epoch. cpu_ms_per_1000_rows and setup_ms: what one rank spends, median over eight ranks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from common import script

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from picotrain.bench import processes
from picotrain.data.corpus import Corpus, scan
from picotrain.data.lanes import Cursor, Reader, Stream
from picotrain.data.mixture import Source
from picotrain.data.units import default_lanes, units

SEQ_LEN, UNIT_BYTES, BOS = 63, 1024, 256
DOCUMENTS, GROUP = 16, 8  # of a shard, of a row group


class Bytes:
    """Every UTF-8 byte is a token."""

    bos_id, vocab_size = BOS, 257

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raw = [text.encode() for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8).astype(np.uint32), np.cumsum([0, *map(len, raw)])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=6543, help="training shards; one more validates")
    parser.add_argument("--folder", type=Path, help="where the corpus is made and kept; default: a temporary folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--start", action="store_true", help="measure one start on the corpus in --folder, in this process")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.start:
        yield _start(args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "corpus"
        if not folder.exists():
            make(folder, args.shards + 1)
        (folder / "data.json").unlink(missing_ok=True)
        for cached in (False, True, True, True):
            yield {"benchmark": "corpus_start", "shards": args.shards, "cached": cached} | start(folder)
        corpus = scan(folder, "many")
        for dp_size in args.ranks:
            yield {"benchmark": "corpus_ranks", "shards": len(corpus.shards)} | simulate(corpus, dp_size)


def make(folder: Path, shards: int) -> None:
    """Tiny shards whose documents are all different."""
    folder.mkdir(parents=True)

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        texts = [f"{index}.{doc} " * int(rng.integers(5, 60)) for doc in range(DOCUMENTS)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet", row_group_size=GROUP, compression="zstd")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(shards)))


def start(folder: Path) -> dict[str, Any]:
    """Seconds to scan and to the first batch, in a fresh process; imports of torch do not count."""
    (line,) = processes.lines(__file__, ["--start", "--folder", str(folder)])
    return line


def _start(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    corpus = scan(folder, "many")
    scanned = time.perf_counter()
    corpus = Corpus.from_json(json.loads(json.dumps(corpus.to_json())))  # as a worker gets it, through data.json
    from picotrain.data.stream import Loader  # brings torch, which a training has imported anyway

    imported = time.perf_counter()
    lanes = default_lanes(len(units(corpus.shards, UNIT_BYTES)))
    with Loader(
        corpus, Bytes(), seq_len=SEQ_LEN, unit_bytes=UNIT_BYTES, lanes=lanes, seed=0, device_batch_size=32, rows_per_step=32
    ) as loader:
        next(loader)
        ready = time.perf_counter()
    found = {"scan_s": scanned - started, "first_batch_s": ready - imported, "rss_mb": _rss_mb()}
    return {key: round(value, 3) for key, value in found.items()}


def _rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def simulate(corpus: Corpus, dp_size: int) -> dict[str, Any]:
    """One epoch of `dp_size` ranks; AssertionError unless every row comes once."""
    lanes = max(64, dp_size)
    seen: Counter[int] = Counter()
    rows_per_rank, setup_ms, cpu_ms = [], [], []
    for rank in range(dp_size):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        stream = Stream(Source(corpus), Bytes(), SEQ_LEN, UNIT_BYTES, lanes, seed=0, kept=2 * lanes // dp_size)
        setup_ms.append(1000 * (time.perf_counter() - begun))
        rows, cpu_begun = 0, time.process_time()
        with ThreadPoolExecutor(1) as pool:
            for lane in range(rank, lanes, dp_size):
                reader = Reader(stream, lane, Cursor(0), pool, prefetch_at=0.5)
                while (row := reader.next_row()) is not None and reader.cursor.position < len(stream.units):
                    seen[hash(row.tobytes())] += 1
                    rows += 1
        rows_per_rank.append(rows)
        cpu_ms.append(1000 * (time.process_time() - cpu_begun) / max(1, rows) * 1000)
    assert seen == Counter(hash(row.tobytes()) for row in all_rows(corpus)), "the ranks' rows are not each row once"
    sample = slice(None, None, max(1, dp_size // 8))
    return {
        "dp_size": dp_size, "lanes": lanes, "units": len(stream.units), "rows": seen.total(), "every_row_once": True,
        "rows_per_rank": [min(rows_per_rank), max(rows_per_rank)], "setup_ms": round(statistics.median(setup_ms[sample]), 1),
        "cpu_ms_per_1000_rows": round(statistics.median(cpu_ms[sample]), 1),
        "rss_mb": round(_rss_mb()),
    }  # fmt: skip


def all_rows(corpus: Corpus):
    """Every row of one epoch, unit by unit, as packing alone defines it."""
    stream = Stream(Source(corpus), Bytes(), SEQ_LEN, UNIT_BYTES, 1, seed=0)
    for turn in islice(stream.shares.turns(0, 0), len(stream.units)):
        for part in stream._turn_slices(turn, 0):
            yield from part.rows


if __name__ == "__main__":
    raise SystemExit(script(__file__))
