"""How much text a config trains on: by the footers of what is there, before that estimated from known figures and sizes of files.

Nothing is prepared or downloaded for it, and of the files only a bit is read. Without torch.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from picotrain.config.schema import DataConfig
from picotrain.contracts import Source
from picotrain.data import sources
from picotrain.data.corpus import hint_for, read_footer
from picotrain.data.mixture import Mixture
from picotrain.data.prepare import documents
from picotrain.data.prepare.found import Found
from picotrain.data.prepare.inputs import CODE, PARQUET, PLAIN, Input, kind_of
from picotrain.data.prepare.shards import VAL_FRACTION
from picotrain.errors import DataError
from picotrain.text import size

COMPRESSED = (".gz", ".zst")
SAMPLED_FILES = 16  # that a bit is read of


class Amount(NamedTuple):
    """The training text of one source."""

    name: str
    text_bytes: float | None  # None: not known before something was fetched
    estimated: str = ""  # from what, in words; "": it is exact
    share: float = 1.0  # of the rows, when no source has left
    repeats: bool = True  # begins anew when it was read once; else it leaves


def of_mixture(mixture: Mixture) -> list[Amount]:
    """Of each source, by the footers."""
    pairs = zip(mixture.sources, mixture.shares, strict=True)
    return [Amount(source.corpus.name, source.corpus.text_bytes, share=share, repeats=source.repeat) for source, share in pairs]


def estimate(data: DataConfig, cache: Path) -> list[Amount]:
    """Of each source of a resolved config, exact where it is there. Raises DataError for what can never be a corpus."""
    entries = data.mixture if data.kind == "mixture" else ()
    total = sum(entry.weight for entry in entries)
    found = []
    for i, part in enumerate(sources.parts_of(data)):
        amount = _of_part(part, cache)
        found.append(amount._replace(share=entries[i].weight / total, repeats=entries[i].at_end == "wrap") if entries else amount)
    return found


@lru_cache(maxsize=1)
def pystdlib_text_bytes() -> int:
    """About how much text data=pystdlib has, validation included, from file sizes alone."""
    return _in_files(sources.inputs(DataConfig(kind="pystdlib", name="pystdlib"))[0])[0]


def sample(data: DataConfig, max_bytes: int) -> list[str]:
    """Documents, or beginnings of them, from files that are not prepared yet: about `max_bytes` at most; [] of what is not on this disk."""
    texts: list[str] = []
    parts = sources.parts_of(data)
    for part in parts:
        if part.kind in ("pystdlib", "files") and not sources.is_remote(part):
            files, _ = sources.inputs(part)
            count = min(len(files), SAMPLED_FILES)
            for i in range(count):
                texts += _beginning(files[i * len(files) // count], max_bytes // (len(parts) * count))
    return [text for text in texts if text]


def _of_part(data: DataConfig, cache: Path) -> Amount:
    if (corpus := sources.known(data, cache)) is not None:
        return Amount(corpus.name, corpus.text_bytes)
    if isinstance(data, Source):
        return Amount(data.name, data.text_bytes, "what its source says" if data.text_bytes else "")
    if data.kind == "hub":
        if not (data.num_shards and data.shard_text_bytes):
            return Amount(data.name, None)
        return Amount(
            data.name, data.num_shards * data.shard_text_bytes, f"{data.num_shards:,} shards of about {size(data.shard_text_bytes)} of text"
        )
    if sources.is_remote(data):
        return Amount(data.name, None)
    total, how = _in_files(sources.inputs(data)[0])
    return Amount(data.name, (1 - VAL_FRACTION) * total, how)


def _in_files(files: Sequence[Input]) -> tuple[int, str]:
    """Bytes of text in files, and how that was found."""
    total = compressed = 0
    for file in files:
        try:
            n_bytes = file.path.stat().st_size
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror}{hint_for(file.path.absolute())}") from error
        if kind_of(file.path, PARQUET):
            total += read_footer(file.path).text_bytes
        elif kind_of(file.path, COMPRESSED):
            compressed += 1
            total += documents.EXPANSION * n_bytes
        else:
            total += n_bytes
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    packed = "" if not compressed else f", {'it is' if len(files) == 1 else f'{compressed:,} of them'} compressed and taken to hold"
    return total, f"the size of {count}" + (f"{packed} {documents.EXPANSION} times as much" if packed else "")


def _beginning(file: Input, max_bytes: int) -> list[str]:
    """The first documents of a file. Of text the first bytes: a whole file of it would have to be read over first."""
    if kind_of(file.path, (*PLAIN, *CODE)):
        try:
            with file.path.open("rb") as opened:
                return [codecs.decode(opened.read(max_bytes), "utf-8", "ignore")]
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
    return list(_up_to(max_bytes, (found.text for found in documents.read(file) if isinstance(found, Found))))


def _up_to(max_bytes: int, texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield text[:max_bytes]
        max_bytes -= len(text)
        if max_bytes <= 0:
            return
