"""Lanes: a fixed number of independent, resumable readers of units. Without torch.

(seed, e) gives the order of the U units of epoch e. All epochs laid end to end form one endless sequence of positions.
`picotrain.data.shares` says what each of the L lanes takes of an epoch: as many rows as the others, within one. Row g of the run comes
from lane g mod L. So the order of rows depends on seed and config alone. Of the rows of a step, dp_rank r of W takes those with
i mod W == r. W divides L and the rows of a step, so these are the rows of the lanes l with l mod W == r.

In a mixture every lane reads all sources, and has a cursor for each. `picotrain.data.mixture` says which source gives the next row.

The state of a stream is plain JSON: {"row": g, "lanes_count": L, "lanes": [[[position, slice, row, rows] of each source] | null, ...]}.
A rank knows its own lanes only. `merge_states` makes one state of all ranks' states, from which any W goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from picotrain.config.schema import LEAST_SEQ_LEN
from picotrain.data.corpus import Corpus, OnBad, Shard
from picotrain.data.mixture import Choice, Source
from picotrain.data.shares import Shares, Sharing, Turn, part
from picotrain.data.slices import Encoder, Tokens, slice_bytes, tokenized
from picotrain.data.units import Unit, units
from picotrain.errors import DataError

State = dict[str, Any]


class Cursor(NamedTuple):
    """Where a lane stands in one source: at the unit `position`, in slice `slice` of it.

    The lane takes `rows` rows of that slice, and `row` is the next one. Where row == rows, the next row is the first one behind them.
    rows is 0 until a slice was opened."""

    position: int
    slice: int = 0
    row: int = 0
    rows: int = 0


OUT = Cursor(-1)  # in a lane that has seen the end of a source that is read once


class SliceRows(NamedTuple):
    """The packed rows of one slice that a lane takes, at least one."""

    position: int
    slice: int
    rows: NDArray[Any]  # (n, seq_len + 1)


class Stream:
    """One source as all lanes share it: corpus, order and packing, but no place in it. Safe to use from several threads.

    on_bad: called with the error where a unit cannot be read. The rest of that unit is then passed over. None: the error is raised.
    kept: how many shared units stay packed, so that the lanes of one process make each of them once.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Encoder,
        seq_len: int,
        unit_bytes: int,
        lanes: int,
        seed: int,
        on_bad: OnBad | None = None,
        sharing: Sharing = "even",
        kept: int = 0,
    ):
        self.corpus, self.repeat, self._counted = source.corpus, source.repeat, source.rows
        self.tokenizer, self.seq_len, self.lanes, self.seed = tokenizer, seq_len, lanes, seed
        self.units = units(source.corpus.shards, unit_bytes)
        self.slice_bytes = slice_bytes(unit_bytes)
        if source.rows is not None and len(source.rows) != len(self.units):
            raise DataError(f"{source.corpus.name}: the rows of {len(source.rows):,} units were counted, and there are {len(self.units):,}")
        sizes = self.units.text_bytes if source.rows is None else np.array([sum(rows) for rows in source.rows], np.int64)
        self.shares = Shares(self.units, sizes, lanes, seed, sharing)
        if self.shares.empty:
            raise DataError(too_short(self.corpus, seq_len))
        self._on_bad, self._kept = on_bad, kept
        self._rowless: set[int] = set()  # units without a full row, in whatever order they are packed
        self._bad: set[int] = set()  # units that cannot be read
        self._shared: dict[tuple[int, int], Future[list[tuple[int, NDArray[Any]]]]] = {}  # by epoch and unit: its packed slices
        self._lock = Lock()

    def unit(self, position: int) -> Unit:
        """The unit at a position."""
        return self.units[self.shares.at(position)[1]]

    def passed_over(self, position: int) -> bool:
        """Whether the unit at a position could not be read, so that some of its rows are missing."""
        return self.shares.at(position)[1] in self._bad

    def slices_from(self, lane: int, cursor: Cursor) -> Iterator[SliceRows]:
        """A lane's packed slices, from the first one that has a row left. A slice without a full row is passed over. Endless, but for
        a source that is read once."""
        used_up = cursor.row == cursor.rows > 0
        first = cursor.slice + used_up
        for turn in self.shares.turns(lane, cursor.position):
            if turn.position >= len(self.units) and not self.repeat:
                return
            yield from self._turn_slices(turn, first if turn.position == cursor.position else 0)

    def used(self, lane: int, cursor: Cursor) -> tuple[float, float]:
        """Passes over the lane's share at the beginning and at the end of its part of the slice at a cursor."""
        turn = next(self.shares.turns(lane, cursor.position))
        bounds = self._bounds(self.shares.at(turn.position)[1])
        number = cursor.slice if turn.position == cursor.position else 0
        edges = [min(max(bounds[min(k, len(bounds) - 1)], turn.first), turn.last) for k in (number, number + 1)]
        begun, ended = ((edge - turn.first) / max(1, turn.last - turn.first) for edge in edges)
        return self.shares.used(lane, turn, begun), self.shares.used(lane, turn, ended)

    def shards_from(self, position: int, most: int) -> list[Shard]:
        """The next shards that the stream will want from a position on, at most `most` of them."""
        wanted: dict[int, None] = {}
        for index in self.shares.indices_from(position, self.repeat):
            if len(wanted) == most:
                break
            wanted[self.units[index].shard] = None
        return [self.corpus.shards[index] for index in wanted]

    def _bounds(self, index: int) -> Sequence[int]:
        """Where a unit's slices begin and end, by its size. Estimated from the footer's bytes where the rows were not counted."""
        if self._counted is not None:
            return [0, *accumulate(self._counted[index])]
        size = self.shares.size(index)
        num_slices = max(1, math.ceil(size / self.slice_bytes))
        return [size * number // num_slices for number in range(num_slices + 1)]

    def _turn_slices(self, turn: Turn, first: int) -> Iterator[SliceRows]:
        epoch, index = self.shares.at(turn.position)
        bounds = self._bounds(index)
        if index in self._rowless:
            return
        if len(bounds) == 2 and turn.last - turn.first < bounds[1] and self._kept:
            slices: Iterator[tuple[int, NDArray[Any]]] = iter(
                [(number, rows) for number, rows in self._once(epoch, index) if number >= first]
            )
        else:
            while first < len(bounds) - 2 and bounds[first + 1] <= turn.first:
                first += 1  # another lane's, which need not be tokenized
            slices = self._packed(epoch, index, first)
        for number, rows in slices:
            a, b = part(turn, bounds, number, len(rows))
            if a < b:
                yield SliceRows(turn.position, number, rows[a:b])
            del rows  # while this waits for its consumer, what it takes is all that is held
            if number + 1 < len(bounds) - 1 and turn.last <= bounds[number + 1]:
                return

    def _once(self, epoch: int, index: int) -> list[tuple[int, NDArray[Any]]]:
        """The packed slices of a unit that neighbouring lanes share, made by the first that asks."""
        key = (epoch, index)
        with self._lock:
            found = self._shared.get(key)
            if mine := found is None:
                found = self._shared[key] = Future()
                if len(self._shared) > self._kept:
                    del self._shared[next(iter(self._shared))]
        if mine:
            try:
                found.set_result(list(self._packed(epoch, index, 0)))
            except BaseException as error:
                found.set_exception(error)
        return found.result()

    def _packed(self, epoch: int, index: int, first: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Number and rows of a unit's slices from `first` on."""
        number, found = first, first > 0
        try:
            for tokens in self._tokens(self.units[index], first):
                rows = tokens.pack(self.tokenizer, self.seq_len, (self.seed, epoch, index, number)).rows
                del tokens  # while this waits for its consumer, the rows are all that is held
                found |= len(rows) > 0
                yield number, rows
                del rows
                number += 1
        except DataError as error:
            if self._on_bad is None:
                raise
            self._bad.add(index)
            self._on_bad(error)
        if not found:
            self._rowless.add(index)
            if len(self._rowless) == len(self.units):
                raise DataError(too_short(self.corpus, self.seq_len))

    def _tokens(self, unit: Unit, skip: int) -> Iterator[Tokens]:
        return tokenized(self.corpus.files, self.corpus.shards[unit.shard], unit, self.tokenizer, self.slice_bytes, skip)


class Reader:
    """One lane's place in one source. `pool` prepares the next slice once the share `prefetch_at` of the present one is used."""

    def __init__(self, stream: Stream, lane: int, cursor: Cursor, pool: Executor, prefetch_at: float):
        self.stream, self._lane, self._pool, self._prefetch_at = stream, lane, pool, prefetch_at
        self._slices = stream.slices_from(lane, cursor)
        self._rows: NDArray[Any] | None = None  # (n, seq_len + 1), of the slice at the cursor
        self._ahead: Future[SliceRows | None] | None = None
        self.cursor = cursor
        if not self.is_out:
            self._stand_at(cursor)

    @property
    def progress(self) -> float:
        """Passes over the lane's share of the source: 1.25 is a quarter of the second one."""
        return 1.0 if self.is_out else self._before + self.cursor.row * self._per_row

    @property
    def is_out(self) -> bool:
        """Whether the source was read once and has left the lane."""
        return self.cursor == OUT

    def open(self) -> None:
        """Have the first slice prepared, without waiting for it."""
        if self._rows is None and not self.is_out:
            self._request()

    def next_row(self) -> NDArray[Any] | None:
        """The next row, seq_len + 1 ids; the cursor then stands behind it. None: a source that is read once has no more."""
        if self._rows is None or self.cursor.row == self.cursor.rows:
            rows = None if self.is_out else self._next_slice()
            if rows is None:
                self.cursor = OUT
                return None
            self._rows = rows
        position, number, row, rows = self.cursor
        self.cursor = Cursor(position, number, row + 1, rows)
        if row + 1 >= self._prefetch_at * rows:
            self._request()
        return self._rows[row]

    def _stand_at(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self._before, end = self.stream.used(self._lane, cursor)
        self._per_row = (end - self._before) / max(1, cursor.rows)

    def _request(self) -> None:
        if self._ahead is None:
            self._ahead = self._pool.submit(next, self._slices, None)

    def _next_slice(self) -> NDArray[Any] | None:
        self._request()
        assert self._ahead is not None
        found = self._ahead.result()
        self._ahead = None
        if found is None:
            return None
        position, number, rows = found
        at = self.cursor
        is_there = (position, number, len(rows)) == (at.position, at.slice, at.rows)  # resumed in the middle of a slice
        if at.row == at.rows or (not is_there and self.stream.passed_over(at.position)):
            self._stand_at(Cursor(position, number, 0, len(rows)))
        elif not is_there:
            raise DataError(
                f"the checkpoint goes on at row {at.row} of {at.rows} in slice {at.slice} of position {at.position}, but "
                f"slice {number} of position {position} comes next and has {len(rows)} rows; the corpus or the tokenizer changed since"
            )
        return rows


class Lane:
    """One lane: its rows, drawn from its readers, one for each source. rows: how many it has given."""

    def __init__(self, readers: Sequence[Reader], choice: Choice, rows: int):
        self.readers, self._choice, self._rows = list(readers), choice, rows
        self.source = 0  # of the last row
        for source, reader in enumerate(self.readers):
            if reader.is_out:
                choice.leave(source)

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """A cursor for each source."""
        return tuple(reader.cursor for reader in self.readers)

    @property
    def progress(self) -> tuple[float, ...]:
        """Passes over the lane's share of each source."""
        return tuple(reader.progress for reader in self.readers)

    def open(self) -> None:
        """Have the slice of the next row prepared, without waiting for it."""
        self.readers[self._choice.source(self._rows)].open()

    def next_row(self) -> NDArray[Any]:
        """The next row, seq_len + 1 ids. Raises DataError when every source was read once and none repeats."""
        while True:
            self.source = self._choice.source(self._rows)
            row = self.readers[self.source].next_row()
            if row is not None:
                self._rows += 1
                return row
            if not self._choice.leave(self.source):
                raise DataError("every source of the data was read once, and none repeats; let one of them: data.mixture's at_end=wrap")


def start_state(lanes: int, sources: int = 1) -> State:
    """The state before the first row."""
    return {"row": 0, "lanes_count": lanes, "lanes": [[list(Cursor(0))] * sources for _ in range(lanes)]}


def merge_states(states: Sequence[State]) -> State:
    """One state of the ranks' states, which stand behind the same row. Each rank knows its own lanes."""
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
        raise DataError(f"data.lanes={lanes}: each lane needs a unit and there are {num_units}; at most {num_units} lanes work")
    if lanes % dp_size:
        below = max(n for n in range(1, dp_size + 1) if lanes % n == 0)
        above = min((n for n in range(dp_size, lanes + 1) if lanes % n == 0), default=None)
        nearest = f"{below}" + (f" and {above}" if above else "")
        raise DataError(f"dp_size {dp_size} does not divide the {lanes} lanes of the data stream; the nearest that does: {nearest}")
    if rows_per_step % dp_size:
        below = rows_per_step // dp_size * dp_size
        nearest = f"{below} and {below + dp_size}" if below else f"{dp_size}"
        raise DataError(f"dp_size {dp_size} does not divide the {rows_per_step} rows of a step; the nearest that it does: {nearest}")


def has_full_row(corpus: Corpus, tokenizer: Encoder, seq_len: int, unit_bytes: int, on_bad: OnBad | None = None) -> bool:
    """Whether the training shards yield at least one row. Reads until it finds one: mostly a single slice. `on_bad` is told of a
    unit that cannot be read, and the unit is passed over. None: the error is raised."""
    for unit in units(corpus.shards, unit_bytes):
        try:
            for tokens in tokenized(corpus.files, corpus.shards[unit.shard], unit, tokenizer, slice_bytes(unit_bytes)):
                if tokens.row_tokens > seq_len:
                    return True
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return False


def too_short(corpus: Corpus, seq_len: int) -> str:
    """What to tell a user whose corpus has no full row."""
    size = f"{corpus.documents:,} training documents, {corpus.text_bytes:,} bytes"
    return f"{corpus.root} ({size}): no readable unit of it fills a row of {seq_len + 1} tokens; {remedy(seq_len)}"


def remedy(seq_len: int) -> str:
    """What helps where no row is full."""
    return "take a smaller train.seq_len or more text" if seq_len > LEAST_SEQ_LEN else "take more text"
