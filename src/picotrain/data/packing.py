"""Documents -> rows: no padding, every row led by `<|bos|>`, nearly every token used. numpy only.

The rule is applied to one slice of the corpus at a time. Documents stand in an order, and `<|bos|>` leads each of them. A row of
`seq_len + 1` slots is filled piece by piece. The largest piece that fits goes in, of equal ones the first in the order. Where none
fits, the first piece in the order is split: it fills the row, and its rest goes back to the pool under its old rank, with a `<|bos|>`
of its own. With one slot left this puts a lone `<|bos|>` there: the true next token after a document's end. Only an incomplete last
row is dropped. This is best-fit packing after Ding et al. 2024, "Fewer Truncations Improve Language Modeling", but split pieces
are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DOCUMENTS, ROWS = 0, 1  # what a permutation of a slice is for: the last part of its key

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Packed(NamedTuple):
    """Rows, and the spans that each is made of. Row i holds the spans span_ptr[i] to span_ptr[i + 1], in order.

    A span is `<|bos|>` and then `span_len` tokens of document `span_doc`, from its token `span_first` on. The sum of 1 + span_len over
    a row is row_len."""

    rows: NDArray[Any]  # (n, row_len) uint16 or uint32
    span_ptr: NDArray[np.int64]  # (n + 1,)
    span_doc: NDArray[np.int64]  # (spans,) index into the documents that were packed
    span_first: NDArray[np.int64]  # (spans,) first token, counted from the document's start, without `<|bos|>`
    span_len: NDArray[np.int64]  # (spans,) tokens, without `<|bos|>`; 0 for a lone `<|bos|>` that ends a row
    dropped_tokens: int  # text tokens of the incomplete last row, in no row


def row_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type of rows that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on `key` alone, the same on every machine and with every numpy version.

    Sorts the indices by the outputs of splitmix64 (Steele, Lea and Flood 2014), seeded by the key; they are distinct.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part + _GOLDEN) & _MASK))
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(_mix(state + steps), kind="stable").astype(np.int64, copy=False)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function, a bijection on 64 bits. Arrays wrap around silently, as it needs."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def pack(
    ids: NDArray[Any], offsets: NDArray[np.int64], bos_id: int, row_len: int, key: tuple[int, ...] | None, dtype: type[np.unsignedinteger]
) -> Packed:
    """Pack documents into rows of `row_len` (at least 2) ids by the rule above; empty documents are left out.

    ids: all documents' tokens, one after the other. Document d is ids[offsets[d]:offsets[d + 1]].
    key: documents are packed in the order permutation(n, *key, DOCUMENTS). Rows come out in the order permutation(rows, *key, ROWS), so
    that long documents do not come first. None keeps both orders as they are.
    """
    lengths = np.diff(offsets)  # tokens of each document
    order = _order(lengths, key)
    ranks, taken, left = (np.array(column, dtype=np.int64) for column in _place(lengths[order].tolist(), row_len))

    ends = np.cumsum(taken + 1)  # where each span ends if rows stand one after the other
    num_rows = int(ends[-1]) // row_len if len(ends) else 0
    kept = int(np.searchsorted(ends, num_rows * row_len, side="right"))
    dropped_tokens = int(taken[kept:].sum())
    docs, taken, left = order[ranks[:kept]], taken[:kept], left[:kept]
    row_of_span = (ends[:kept] - 1) // row_len
    if key is not None:
        place_of_row = np.argsort(permutation(num_rows, *key, ROWS))
        row_of_span = place_of_row[row_of_span]
        emitted = np.argsort(row_of_span, kind="stable")
        docs, taken, left, row_of_span = docs[emitted], taken[emitted], left[emitted], row_of_span[emitted]
    first = lengths[docs] - left
    rows = np.empty((num_rows, row_len), dtype)
    _copy(ids, (offsets[docs] + first).tolist(), taken.tolist(), bos_id, rows.reshape(-1))
    span_ptr = np.searchsorted(row_of_span, np.arange(num_rows + 1))
    return Packed(rows, span_ptr, docs, first, taken, dropped_tokens)


def count_rows(lengths: NDArray[Any], row_len: int, key: tuple[int, ...] | None) -> int:
    """How many rows `pack` makes of documents of these many tokens."""
    _, taken, _ = _place(lengths[_order(lengths, key)].tolist(), row_len)
    return (sum(taken) + len(taken)) // row_len


def _order(lengths: NDArray[Any], key: tuple[int, ...] | None) -> NDArray[np.int64]:
    """The order in which documents are packed; those without a token are left out."""
    order = np.arange(len(lengths)) if key is None else permutation(len(lengths), *key, DOCUMENTS)
    return order[lengths[order] > 0]


def concatenate(parts: list[Packed], max_rows: int | None = None) -> Packed:
    """The first `max_rows` rows (None: all) of one or more parts, one after the other; `dropped_tokens` is that of all parts."""
    rows = np.concatenate([part.rows for part in parts])[:max_rows]
    spans_before = np.cumsum([0] + [len(part.span_doc) for part in parts])
    starts = [part.span_ptr[:-1] + before for part, before in zip(parts, spans_before, strict=False)]
    span_ptr = np.concatenate([*starts, spans_before[-1:]])[: len(rows) + 1]
    columns = ([getattr(part, name) for part in parts] for name in ("span_doc", "span_first", "span_len"))
    doc, first, length = (np.concatenate(column)[: span_ptr[-1]] for column in columns)
    return Packed(rows, span_ptr, doc, first, length, sum(part.dropped_tokens for part in parts))


def _place(left: list[int], row_len: int) -> tuple[list[int], list[int], list[int]]:
    """The packing rule on lengths alone. left: tokens of each document (without `<|bos|>`), in rank order, all > 0.

    Returns, span by span in the order of rows: the document's rank, the tokens taken, the tokens it had left before.
    A row is full whenever the sum of 1 + taken is a multiple of row_len; the last one may not be.
    """
    # Stacks of pieces that can fit a row, by length, the lowest rank on top. `lengths` has a bit for each stack that is not empty.
    # A rest has the lowest rank of all, since its document was the first in the order. So putting it on top keeps the order.
    stacks: list[list[int]] = [[] for _ in range(row_len)]
    for rank in range(len(left) - 1, -1, -1):
        if left[rank] < row_len:
            stacks[left[rank]].append(rank)
    lengths = sum(1 << length for length, stack in enumerate(stacks) if stack)
    ranks: list[int] = []
    taken: list[int] = []
    had: list[int] = []
    first = 0  # no document of a lower rank has tokens left
    room = row_len
    while True:
        take = (lengths & ((1 << room) - 1)).bit_length() - 1  # the longest piece that leaves a slot for its <|bos|>
        if take > 0:
            rank = stacks[take].pop()
            if not stacks[take]:
                lengths ^= 1 << take
            ranks.append(rank)
            had.append(take)
            left[rank] = 0
        else:
            while first < len(left) and not left[first]:
                first += 1
            if first == len(left):
                return ranks, taken, had
            length, take = left[first], room - 1
            ranks.append(first)
            had.append(length)
            if length < row_len:
                stacks[length].pop()
                if not stacks[length]:
                    lengths ^= 1 << length
            left[first] = length = length - take
            if length < row_len:
                stacks[length].append(first)
                lengths |= 1 << length
        taken.append(take)
        room = room - 1 - take or row_len


def _copy(ids: NDArray[Any], starts: list[int], lengths: list[int], bos_id: int, out: NDArray[Any]) -> None:
    """Write `<|bos|>` and ids[start:start + length] for each span, one after the other, into flat `out`.

    It copies slices instead of gathering by an index: up to three times as fast at these lengths, and no index of 8 bytes a token."""
    at = 0
    for start, length in zip(starts, lengths, strict=True):
        end = at + 1 + length
        out[at] = bos_id
        out[at + 1 : end] = ids[start : start + length]
        at = end
