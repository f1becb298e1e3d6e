"""How many rows an epoch has, counted before the first step where that takes seconds. Without torch.

The tokens of every document are counted once for a corpus and a tokenizer and kept in the cache. The rows that they fill with a
seq_len and a seed follow from these numbers alone.
"""

from __future__ import annotations

import io
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from picotrain import hardware
from picotrain.data.corpus import Corpus, hash_bytes
from picotrain.data.mixture import Mixture, Source, UnitRows
from picotrain.data.packing import count_rows
from picotrain.data.slices import Encoder, slice_bytes, tokenized
from picotrain.data.units import COUNT_BYTES, Unit, units
from picotrain.disk import write_whole
from picotrain.errors import DataError

LARGE_BYTES = 32 << 20  # text from which on the counting is worth a line


class Lengths(NamedTuple):
    """Tokens of every document of a corpus, in the order of units, slices and documents."""

    tokens: NDArray[np.uint32]  # (documents,) without `<|bos|>`
    slice_docs: NDArray[np.int64]  # (slices,) documents of each slice
    unit_slices: NDArray[np.int64]  # (units,) slices of each unit

    def rows(self, seq_len: int, seed: int) -> UnitRows:
        """The rows of each unit's slices in the first epoch."""
        ends = np.cumsum(self.slice_docs)
        rows, number = [], 0
        for unit, slices in enumerate(self.unit_slices.tolist()):
            parts = range(number, number + slices)
            documents = [self.tokens[ends[k] - self.slice_docs[k] : ends[k]] for k in parts]
            rows.append(tuple(count_rows(part, seq_len + 1, (seed, 0, unit, k)) for k, part in enumerate(documents)))
            number += slices
        return tuple(rows)


def count(
    data: Mixture, tokenizer: Encoder, fingerprint: str, seq_len: int, unit_bytes: int, seed: int, cache: Path, say: Callable[[str], None]
) -> Mixture:
    """The same data with the rows of each source that is here and has at most COUNT_BYTES of text. Raises DataError for text that
    cannot be read. fingerprint: of the tokenizer."""

    def found(corpus: Corpus) -> Lengths | None:
        if corpus.remote or corpus.text_bytes > COUNT_BYTES:
            return None
        path = _place(corpus, fingerprint, unit_bytes, cache)
        return _read(path) or _measure(corpus, tokenizer, unit_bytes, path, say)

    return _with_rows(data, found, seq_len, seed)


def known(data: Mixture, fingerprint: str, seq_len: int, unit_bytes: int, seed: int, cache: Path) -> Mixture:
    """The same data with the rows of each source as far as `count` has run for it, whatever the seq_len and the seed."""
    return _with_rows(data, lambda corpus: _read(_place(corpus, fingerprint, unit_bytes, cache)), seq_len, seed)


def _with_rows(data: Mixture, found: Callable[[Corpus], Lengths | None], seq_len: int, seed: int) -> Mixture:
    def counted(index: int, source: Source) -> Source:
        lengths = found(source.corpus)
        return source if lengths is None else replace(source, rows=lengths.rows(seq_len, seed + index))

    return replace(data, sources=tuple(counted(index, source) for index, source in enumerate(data.sources)))


def _measure(corpus: Corpus, tokenizer: Encoder, unit_bytes: int, path: Path, say: Callable[[str], None]) -> Lengths:
    """Tokenize all training text, a unit at a time on each core, and keep what was found."""
    started = time.monotonic()

    def measure(unit: Unit) -> list[NDArray[np.uint32]]:
        shard = corpus.shards[unit.shard]
        parts = tokenized(corpus.files, shard, unit, tokenizer, slice_bytes(unit_bytes))
        return [np.diff(part.offsets).astype(np.uint32) for part in parts]

    with ThreadPoolExecutor(min(8, hardware.cores())) as pool:
        try:
            slices = list(pool.map(measure, units(corpus.shards, unit_bytes)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    flat = [part for unit in slices for part in unit]
    tokens = np.concatenate(flat) if flat else np.zeros(0, np.uint32)
    lengths = Lengths(tokens, np.array([len(part) for part in flat], np.int64), np.array([len(unit) for unit in slices], np.int64))
    if corpus.text_bytes >= LARGE_BYTES:
        say(f"counted the tokens of {corpus.name}: {int(tokens.sum()):,} in {time.monotonic() - started:.1f} s")
    _write(path, lengths)
    return lengths


def _place(corpus: Corpus, fingerprint: str, unit_bytes: int, cache: Path) -> Path:
    key = f"{corpus.fingerprint} {fingerprint} {unit_bytes} {slice_bytes(unit_bytes)}"
    return Path(cache) / "lengths" / f"{hash_bytes(key.encode(), 8)}.npz"


def _read(path: Path) -> Lengths | None:
    """What `_write` wrote; None where it is missing or damaged, for it can be measured again."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            lengths = Lengths(*(arrays[name] for name in Lengths._fields))
        fits = lengths.slice_docs.sum() == len(lengths.tokens) and lengths.unit_slices.sum() == len(lengths.slice_docs)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    return lengths if fits else None


def _write(path: Path, lengths: Lengths) -> None:
    """Keep them; a cache only saves time, so that a disk that is full is no error."""
    raw = io.BytesIO()
    np.savez_compressed(raw, **lengths._asdict())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, raw.getvalue(), shared=True)
    except OSError:
        return


def unreadable(error: DataError) -> str:
    """What to tell a user whose text cannot be read while it is counted."""
    return f"{error}\nput the shard right, or pass over what cannot be read with data.on_bad_shard=skip"
