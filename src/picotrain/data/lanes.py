"""Lanes: a fixed number of independent, resumable readers of units. Without torch.

The U units of epoch e stand in the order permutation(U, seed, e); all epochs laid end to end form one endless
sequence of positions. Lane l of L takes positions l, l + L, l + 2L, ... and row g of the run comes from lane g mod L,
so that the order of rows depends on seed and config alone. Of the rows of a step, dp_rank r of W takes those with
i mod W == r: where W divides L and the rows of a step, these are the rows of the lanes l with l mod W == r.

The state of a stream is {"row": g, "lanes_count": L, "lanes": [[position, slice, row, rows] | null, ...]}: plain
JSON. A rank knows its own lanes only; `merge_states` makes one state of all ranks', from which any W goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from numpy.typing import NDArray

from picotrain.data.corpus import Corpus, Unit, units
from picotrain.data.packing import permutation
from picotrain.data.slices import Encoder, slice_bytes, tokenized
from picotrain.errors import DataError

State = dict[str, Any]


class Cursor(NamedTuple):
    """Where a lane stands: its next row is `row` of slice `slice` of the unit at `position` or, where the slice's
    `rows` are used up, the first one after it. rows is 0 until a slice was opened."""

    position: int
    slice: int = 0
    row: int = 0
    rows: int = 0


class SliceRows(NamedTuple):
    """The packed rows of one slice, at least one."""

    position: int
    slice: int
    rows: NDArray  # (n, seq_len + 1)


class Stream:
    """What all lanes share: corpus, order and packing, but no place in them. Safe to use from several threads."""

    def __init__(self, corpus: Corpus, tokenizer: Encoder, seq_len: int, unit_bytes: int, lanes: int, seed: int):
        self.corpus, self.tokenizer, self.seq_len, self.lanes, self.seed = corpus, tokenizer, seq_len, lanes, seed
        self.units = units(corpus.shards, unit_bytes)
        self.slice_bytes = slice_bytes(unit_bytes)
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(len(self.units), seed, epoch))
        self._rowless: set[int] = set()  # units without a full row, in whatever order they are packed

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index into `units`) of a position."""
        epoch, place = divmod(position, len(self.units))
        return epoch, int(self._order(epoch)[place])

    def unit(self, position: int) -> Unit:
        return self.units[self.at(position)[1]]

    def slices_from(self, cursor: Cursor) -> Iterator[SliceRows]:
        """A lane's slices from the first with a row left on, packed; endless. What holds no full row is passed over."""
        used_up = cursor.row == cursor.rows > 0
        first = cursor.slice + used_up
        for position in count(cursor.position, self.lanes):
            yield from self._unit_slices(position, first)
            first = 0

    def slice_share(self, position: int, number: int) -> tuple[float, float]:
        """Where a slice begins and ends, as shares of its unit; estimated from the footer's bytes."""
        num_slices = max(1, math.ceil(self.unit(position).text_bytes / self.slice_bytes))
        return min(1.0, number / num_slices), min(1.0, (number + 1) / num_slices)

    def _unit_slices(self, position: int, first: int) -> Iterator[SliceRows]:
        epoch, index = self.at(position)
        if index in self._rowless:
            return
        unit = self.units[index]
        parts = tokenized(self.corpus.root, self.corpus.shards[unit.shard], unit, self.tokenizer, self.slice_bytes, skip=first)
        number, found = first, first > 0
        for tokens in parts:
            rows = tokens.pack(self.tokenizer, self.seq_len, (self.seed, epoch, index, number)).rows
            del tokens  # while this waits for its consumer, the rows are all that is held
            if len(rows):
                found = True
                yield SliceRows(position, number, rows)
            number += 1
        if not found:
            self._rowless.add(index)
            if len(self._rowless) == len(self.units):
                raise DataError(too_short(self.corpus, self.seq_len))


class Lane:
    """One reader of a stream. `pool` prepares its next slice when the share `prefetch_at` of the present one is used."""

    def __init__(self, stream: Stream, cursor: Cursor, pool: Executor, prefetch_at: float):
        self._stream, self._pool, self._prefetch_at = stream, pool, prefetch_at
        self._slices = stream.slices_from(cursor)
        self._rows: NDArray | None = None  # (n, seq_len + 1), of the slice at the cursor
        self._ahead: Future[SliceRows] | None = None
        self._stand_at(cursor)

    @property
    def progress(self) -> float:
        """How many units the lane has used up, the present one counted by its share."""
        return self._before + self.cursor.row * self._per_row

    def open(self) -> None:
        """Have the first slice prepared, without waiting for it."""
        if self._rows is None:
            self._request()

    def next_row(self) -> NDArray:
        """The next row, seq_len + 1 ids; the cursor then stands behind it."""
        if self._rows is None or self.cursor.row == self.cursor.rows:
            self._rows = self._next_slice()
        position, number, row, rows = self.cursor
        self.cursor = Cursor(position, number, row + 1, rows)
        if row + 1 >= self._prefetch_at * rows:
            self._request()
        return self._rows[row]

    def _stand_at(self, cursor: Cursor) -> None:
        self.cursor = cursor
        start, end = self._stream.slice_share(cursor.position, cursor.slice)
        self._before = cursor.position // self._stream.lanes + start
        self._per_row = (end - start) / max(1, cursor.rows)

    def _request(self) -> None:
        if self._ahead is None:
            self._ahead = self._pool.submit(next, self._slices)

    def _next_slice(self) -> NDArray:
        self._request()
        assert self._ahead is not None
        position, number, rows = self._ahead.result()
        self._ahead = None
        at = self.cursor
        if at.row == at.rows:
            self._stand_at(Cursor(position, number, 0, len(rows)))
        elif (position, number, len(rows)) != (at.position, at.slice, at.rows):  # resumed in the middle of a slice
            raise DataError(
                f"the checkpoint goes on at row {at.row} of {at.rows} in slice {at.slice} of position {at.position}, but "
                f"slice {number} of position {position} comes next and has {len(rows)} rows; the corpus or the tokenizer changed since"
            )
        return rows


def start_state(lanes: int) -> State:
    """The state before the first row."""
    return {"row": 0, "lanes_count": lanes, "lanes": [list(Cursor(lane)) for lane in range(lanes)]}


def merge_states(states: Sequence[State]) -> State:
    """One state of what the ranks know, each its own lanes, after the same row."""
    if len({(state["row"], state["lanes_count"]) for state in states}) != 1:
        raise ValueError(f"states of different rows cannot be merged: {[state['row'] for state in states]}")
    known = zip(*(state["lanes"] for state in states), strict=True)
    merged = [next((cursor for cursor in cursors if cursor is not None), None) for cursors in known]
    if None in merged:
        raise ValueError(f"no rank's state knows lane {merged.index(None)}; states of all ranks are needed")
    return {**states[0], "lanes": merged}


def check_lanes(lanes: int, num_units: int, dp_size: int, rows_per_step: int) -> None:
    """Raise DataError where the lanes do not fit the corpus or dp_size does not divide the lanes and the rows of a step."""
    if lanes > num_units:
        raise DataError(f"data.lanes={lanes}: each lane needs a unit and the corpus has {num_units}; at most {num_units} lanes work")
    if lanes % dp_size:
        below = max(n for n in range(1, dp_size + 1) if lanes % n == 0)
        above = min((n for n in range(dp_size, lanes + 1) if lanes % n == 0), default=None)
        nearest = f"{below}" + (f" and {above}" if above else "")
        raise DataError(f"dp_size {dp_size} does not divide the {lanes} lanes of the data stream; the nearest that does: {nearest}")
    if rows_per_step % dp_size:
        below = rows_per_step // dp_size * dp_size
        nearest = f"{below} and {below + dp_size}" if below else f"{dp_size}"
        raise DataError(f"dp_size {dp_size} does not divide the {rows_per_step} rows of a step; the nearest that it does: {nearest}")


def has_full_row(corpus: Corpus, tokenizer: Encoder, seq_len: int, unit_bytes: int) -> bool:
    """Whether the training shards yield at least one row. Reads until it finds one: mostly a single slice."""
    for unit in units(corpus.shards, unit_bytes):
        for tokens in tokenized(corpus.root, corpus.shards[unit.shard], unit, tokenizer, slice_bytes(unit_bytes)):
            if tokens.row_tokens > seq_len:
                return True
    return False


def too_short(corpus: Corpus, seq_len: int) -> str:
    """What to tell a user whose corpus has no full row."""
    size = f"{corpus.documents:,} training documents, {corpus.text_bytes:,} bytes"
    return f"{corpus.root} ({size}): no unit of it fills a row of {seq_len + 1} tokens; take a smaller train.seq_len or more text"
