"""The data stream, from zstd Parquet to ready batches. One JSON line per setting.

    picotrain bench loader [--path FOLDER] [--seconds 10]

Without --path the text is data=pystdlib. Each setting starts with a freshly loaded tokenizer; nothing but the loader runs, so that its
rate is what the cores can do.

tokens_per_s: emitted tokens (B x T a batch) after the first batch; tokens_per_cpu_s: per second of CPU time, for a busy
machine. count_s: of the rows of an epoch, which a run does once, before it begins. first_batch_s: from the making of the loader.
tokenized_per_s: tokens that came out of the tokenizer in the same time. dropped_percent: text tokens that are read and in no row.
In a checkout, `python benchmarks/loader.py` measures the usual method beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from picotrain.config.schema import DataConfig, TokenizerConfig
from picotrain.data import counts
from picotrain.data.corpus import Corpus, default_lanes, default_unit_bytes, units
from picotrain.data.mixture import Mixture
from picotrain.data.slices import slice_bytes, tokenized
from picotrain.data.sources import resolve
from picotrain.data.stream import Loader
from picotrain.data.tokenizers import obtain_tokenizer
from picotrain.places import expanded
from picotrain.tokenizer import Tokenizer, load_tokenizer

SETTINGS = ((32, 2048), (8, 512))  # rows and tokens of a batch


class Counted:
    """A tokenizer that counts its tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.bos_id, self.vocab_size, self.tokens = tokenizer.bos_id, tokenizer.vocab_size, 0
        self._encode = tokenizer.encode_flat

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._encode(texts)
        self.tokens += len(ids)
        return ids, offsets


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", type=Path, help="a folder of Parquet shards")
    parser.add_argument("--seconds", type=float, default=10, help="measured time per setting and method")
    parser.add_argument("--vocab", type=int, default=TokenizerConfig().vocab_size)
    parser.add_argument("--cache", type=Path, default=expanded(os.environ.get("PICOTRAIN_CACHE", "~/.cache/picotrain")))


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    corpus, tokenizer = material(options)
    for rows, seq_len in SETTINGS:
        yield measure(corpus, tokenizer, rows, seq_len, options.seconds)


def material(options: argparse.Namespace) -> tuple[Corpus, Path]:
    """The corpus, and where its tokenizer is."""
    path = options.path
    data = DataConfig(kind="files", name=path.name, path=str(path)) if path else DataConfig(kind="pystdlib", name="pystdlib")
    corpus = resolve(data, options.cache)
    return corpus, obtain_tokenizer(TokenizerConfig(vocab_size=options.vocab), corpus, options.cache)[0]


def measure(corpus: Corpus, path: Path, rows: int, seq_len: int, seconds: float) -> dict[str, Any]:
    """One setting, on one rank; path: of the tokenizer."""
    line = {
        "benchmark": "loader", "corpus": corpus.name, "rows": rows, "seq_len": seq_len, "text_mb": round(corpus.text_bytes / 1e6, 1),
        "cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    unit_bytes = default_unit_bytes(seq_len)
    lanes = default_lanes(len(units(corpus.shards, unit_bytes)))
    tokenizer = load_tokenizer(path)
    tokenizer.encode_flat([""])  # imports what the encoder needs: a part of loading it
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = counts.count(Mixture.of(corpus), tokenizer, tokenizer.fingerprint, seq_len, unit_bytes, 0, Path(folder), lambda _: None)
    count_s = time.perf_counter() - begun
    counted = Counted(tokenizer)

    waits: list[float] = []
    started = time.perf_counter()
    with Loader(
        data, counted, seq_len=seq_len, unit_bytes=unit_bytes, lanes=lanes, seed=0, device_batch_size=rows, rows_per_step=rows
    ) as loader:
        next(loader)
        first_batch_s = time.perf_counter() - started
        tokens, begun, cpu_begun = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < seconds:
            batch = next(loader)
            tokens += batch.tokens
            waits.append(batch.wait_ms)
        elapsed, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
    return line | {
        "encoder": tokenizer.encoder, "lanes": lanes, "count_s": round(count_s, 3), "tokens_per_s": round(tokens / elapsed),
        "first_batch_s": round(first_batch_s, 3),
        "tokens_per_cpu_s": round(tokens / cpu_s), "dropped_percent": round(dropped_percent(corpus, tokenizer, seq_len, unit_bytes), 3),
        "tokenized_per_s": round(counted.tokens / (first_batch_s + elapsed)), "epochs": round(batch.epoch, 2),
        "wait_ms_p50_p99": [round(float(q), 2) for q in np.percentile(waits, (50, 99))],
    }  # fmt: skip


def dropped_percent(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, unit_bytes: int) -> float:
    """Of one epoch."""
    dropped = total = 0
    for index, unit in enumerate(units(corpus.shards, unit_bytes)):
        for tokens in tokenized(corpus.files, corpus.shards[unit.shard], unit, tokenizer, slice_bytes(unit_bytes)):
            dropped += tokens.pack(tokenizer, seq_len, (0, 0, index, 0)).dropped_tokens
            total += int(tokens.offsets[-1])
    return 100 * dropped / total
