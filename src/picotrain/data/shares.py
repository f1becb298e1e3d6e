"""How the lanes share an epoch: whole units as long as that comes out even, then parts of units. Without torch.

A lane gives a row whenever its turn comes. With whole units alone, a lane with fewer rows would be in the next epoch while the others
still read this one. Therefore every lane gets the same share of each epoch. The epoch's units, in their order, are dealt out one by
one while no lane gets more than its share. What is left is laid end to end and cut into what each lane still lacks. Both lanes of a
cut unit pack it, and each takes its rows.

A unit's size is the number of its rows where they were counted (`picotrain.data.counts`), else the bytes of its text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Literal, NamedTuple

from picotrain.data.units import Units

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# dealt: whole units alone, and each lane goes on with the next epoch when it likes; how runs were begun before lanes had even shares.
Sharing = Literal["even", "dealt"]
MAX_SIZE = 1 << 40  # of a unit: their sum stays within 64 bits


class Turn(NamedTuple):
    """What a lane takes of the unit at `position`: the part [first, last) of its size."""

    position: int
    first: int
    last: int


class _Epoch(NamedTuple):
    """An epoch as the lanes share it."""

    order: NDArray[np.int64]  # indices of units, by place
    targets: NDArray[np.int64]  # (lanes,) each lane's share
    dealt: int  # places below it are dealt out whole
    starts: NDArray[np.int64]  # (lanes,) where each lane's part of the rest begins
    ends: NDArray[np.int64]  # (rest,) where each unit of the rest ends


class Shares:
    """Which lane takes what of a source, epoch after epoch. (Sizes, lanes, seed) alone decide.

    Position p is place p mod U of epoch p div U, for U units; a lane's turns have rising positions, each once. sizes: of each unit;
    units of size 0 are left out. Safe to use from several threads.
    """

    def __init__(self, units: Units, sizes: Sequence[int] | NDArray[np.int64], lanes: int, seed: int, sharing: Sharing = "even"):
        import numpy as np

        self.units, self.lanes, self._seed, self._sharing = units, lanes, seed, sharing
        self._sizes = np.minimum(np.asarray(sizes, np.int64), MAX_SIZE)
        # Neighbours share units. The lanes of one rank have the same number mod 2, 4, 8, ..., so these are made neighbours.
        self._neighbours = np.array(sorted(range(lanes), key=lambda lane: f"{lane:032b}"[::-1]))
        self._epoch = lru_cache(maxsize=2)(self._share)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to share."""
        return self._sharing == "even" and not self._sizes.any()

    def size(self, index: int) -> int:
        """Of a unit, by index."""
        return int(self._sizes[index])

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index into `units`) of a position."""
        epoch, place = divmod(position, len(self.units))
        return epoch, int(self._epoch(epoch).order[place])

    def indices_from(self, position: int, repeat: bool) -> Iterator[int]:
        """The units from a position on, by index; an epoch's worth of them, or to the end of the first where nothing is repeated."""
        num_units = len(self.units)
        epoch, place = divmod(position, num_units)
        if repeat or epoch == 0:
            yield from map(int, self._epoch(epoch).order[place:])
        if repeat and place:
            yield from map(int, self._epoch(epoch + 1).order[:place])

    def turns(self, lane: int, position: int) -> Iterator[Turn]:
        """A lane's turns from `position` on, without end."""
        if self._sharing == "dealt":
            for place in count(position + (lane - position) % self.lanes, self.lanes):
                yield Turn(place, 0, self.size(self.at(place)[1]))
        first_epoch, place = divmod(position, len(self.units))
        for epoch in count(first_epoch):
            yield from self._turns_of_epoch(lane, epoch, place)
            place = 0

    def used(self, lane: int, turn: Turn, share: float) -> float:
        """Passes over the lane's share when `share` of a turn is used up."""
        epoch, place = divmod(turn.position, len(self.units))
        if self._sharing == "dealt":
            return (turn.position // self.lanes + share) * self.lanes / len(self.units)
        found = self._epoch(epoch)
        if place < found.dealt:
            before = int(self._sizes[found.order[lane : place : self.lanes]].sum())
        else:
            dealt = int(self._sizes[found.order[lane : found.dealt : self.lanes]].sum())
            before = dealt + max(0, self._start_of(found, place) - int(found.starts[lane]))
        return epoch + (before + share * (turn.last - turn.first)) / int(found.targets[lane])

    def _turns_of_epoch(self, lane: int, epoch: int, place: int) -> Iterator[Turn]:
        found = self._epoch(epoch)
        position = epoch * len(self.units)
        for dealt in range(place + (lane - place) % self.lanes, found.dealt, self.lanes):
            yield Turn(position + dealt, 0, self.size(found.order[dealt]))
        start = int(found.starts[lane])
        dealt = int(self._sizes[found.order[lane : found.dealt : self.lanes]].sum())
        end = start + int(found.targets[lane]) - dealt
        if start == end:
            return
        rest = max(place - found.dealt, bisect_right(found.ends, start))
        while rest < len(found.ends) and (begin := self._start_of(found, found.dealt + rest)) < end:
            yield Turn(position + found.dealt + rest, max(start - begin, 0), min(end, int(found.ends[rest])) - begin)
            rest += 1

    def _start_of(self, found: _Epoch, place: int) -> int:
        """Where a unit of the rest begins."""
        return int(found.ends[place - found.dealt - 1]) if place > found.dealt else 0

    def _share(self, epoch: int) -> _Epoch:
        import numpy as np

        order, lanes = self.units.order(self._seed, epoch), self.lanes
        if self._sharing == "dealt":
            nothing = np.zeros(0, np.int64)
            return _Epoch(order, nothing, len(order), nothing, nothing)
        order = order[self._sizes[order] > 0]
        sizes = self._sizes[order]
        total = int(sizes.sum())
        # Row g comes from lane g mod lanes: a lane's share of an epoch is how many of its rows are the lane's.
        begun = epoch * total % lanes
        targets = (begun + total + np.arange(lanes)[::-1]) // lanes - (begun + np.arange(lanes)[::-1]) // lanes
        cycles = len(order) // lanes
        held = np.cumsum(sizes[: cycles * lanes].reshape(cycles, lanes), axis=0)  # (cycles, lanes)
        whole = int((held <= targets).all(axis=1).sum())
        lacks = targets - (held[whole - 1] if whole else 0)
        starts = np.empty(lanes, np.int64)
        starts[self._neighbours] = np.cumsum(lacks[self._neighbours]) - lacks[self._neighbours]
        return _Epoch(order, targets, whole * lanes, starts, np.cumsum(sizes[whole * lanes :]))


def part(turn: Turn, bounds: Sequence[int], number: int, rows: int) -> tuple[int, int]:
    """The rows [a, b) of slice `number` that a turn takes, of its `rows`. Turns that meet take every row once.

    bounds: where the unit's slices begin and end by its size, n + 1 numbers from 0 to the size. They may be an estimate. Slices beyond
    them are then cut as the last one is.
    """
    k = min(number, len(bounds) - 2)
    start, end = bounds[k], bounds[k + 1]
    if start == end:  # no row was counted, and in another epoch's order there may be one
        takes = turn.first <= start < turn.last or start == turn.last == bounds[-1]
        return (0, rows) if takes else (0, 0)
    a, b = (min(max(edge, start), end) - start for edge in (turn.first, turn.last))
    return tuple((2 * rows * edge + end - start) // (2 * (end - start)) for edge in (a, b))  # type: ignore[return-value]
