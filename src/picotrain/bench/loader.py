"""The data stream, from zstd Parquet to ready batches: one JSON line per setting, beside the usual method in the same run.

    python benchmarks/loader.py [--path FOLDER] [--short] [--seconds 10] [--no-baseline]

Without --path the text is data=pystdlib. --short cuts it into documents of 1,500 characters (median). Each setting starts
with a freshly loaded tokenizer; nothing but the loader runs, so that its rate is what two cores can do.

tokens_per_s: emitted tokens (B x T a batch) after the first batch; tokens_per_cpu_s: per second of CPU time, for a busy
machine. count_s: of the rows of an epoch, which a run does once, before it begins. first_batch_s: from the making of the loader.
tokenized_per_s: tokens that came out of the tokenizer in the same time. dropped_percent: text tokens that are read and in no row.
The usual method: tokenize 128 documents at a time, keep a buffer of 1,000, fill each row with the longest that fits and, where none
does, crop the shortest (as nanochat's loader does, on the training thread).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from picotrain.config.schema import DataConfig, TokenizerConfig
from picotrain.data import counts
from picotrain.data.corpus import Corpus, default_lanes, default_unit_bytes, read_texts, scan, units
from picotrain.data.mixture import Mixture
from picotrain.data.slices import slice_bytes, tokenized
from picotrain.data.sources import obtain_tokenizer, resolve
from picotrain.data.stream import Loader
from picotrain.places import expanded
from picotrain.tokenizer import BOS, SPLIT_PATTERN, Tokenizer, load_tokenizer

SETTINGS = ((32, 2048), (8, 512))  # rows and tokens of a batch
MEDIAN_CHARACTERS = 1500
BUFFER_DOCUMENTS, TOKENIZER_BATCH, TOKENIZER_THREADS = 1000, 128, 4  # of the usual method


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
    parser.add_argument("--short", action="store_true", help="cut the text into short documents")
    parser.add_argument("--seconds", type=float, default=10, help="measured time per setting and method")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--vocab", type=int, default=TokenizerConfig().vocab_size)
    parser.add_argument("--cache", type=Path, default=expanded(os.environ.get("PICOTRAIN_CACHE", "~/.cache/picotrain")))


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    data = DataConfig(kind="files", name=args.path.name, path=str(args.path)) if args.path else DataConfig(kind="pystdlib", name="pystdlib")
    corpus = resolve(data, args.cache)
    path, _ = obtain_tokenizer(TokenizerConfig(vocab_size=args.vocab), corpus, args.cache)
    with tempfile.TemporaryDirectory() as folder:
        if args.short:
            corpus = cut_short(corpus, Path(folder))
        for rows, seq_len in SETTINGS:
            line = {
                "benchmark": "loader", "corpus": corpus.name, "short": args.short, "rows": rows, "seq_len": seq_len,
                "text_mb": round(corpus.text_bytes / 1e6, 1), "cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2),
            }  # fmt: skip
            line |= measure_stream(corpus, path, rows, seq_len, args.seconds)
            if not args.no_baseline:
                usual = measure_usual(corpus, path, rows, seq_len, args.seconds)
                line["usual"] = usual
                line["times_usual"] = round(line["tokens_per_s"] / usual["tokens_per_s"], 1)
                line["first_batch_times_usual"] = round(usual["first_batch_s"] / line["first_batch_s"], 1)
            yield line


def measure_stream(corpus: Corpus, path: Path, rows: int, seq_len: int, seconds: float) -> dict[str, Any]:
    """picotrain's loader, on one rank."""
    unit_bytes = default_unit_bytes(seq_len)
    lanes = default_lanes(len(units(corpus.shards, unit_bytes)))
    tokenizer = load_tokenizer(path)
    tokenizer.encode_flat([""])  # imports what the encoder needs: a part of loading it
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = counts.count(Mixture.of(corpus), tokenizer, tokenizer.fingerprint, seq_len, unit_bytes, 0, Path(folder), lambda _: None)
    count_s = time.perf_counter() - begun
    counted = Counted(tokenizer)

    def start() -> Loader:
        return Loader(
            data, counted, seq_len=seq_len, unit_bytes=unit_bytes, lanes=lanes, seed=0, device_batch_size=rows, rows_per_step=rows
        )

    waits: list[float] = []
    started = time.perf_counter()
    with start() as loader:
        next(loader)
        first_batch_s = time.perf_counter() - started
        tokens, begun, cpu_begun = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < seconds:
            batch = next(loader)
            tokens += batch.tokens
            waits.append(batch.wait_ms)
        elapsed, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
    return {
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


def measure_usual(corpus: Corpus, path: Path, rows: int, seq_len: int, seconds: float) -> dict[str, Any]:
    """The usual method on the same corpus and vocabulary."""
    name, encode = usual_encoder(path)
    count = {"tokenized": 0, "discarded": 0}
    started = time.perf_counter()
    batches = usual_batches(corpus, encode, rows, seq_len, count)
    next(batches)
    first_batch_s = time.perf_counter() - started
    tokens, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        inputs, _ = next(batches)
        tokens += inputs.numel()
    elapsed = time.perf_counter() - begun
    return {
        "encoder": name, "tokens_per_s": round(tokens / elapsed), "first_batch_s": round(first_batch_s, 3),
        "discarded_percent": round(100 * count["discarded"] / (count["discarded"] + tokens + rows * (seq_len + 1)), 1),
        "tokenized_per_s": round(count["tokenized"] / (first_batch_s + elapsed)),
    }  # fmt: skip


def usual_batches(
    corpus: Corpus, encode: Callable[[list[str]], list[list[int]]], rows: int, seq_len: int, count: dict[str, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Best-fit with cropping from a buffer of documents, each led by `<|bos|>`."""
    texts = endless_texts(corpus)
    buffer: list[list[int]] = []
    ids = torch.empty((rows, seq_len + 1), dtype=torch.long)
    while True:
        for row in range(rows):
            at = 0
            while (room := seq_len + 1 - at) > 0:
                while len(buffer) < BUFFER_DOCUMENTS:
                    new = encode(list(islice(texts, TOKENIZER_BATCH)))
                    count["tokenized"] += sum(map(len, new))
                    buffer += new
                best, best_length = -1, 0
                for i, document in enumerate(buffer):
                    if best_length < len(document) <= room:
                        best, best_length = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                document = buffer.pop(best)
                count["discarded"] += max(0, len(document) - room)
                document = document[:room]
                ids[row, at : at + len(document)] = torch.tensor(document)
                at += len(document)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def endless_texts(corpus: Corpus) -> Iterator[str]:
    """The training documents, over and over, in the order of the files."""
    while True:
        for shard in corpus.shards:
            for rg in range(len(shard.row_groups)):
                yield from read_texts(corpus.root, shard, rg)


def usual_encoder(path: Path) -> tuple[str, Callable[[list[str]], list[list[int]]]]:
    """tiktoken where it is installed, else tokenizers; documents are led by `<|bos|>`."""
    tokenizer = load_tokenizer(path, "tokenizers")
    bos = tokenizer.bos_id
    try:
        import tiktoken
    except ImportError:
        import tokenizers

        plain = tokenizers.Tokenizer.from_file(str(path))
        return "tokenizers", lambda texts: [[bos, *item.ids] for item in plain.encode_batch_fast(texts, add_special_tokens=False)]
    ranks = {tokenizer.decode_bytes([id]): id for id in range(tokenizer.vocab_size) if id != bos}
    fast = tiktoken.Encoding("picotrain", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={BOS: bos})
    return "tiktoken", lambda texts: [[bos, *ids] for ids in fast.encode_ordinary_batch(texts, num_threads=TOKENIZER_THREADS)]


def cut_short(corpus: Corpus, folder: Path) -> Corpus:
    """The same text in the same row groups, cut into documents of log-normal length."""
    rng = np.random.default_rng(0)
    for shard in (*corpus.shards, corpus.val):
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(folder / shard.name, schema, compression="zstd") as writer:
            for rg in range(len(shard.row_groups)):
                pieces = [piece for text in read_texts(corpus.root, shard, rg) for piece in cut(text, rng)]
                writer.write_table(pa.table({"text": pieces}, schema=schema))
    return scan(folder, f"{corpus.name}-short", corpus.val.name)


def cut(text: str, rng: np.random.Generator) -> Iterator[str]:
    """A text in pieces of log-normal length, the median MEDIAN_CHARACTERS."""
    at = 0
    while at < len(text):
        end = at + max(1, int(rng.lognormal(np.log(MEDIAN_CHARACTERS), 0.7)))
        yield text[at:end]
        at = end
