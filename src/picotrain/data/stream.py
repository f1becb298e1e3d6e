"""The data stream of one rank: text becomes batches of token ids off the training thread.

A producer thread draws rows from this rank's lanes and keeps a few batches ready; a small pool reads, tokenizes
and packs the lanes' next slices ahead of need. See `picotrain.data.lanes` for the order of rows and the state.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch
from numpy.typing import NDArray

from picotrain.data.corpus import Corpus, units
from picotrain.data.lanes import Cursor, Lane, State, Stream, check_lanes, start_state
from picotrain.data.packing import Packed, concatenate
from picotrain.data.slices import Encoder, slice_bytes, tokenized
from picotrain.errors import DataError

READY_BATCHES = 3  # finished batches that wait for the training thread
WORKERS = 2  # threads that read, tokenize and pack


class Position(NamedTuple):
    """A rank's place in the stream, cheap enough to keep with every batch."""

    row: int  # rows of the whole run so far, over all ranks
    lanes: int
    dp_rank: int
    dp_size: int
    cursors: tuple[Cursor, ...]  # of lanes dp_rank, dp_rank + dp_size, ...

    def state(self) -> State:
        """As JSON, with null for the lanes of other ranks."""
        known: list[list[int] | None] = [None] * self.lanes
        known[self.dp_rank :: self.dp_size] = map(list, self.cursors)
        return {"row": self.row, "lanes_count": self.lanes, "lanes": known}

    @classmethod
    def of(cls, state: State, lanes: int, dp_rank: int, dp_size: int) -> Position:
        """A rank's part of a merged state."""
        if (saved := state["lanes_count"]) != lanes:
            raise DataError(f"data.lanes={lanes}: the checkpoint's stream has {saved} lanes, which are fixed when a run is created")
        if (row := state["row"]) % dp_size:
            raise DataError(f"dp_size {dp_size} does not divide the {row} rows that were read; resume with the dp_size of before")
        cursors = tuple(Cursor(*cursor) for cursor in state["lanes"][dp_rank::dp_size])
        return cls(row, lanes, dp_rank, dp_size, cursors)


class Batch(NamedTuple):
    """One micro-batch of this rank, and where the stream stands behind it."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the token after each input
    epoch: float  # passes over the corpus: the share of the units that this rank's lanes have used up
    pq: int  # index of the shard that the last row comes from
    rg: int  # first row group of the last row's unit
    wait_ms: float  # how long `next` was kept waiting
    position: Position

    @property
    def tokens(self) -> int:
        """Targets of the batch: B x T."""
        return self.targets.numel()

    @property
    def state(self) -> State:
        """The stream's state behind this batch: what a checkpoint saves once it was trained on."""
        return self.position.state()


class _Prepared(NamedTuple):
    """A batch that waits for the training thread."""

    ids: torch.Tensor  # (2, B, T) inputs and targets, on the CPU
    epoch: float
    pq: int
    rg: int
    position: Position


class Loader(Iterator[Batch]):
    """An endless iterator over this rank's micro-batches; a context manager, or call `close`.

    state: None for the start, else a state merged of all ranks'; any dp_size that divides lanes and rows_per_step goes
    on exactly. The rows of a step are the same for any device_batch_size.

    Memory, at most, beside READY_BATCHES batches: let S be max(8 MiB, unit_bytes), t the bytes of an id in rows (2, or 4
    above 65,536 ids), and count a token a byte of text (mostly it is one in four). Each of lanes / dp_size lanes holds
    its present and its prepared slice, 2 x S x t; each of WORKERS slices in the making takes S x (5 + 4 + t) for text, ids
    and rows, and up to 10 x its longest document while that is cut. A unit below S counts with its own size.
    Raises DataError where lanes, corpus, dp_size, rows_per_step and state do not go together; what fails in the
    background is raised by `next`.
    """

    def __init__(
        self,
        corpus: Corpus,
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
    ):
        self._stream = Stream(corpus, tokenizer, seq_len, unit_bytes, lanes, seed)
        check_lanes(lanes, len(self._stream.units), dp_size, rows_per_step)
        self._position = Position.of(state or start_state(lanes), lanes, dp_rank, dp_size)
        self._batch_rows, self._device = device_batch_size, torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="picotrain-data")
        cursors = self._position.cursors
        # Lanes run dry at about the same time, so each has its next slice prepared at another share of its present one.
        self._lanes = [Lane(self._stream, at, self._pool, 0.25 + 0.5 * i / len(cursors)) for i, at in enumerate(cursors)]
        self._ready: queue.Queue[_Prepared | BaseException] = queue.Queue(READY_BATCHES)
        self._failed: BaseException | None = None
        self._closing = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="picotrain-batches", daemon=True)
        self._producer.start()

    @property
    def state(self) -> State:
        """The state behind the last batch that `next` returned."""
        return self._position.state()

    def __next__(self) -> Batch:
        if self._closing.is_set():
            raise RuntimeError("the loader is closed")
        if self._failed is not None:
            raise self._failed
        started = time.perf_counter()
        item = self._ready.get()
        wait_ms = 1000 * (time.perf_counter() - started)
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        # To a GPU go 4 bytes an id, to CUDA from pinned memory and without waiting; they are widened there. On the CPU nothing is copied.
        inputs, targets = item.ids.to(self._device, non_blocking=self._device.type == "cuda").long()  # (B, T) each
        self._position = item.position
        return Batch(inputs, targets, item.epoch, item.pq, item.rg, wait_ms, item.position)

    def __enter__(self) -> Loader:
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
        """Row j of this rank comes from its lane j mod (lanes / dp_size)."""
        at, stream, lanes = self._position, self._stream, self._lanes
        done = at.row // at.dp_size  # rows of this rank
        progress = [lane.progress for lane in lanes]
        while True:
            turns = [(done + k) % len(lanes) for k in range(self._batch_rows)]
            for i in turns:
                lanes[i].open()  # all of them at once, before the first is waited for
            ids = self._tensor([lanes[i].next_row() for i in turns])
            done += len(turns)
            for i in set(turns):
                progress[i] = lanes[i].progress
            epoch = sum(progress) * at.dp_size / len(stream.units)
            unit = stream.unit(lanes[turns[-1]].cursor.position)
            position = at._replace(row=done * at.dp_size, cursors=tuple(lane.cursor for lane in lanes))
            yield _Prepared(ids, epoch, unit.shard, unit.rg_start, position)

    def _tensor(self, rows: list[NDArray]) -> torch.Tensor:
        """(2, B, T): inputs and targets of rows of T + 1 ids."""
        kind = self._device.type
        dtype = torch.int64 if kind == "cpu" else torch.int32
        ids = torch.empty((2, len(rows), len(rows[0]) - 1), dtype=dtype, pin_memory=kind == "cuda")
        inputs, targets = ids.numpy()
        for i, row in enumerate(rows):
            inputs[i] = row[:-1]
            targets[i] = row[1:]
        return ids


def validation_rows(corpus: Corpus, tokenizer: Encoder, seq_len: int, max_rows: int | None, unit_bytes: int) -> Packed:
    """The first `max_rows` rows (None: all) of the validation shard, in file order and without permutations.

    rows: (N, seq_len + 1); spans number the documents of the whole shard. The same for any dp_size and micro-batch.
    Raises DataError when the shard has no full row.
    """
    parts: list[Packed] = []
    found = 0
    for unit in units([corpus.val], unit_bytes):
        first_doc = sum(group.rows for group in corpus.val.row_groups[: unit.rg_start])
        for tokens in tokenized(corpus.root, corpus.val, unit, tokenizer, slice_bytes(unit_bytes)):
            packed = tokens.pack(tokenizer, seq_len, key=None)
            parts.append(packed._replace(span_doc=packed.span_doc + first_doc))
            found += len(packed.rows)
            if max_rows is not None and found >= max_rows:
                return concatenate(parts, max_rows)
    if not found:
        path = corpus.root / corpus.val.name
        raise DataError(f"{path}, which validates, fills no row of {seq_len + 1} tokens; take a smaller train.seq_len or more text")
    return concatenate(parts)
