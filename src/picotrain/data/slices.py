"""Units -> slices -> rows: the documents of some row groups, read as a stream, tokenized and packed a bounded slice at a time.

Without torch; pyarrow is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from picotrain.data.corpus import TEXT, Shard, first_undecodable, opened, raising
from picotrain.data.files import Files
from picotrain.data.packing import Packed, pack, row_dtype
from picotrain.data.units import Unit
from picotrain.errors import DataError

MIN_SLICE_BYTES = 8 << 20  # UTF-8 text that is tokenized and packed at once, unless units are larger by config
READ_BYTES = 1 << 20  # text decoded at once, if documents are of even length


class Encoder(Protocol):
    """What is needed of `picotrain.tokenizer.Tokenizer`; safe to call from several threads."""

    @property
    def bos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode_flat(self, texts: list[str], /) -> tuple[NDArray[Any], NDArray[Any]]: ...


class Slice(NamedTuple):
    """Consecutive documents of a unit, of which a very long one may be a part."""

    texts: list[str]
    docs: list[int]  # the number of each text's document within the unit


class Tokens(NamedTuple):
    """A tokenized slice: text i is ids[offsets[i]:offsets[i + 1]] and belongs to document docs[i] of the unit."""

    ids: NDArray[Any]
    offsets: NDArray[Any]
    docs: NDArray[np.int64]

    @property
    def row_tokens(self) -> int:
        """Tokens of the slice if each document is led by one `<|bos|>`."""
        return int(self.offsets[-1]) + int(np.count_nonzero(np.diff(self.offsets)))

    def pack(self, tokenizer: Encoder, seq_len: int, key: tuple[int, ...] | None) -> Packed:
        """Rows of seq_len + 1 ids by the rule of `picotrain.data.packing`; spans name documents of the unit."""
        packed = pack(self.ids, self.offsets, tokenizer.bos_id, seq_len + 1, key, row_dtype(tokenizer.vocab_size))
        return packed._replace(span_doc=self.docs[packed.span_doc])


def slice_bytes(unit_bytes: int) -> int:
    """The most UTF-8 text of a slice: max(8 MiB, unit_bytes)."""
    return max(MIN_SLICE_BYTES, unit_bytes)


def tokenized(files: Files, shard: Shard, unit: Unit, tokenizer: Encoder, max_bytes: int, skip: int = 0) -> Iterator[Tokens]:
    """The slices of a unit, tokenized, in file order; the first `skip` are read over. No text is held between two slices."""

    def encode(part: Slice) -> Tokens:
        return Tokens(*tokenizer.encode_flat(part.texts), np.array(part.docs, dtype=np.int64))

    return map(encode, islice(cut(documents(files, shard, unit), max_bytes), skip, None))


def documents(files: Files, shard: Shard, unit: Unit) -> Iterator[str]:
    """The documents of a unit in file order, nulls as ""; holds about 1 MiB of text or one document at a time, however
    large the row groups are. Raises DataError, naming shard and row groups, when they cannot be read."""
    groups = range(unit.rg_start, unit.rg_end)
    rows = sum(shard.row_groups[rg].rows for rg in groups)
    batch_rows = max(1, min(rows, READ_BYTES * rows // max(1, unit.text_bytes)))
    seen = 0
    with files.hold(shard) as path, raising(lambda why: DataError(f"{path}, {_place(shard, unit, seen)} cannot be read: {why}")):
        with opened(path) as file:
            for batch in file.iter_batches(batch_rows, row_groups=list(groups), columns=[TEXT], use_threads=False):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError:
                    seen += first_undecodable(batch.column(0))
                    raise OSError("its text is not valid UTF-8") from None
                for text in texts:
                    seen += 1
                    yield text or ""
        if seen != rows:
            raise OSError(f"the footer promised {rows:,} documents in these row groups, and there are {seen:,}")


def _place(shard: Shard, unit: Unit, document: int) -> str:
    """Where document number `document` of a unit stands."""
    for rg in range(unit.rg_start, unit.rg_end):
        if document < shard.row_groups[rg].rows:
            return f"row group {rg}, document {document}"
        document -= shard.row_groups[rg].rows
    return f"row group {unit.rg_end - 1}, its end"


def cut(texts: Iterable[str], max_bytes: int) -> Iterator[Slice]:
    """Consecutive documents, as many as stay within max_bytes (at least 4) of UTF-8 text; a longer document is cut at
    character boundaries into pieces of max_bytes and a last one, which keep its number. A slice has no document twice."""
    held = Slice([], [])
    held_bytes = 0

    def hand_over() -> Slice:  # so that no text stays here while the consumer is at work
        nonlocal held, held_bytes
        full, held, held_bytes = held, Slice([], []), 0
        return full

    for doc, text in enumerate(texts):
        for piece in _pieces(text, max_bytes):
            piece_bytes = utf8_bytes(piece)
            if held.texts and held_bytes + piece_bytes > max_bytes:
                yield hand_over()
            held.texts.append(piece)
            held.docs.append(doc)
            held_bytes += piece_bytes
    if held.texts:
        yield hand_over()


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _pieces(text: str, max_bytes: int) -> Iterator[str]:
    if utf8_bytes(text) <= max_bytes:
        yield text
        return
    raw = text.encode()
    start = 0
    while start < len(raw):
        end = min(start + max_bytes, len(raw))
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # in the middle of a character
            end -= 1
        yield raw[start:end].decode()
        start = end
