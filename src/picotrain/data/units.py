"""Units, and the order in which an epoch takes them.

A corpus of 400 B tokens has some hundred thousand units. So they stand in arrays, which take 20 bytes a unit, not 200. Functions
import numpy, so that a plan on an unknown corpus does not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from picotrain.data.corpus import Shard

MAX_LANES = 64
MIN_UNIT_BYTES = 1 << 20
UNIT_ROWS = 400  # a unit holds text for at least this many rows, so that packing has a choice

COUNT_BYTES = 512 << 20  # text up to which the rows of an epoch are counted first: measured at 60 MB a second on two cores

# Shards whose units are mixed with each other: few enough that a cache far smaller than the corpus reads every remote shard
# once an epoch, many enough that neighbours in the stream come from all over the corpus.
WINDOW_SHARDS = 16
SHARDS = 1  # what a permutation is for: of shards, not of units


class Unit(NamedTuple):
    """Row groups [rg_start, rg_end) of training shard `shard`: read, tokenized and packed as a whole."""

    shard: int
    rg_start: int
    rg_end: int
    text_bytes: int


class Units(Sequence[Unit]):
    """The units of a corpus, in the order of its shards."""

    def __init__(self, columns: NDArray[np.int64]):
        self._shard, self._rg_start, self._rg_end = (columns[:, i].astype("int32") for i in range(3))
        self.text_bytes = columns[:, 3].copy()  # (U,)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index):  # type: ignore[override]  # slices are not needed
        return Unit(int(self._shard[index]), int(self._rg_start[index]), int(self._rg_end[index]), int(self.text_bytes[index]))

    def __iter__(self) -> Iterator[Unit]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Units({list(self)!r})"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The units of an epoch as they are taken, by index: (seed, epoch) alone decides.

        The shards stand in a random order, which is cut into windows of WINDOW_SHARDS. The windows come one after the other. Within a
        window the units stand in random order. A corpus of at most WINDOW_SHARDS shards is one window.
        """
        import numpy as np

        from picotrain.data.packing import permutation

        shuffled = permutation(len(self), seed, epoch)
        num_shards = int(self._shard[-1]) + 1 if len(self) else 0
        if num_shards <= WINDOW_SHARDS:
            return shuffled
        place_of_shard = np.argsort(permutation(num_shards, seed, epoch, SHARDS))
        window = place_of_shard[self._shard] // WINDOW_SHARDS
        return shuffled[np.argsort(window[shuffled], kind="stable")]


def units(shards: Sequence[Shard], unit_bytes: int) -> Units:
    """Join consecutive row groups of each shard until they have at least `unit_bytes` of text. What is left at a shard's end joins the
    unit before. A shard with less text is one unit."""
    import numpy as np

    found: list[tuple[int, int, int, int]] = []
    for index, shard in enumerate(shards):
        first = len(found)
        start = size = 0
        for end, group in enumerate(shard.row_groups, 1):
            size += group.text_bytes
            if size >= unit_bytes or end == len(shard.row_groups):
                found.append((index, start, end, size))
                start, size = end, 0
        if len(found) - first > 1 and found[-1][3] < unit_bytes:
            short, before = found.pop(), found.pop()
            found.append((index, before[1], short[2], before[3] + short[3]))
    return Units(np.array(found, dtype=np.int64).reshape(-1, 4))


def default_unit_bytes(seq_len: int) -> int:
    """max(1 MiB, 400 x (seq_len + 1)) bytes of text."""
    return max(MIN_UNIT_BYTES, UNIT_ROWS * (seq_len + 1))


def default_lanes(num_units: int) -> int:
    """The largest power of two <= min(64, num_units)."""
    if num_units < 1:
        raise ValueError("a corpus without units has no lanes")
    return 1 << (min(MAX_LANES, num_units).bit_length() - 1)
