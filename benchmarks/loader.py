"""The data stream, from zstd Parquet to ready batches: one JSON line per setting, beside the usual method in the same run.

    python benchmarks/loader.py [--path FOLDER] [--short] [--seconds 10] [--no-baseline]

What picotrain's own figures mean stands in `picotrain bench loader --help`. --short cuts the text into documents of 1,500 characters
(median). The usual method: tokenize 128 documents at a time, keep a buffer of 1,000, fill each row with the longest that fits and, where
none does, crop the shortest (as nanochat's loader does, on the training thread). times_usual: tokens_per_s over the usual method's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from common import script

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from picotrain.bench import loader
from picotrain.data.corpus import Corpus, read_texts, scan
from picotrain.tokenizer import BOS, SPLIT_PATTERN, load_tokenizer

MEDIAN_CHARACTERS = 1500
BUFFER_DOCUMENTS, TOKENIZER_BATCH, TOKENIZER_THREADS = 1000, 128, 4  # of the usual method


def arguments(parser: argparse.ArgumentParser) -> None:
    loader.arguments(parser)
    parser.add_argument("--short", action="store_true", help="cut the text into short documents")
    parser.add_argument("--no-baseline", action="store_true")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    corpus, path = loader.material(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.short:
            corpus = cut_short(corpus, Path(folder))
        for rows, seq_len in loader.SETTINGS:
            line = loader.measure(corpus, path, rows, seq_len, options.seconds) | {"short": options.short}
            if not options.no_baseline:
                usual = measure_usual(corpus, path, rows, seq_len, options.seconds)
                line["usual"] = usual
                line["times_usual"] = round(line["tokens_per_s"] / usual["tokens_per_s"], 1)
                line["first_batch_times_usual"] = round(usual["first_batch_s"] / line["first_batch_s"], 1)
            yield line


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


if __name__ == "__main__":
    raise SystemExit(script(__file__))
