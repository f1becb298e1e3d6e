"""The data stream of one rank: text becomes batches of token ids off the training thread.

A producer thread draws rows from this rank's lanes and keeps a few batches ready; a small pool reads, tokenizes
and packs the lanes' next slices ahead of need. See `picotrain.data.lanes` for the order of rows and the state.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import mul
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from picotrain import first_calls
from picotrain.data.corpus import Corpus
from picotrain.data.lanes import Cursor, Lane, Reader, State, Stream, check_lanes, remedy, start_state
from picotrain.data.mixture import Choice, Mixture
from picotrain.data.packing import Packed, concatenate
from picotrain.data.shares import Sharing
from picotrain.data.slices import Encoder, slice_bytes, tokenized
from picotrain.data.units import WINDOW_SHARDS, units
from picotrain.errors import DataError

first_calls.settle()

READY_BATCHES = 3  # finished batches that wait for the training thread beyond those of a step
AHEAD_SHARDS = 2 * WINDOW_SHARDS  # remote shards that are fetched before they are needed
LOOK_S = 0.1  # how often a wait for data looks up
WORKERS = 2  # threads that read, tokenize and pack


class Position(NamedTuple):
    """A rank's place in the stream, cheap enough to keep with every batch."""

    row: int  # rows of the whole run so far, of all ranks
    lanes: int
    dp_rank: int
    dp_size: int
    cursors: tuple[tuple[Cursor, ...], ...]  # for each source, of lanes dp_rank, dp_rank + dp_size, ...

    def state(self) -> State:
        """As JSON, with null for the lanes of other ranks."""
        known: list[Any] = [None] * self.lanes
        known[self.dp_rank :: self.dp_size] = [[list(cursor) for cursor in lane] for lane in self.cursors]
        return {"row": self.row, "lanes_count": self.lanes, "lanes": known}

    @classmethod
    def of(cls, state: State, lanes: int, sources: int, dp_rank: int, dp_size: int) -> Position:
        """A rank's part of a merged state."""
        if (saved := state["lanes_count"]) != lanes:
            raise DataError(f"data.lanes={lanes}: the checkpoint's stream has {saved} lanes, which are fixed when a run is created")
        if (row := state["row"]) % dp_size:
            raise DataError(f"dp_size {dp_size} does not divide the {row} rows that were read; resume with the dp_size of before")
        cursors = tuple(tuple(Cursor(*cursor) for cursor in lane) for lane in state["lanes"][dp_rank::dp_size])
        if cursors and (saved := len(cursors[0])) != sources:
            raise DataError(f"the checkpoint's stream draws from {saved} sources and this config from {sources}; the data is another one")
        return cls(row, lanes, dp_rank, dp_size, cursors)

    def lane_rows(self, lane: int) -> int:
        """How many rows the lane has given: those g < row with g mod lanes == lane."""
        return len(range(lane, self.row, self.lanes))


class Batch(NamedTuple):
    """One micro-batch of this rank, and where the stream stands behind it."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the token after each input
    wait_ms: float  # how long the training thread was kept waiting
    epoch: float  # passes over the corpus, by what this rank's lanes have used up of their shares
    pq: int  # index of the shard that the last row comes from
    rg: int  # first row group of the last row's unit
    position: Position
    source_rows: tuple[int, ...]  # rows of the batch by source
    source_epochs: tuple[float, ...]  # passes over each source

    @property
    def tokens(self) -> int:
        """Targets of the batch: B x T."""
        return self.targets.numel()

    @property
    def state(self) -> State:
        """The stream's state behind this batch: what a checkpoint saves once it was trained on."""
        return self.position.state()


class _Drawn(NamedTuple):
    """The rows of a batch, and where the stream stands behind them."""

    rows: list[NDArray[Any]]  # B of (T + 1,)
    epoch: float
    pq: int
    rg: int
    position: Position
    source_rows: tuple[int, ...]
    source_epochs: tuple[float, ...]


class _Prepared(NamedTuple):
    """A batch that waits for the training thread."""

    ids: torch.Tensor  # (2, B, T) inputs and targets, on the CPU
    drawn: _Drawn


class Loader(Iterator[Batch]):
    """An endless iterator over this rank's micro-batches. It is a context: its threads start when it is entered, and end with it.

    state: None for the start, else the merged state of all ranks. Any dp_size that divides lanes and rows_per_step goes on exactly.
    The rows of a step are the same for any device_batch_size.
    on_bad_shard: "stop" raises what cannot be read. "skip" passes over the rest of its unit and notes it in `skipped`.

    Memory, at most, beside the batches of a step and 2 x READY_BATCHES. Let S be max(8 MiB, unit_bytes), and t the bytes of an id in
    rows: 2, or 4 above 65,536 ids. Count a token a byte of text (mostly it is one in four bytes). A unit below S counts with its own size.

        lanes / dp_size lanes x sources x 2 x S x t      the present and the prepared slice; twice that where lanes share units
        WORKERS x S x (5 + 4 + t)                        text, ids and rows of slices in the making
        WORKERS x 10 x the longest document              while it is cut

    Raises DataError where lanes, corpus, dp_size, rows_per_step and state do not go together. `next` raises what fails in the background.
    """

    def __init__(
        self,
        data: Corpus | Mixture,
        tokenizer: Encoder,
        *,
        seq_len: int,
        unit_bytes: int,
        lanes: int,
        seed: int,
        device_batch_size: int,
        rows_per_step: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        device: torch.device | str = "cpu",
        state: State | None = None,
        on_bad_shard: Literal["stop", "skip"] = "stop",
        sharing: Sharing = "even",
    ):
        self._data = mixture = Mixture.of(data)
        self._skipped: deque[str] = deque()
        on_bad = self._note_skipped if on_bad_shard == "skip" else None
        # Each source has a seed of its own, so that two sources of the same shape do not stand in the same order.
        kept = 2 * len(range(dp_rank, lanes, dp_size))  # what the lanes of this rank may share, of this epoch and the next
        self._streams = [
            Stream(source, tokenizer, seq_len, unit_bytes, lanes, seed + index, on_bad, sharing, kept)
            for index, source in enumerate(mixture.sources)
        ]
        check_lanes(lanes, max(len(stream.units) for stream in self._streams), dp_size, rows_per_step)
        sources = len(self._streams)
        self._position = Position.of(state or start_state(lanes, sources), lanes, sources, dp_rank, dp_size)
        self._batch_rows, self._device = device_batch_size, torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="picotrain-data")
        self._lanes = [self._lane(number, seed) for number in range(dp_rank, lanes, dp_size)]
        self._prefetched: dict[int, int] = {}  # by source: the position that its prefetched shards begin at
        # `look_ahead` waits for all batches of a step before it begins. So all of them have to be ready while the step before runs.
        batches_per_step = rows_per_step // (dp_size * device_batch_size)
        self._ready: queue.Queue[_Prepared | BaseException] = queue.Queue(batches_per_step + READY_BATCHES - 1)
        self._taken: deque[_Prepared] = deque()
        self._waited_ms = 0.0
        self._failed: BaseException | None = None
        self._closing = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="picotrain-batches", daemon=True)

    def _lane(self, number: int, seed: int) -> Lane:
        index = (number - self._position.dp_rank) // self._position.dp_size
        cursors = self._position.cursors[index]
        # Lanes would run dry at about the same time. So each prepares its next slice at another share of its present one.
        prefetch_at = 0.25 + 0.5 * index / len(self._position.cursors)
        readers = [Reader(stream, number, at, self._pool, prefetch_at) for stream, at in zip(self._streams, cursors, strict=True)]
        return Lane(readers, Choice(self._data.shares, seed, number), self._position.lane_rows(number))

    @property
    def state(self) -> State:
        """The state behind the last batch that `next` returned."""
        return self._position.state()

    def look_ahead(self, batches: int, should_stop: Callable[[], bool] = lambda: False) -> BaseException | None:
        """Wait until the next `batches` batches are ready, or until `should_stop()`. Returns the error where one of them cannot be made.

        So a failure is known before the step begins, while all ranks can still agree on what to do.
        """
        while len(self._taken) < batches and self._failed is None and not should_stop():
            self._take(LOOK_S)
        return self._failed if len(self._taken) < batches else None

    def __next__(self) -> Batch:
        if self._closing.is_set():
            raise RuntimeError("the loader is closed")
        while not self._taken:
            if self._failed is not None:
                raise self._failed
            self._take(None)
        ids, drawn = self._taken.popleft()
        wait_ms, self._waited_ms = self._waited_ms, 0.0
        # A GPU gets 4 bytes an id and widens them. CUDA gets them from pinned memory, without waiting. On the CPU nothing is copied.
        inputs, targets = ids.to(self._device, non_blocking=self._device.type == "cuda").long()  # (B, T) each
        self._position = drawn.position
        return Batch(inputs, targets, wait_ms, *drawn[1:])

    def skipped(self) -> list[str]:
        """What was passed over since the last call (on_bad_shard="skip"): shard, row group, document, reason."""
        return [self._skipped.popleft() for _ in range(len(self._skipped))]

    def _take(self, timeout_s: float | None) -> None:
        started = time.perf_counter()
        with suppress(queue.Empty):
            item = self._ready.get(timeout=timeout_s)
            if isinstance(item, BaseException):
                self._failed = item
            else:
                self._taken.append(item)
        self._waited_ms += 1000 * (time.perf_counter() - started)

    def _note_skipped(self, error: DataError) -> None:
        self._skipped.append(str(error))

    def __enter__(self) -> Loader:
        self._producer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the background threads and wait for them; what was prepared is dropped. Closing twice does no harm."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        while self._producer.is_alive():
            with suppress(queue.Empty):  # it may be waiting for room
                self._ready.get_nowait()
            self._producer.join(timeout=0.01)
        self._pool.shutdown(wait=True)
        self._data.close()

    def _produce(self) -> None:
        """The producer thread: batch after batch, then what went wrong."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread starts on device 0, and pinning would open a context there
            for prepared in self._batches():
                self._ready.put(prepared)
                if self._closing.is_set():
                    return
        except BaseException as error:
            self._ready.put(error)

    def _batches(self) -> Iterator[_Prepared]:
        """Batch after batch. A few at a time are put into memory, because they then share the calls into numpy and torch. The first
        comes alone, so that it opens no more lanes than it needs."""
        draw, failed, together = self._draw(), None, 1
        while failed is None:
            drawn: list[_Drawn] = []
            try:
                while len(drawn) < together:
                    drawn.append(next(draw))
            except DataError as error:
                failed = error  # what was drawn before it comes first
            if drawn:
                yield from map(_Prepared, self._tensors(drawn), drawn)
            together = READY_BATCHES
        raise failed

    def _draw(self) -> Iterator[_Drawn]:
        """Row j of this rank comes from its lane j mod (lanes / dp_size)."""
        at, lanes = self._position, self._lanes
        done = at.row // at.dp_size  # rows of this rank
        # Kept up to date for the lanes of a batch alone: there may be many more.
        cursors = [lane.cursors for lane in lanes]
        progress = [lane.progress for lane in lanes]
        while True:
            turns = [(done + k) % len(lanes) for k in range(self._batch_rows)]
            self._prefetch()
            for i in turns:
                lanes[i].open()  # all of them at once, before the first is waited for
            rows = []
            source_rows = [0] * len(self._streams)
            for i in turns:
                rows.append(lanes[i].next_row())
                source_rows[lanes[i].source] += 1
            done += len(turns)
            for i in set(turns):
                cursors[i], progress[i] = lanes[i].cursors, lanes[i].progress
            epoch, source_epochs = self._epochs(progress)
            reader = lanes[turns[-1]].readers[lanes[turns[-1]].source]
            unit = reader.stream.unit(reader.cursor.position)
            position = at._replace(row=done * at.dp_size, cursors=tuple(cursors))
            yield _Drawn(rows, epoch, unit.shard, unit.rg_start, position, tuple(source_rows), source_epochs)

    def _epochs(self, progress: list[tuple[float, ...]]) -> tuple[float, tuple[float, ...]]:
        """Passes over all sources together, and over each. A pass is done when the lanes have used up their shares, which are equal."""
        passes = tuple(sum(source) / len(progress) for source in zip(*progress, strict=True))
        sizes = self._data.sizes
        return sum(map(mul, passes, sizes)) / sum(sizes), passes

    def _prefetch(self) -> None:
        """Tell the files which shards this rank will want next, whenever the lanes have gone on."""
        for s, stream in enumerate(self._streams):
            if stream.corpus.remote is None:
                continue
            reached = [reader.cursor.position for lane in self._lanes for reader in [lane.readers[s]] if not reader.is_out]
            if reached and (first := min(reached)) != self._prefetched.get(s):
                self._prefetched[s] = first
                stream.corpus.files.prefetch(stream.shards_from(first, AHEAD_SHARDS))

    def _tensors(self, drawn: list[_Drawn]) -> Iterator[torch.Tensor]:
        """Inputs and targets (2, B, T) of each batch."""
        kind = self._device.type
        rows = np.stack([row for batch in drawn for row in batch.rows])  # (batches x B, T + 1), 2 or 4 bytes an id
        rows = rows.reshape(len(drawn), -1, rows.shape[-1])
        shape = (len(drawn), 2, rows.shape[1], rows.shape[2] - 1)
        ids = torch.empty(shape, dtype=torch.int64 if kind == "cpu" else torch.int32, pin_memory=kind == "cuda")
        out = ids.numpy()
        out[:, 0] = rows[:, :, :-1]
        out[:, 1] = rows[:, :, 1:]
        return iter(ids)


def validation_rows(data: Corpus | Mixture, tokenizer: Encoder, seq_len: int, max_rows: int | None, unit_bytes: int) -> Packed:
    """The first `max_rows` rows (None: all) of the validation shard, in file order and without permutations.

    Of a mixture, each source's validation shard gives its share of the rows, or all it has; one source after the other.
    rows: (N, seq_len + 1); spans number the documents of the whole shard, or of the shards one after the other. The same for
    any dp_size and micro-batch. Raises DataError when a shard has no full row.
    """
    mixture = Mixture.of(data)
    parts: list[Packed] = []
    docs = 0
    for corpus, share in zip(mixture.corpora, mixture.shares, strict=True):
        packed = _shard_rows(corpus, tokenizer, seq_len, max_rows and max(1, round(max_rows * share)), unit_bytes)
        parts.append(packed._replace(span_doc=packed.span_doc + docs))
        docs += corpus.val.rows
    return concatenate(parts)


def _shard_rows(corpus: Corpus, tokenizer: Encoder, seq_len: int, max_rows: int | None, unit_bytes: int) -> Packed:
    parts: list[Packed] = []
    found = 0
    for unit in units([corpus.val], unit_bytes):
        first_doc = sum(group.rows for group in corpus.val.row_groups[: unit.rg_start])
        for tokens in tokenized(corpus.files, corpus.val, unit, tokenizer, slice_bytes(unit_bytes)):
            packed = tokens.pack(tokenizer, seq_len, key=None)
            parts.append(packed._replace(span_doc=packed.span_doc + first_doc))
            found += len(packed.rows)
            if max_rows is not None and found >= max_rows:
                return concatenate(parts, max_rows)
    if not found:
        path = corpus.root / corpus.val.name
        raise DataError(f"{path}, which validates, fills no row of {seq_len + 1} tokens; {remedy(seq_len)}")
    return concatenate(parts)
