"""The stream: the same rows in the same order for any number of ranks, from any stop, and nothing left behind."""

from __future__ import annotations

import json
import math
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain.data import slices, stream
from picotrain.data.corpus import Corpus, scan
from picotrain.data.lanes import State, check_lanes, has_full_row, merge_states
from picotrain.data.mixture import Mixture
from picotrain.data.packing import pack, permutation
from picotrain.data.slices import cut, documents, utf8_bytes
from picotrain.data.stream import Batch, Loader, validation_rows
from picotrain.data.units import units
from picotrain.errors import DataError

BOS = 256
SEQ_LEN = 15
UNIT_BYTES = 200
SEED = 7


class ByteTokenizer:
    """Every UTF-8 byte is a token. Remembers what it was given."""

    bos_id, vocab_size = BOS, 257

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.seen += texts
        raw = [text.encode() for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8).astype(np.uint32), np.cumsum([0, *map(len, raw)])


class ForgetfulTokenizer(ByteTokenizer):
    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.seen.clear()
        return super().encode_flat(texts)


def text_of(row: list[int]) -> str:
    return bytes(id for id in row if id != BOS).decode(errors="replace")


def write(root: Path, *shards: list[str | None], group: int = 4) -> Corpus:
    """A corpus of these shards, the last of which validates, with row groups of `group` documents."""
    root.mkdir(parents=True, exist_ok=True)
    for index, texts in enumerate(shards):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, root / f"{index}.parquet", row_group_size=group, compression="zstd", use_dictionary=False)
    return scan(root, "test")


def numbered(documents: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 words that say where they come from."""
    lengths = np.random.default_rng(seed).integers(0, 60, documents).tolist()
    return [" ".join(f"{seed}-{doc}-{word}" for word in range(length)) for doc, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("stream"), numbered(40, 1), numbered(56, 2), numbered(9, 3))


def loader(corpus: Corpus, dp_rank: int = 0, dp_size: int = 1, tokenizer: ByteTokenizer | None = None, **changes: object) -> Loader:
    settings = {"lanes": 8, "device_batch_size": 2, "rows_per_step": 16, "seq_len": SEQ_LEN, "unit_bytes": UNIT_BYTES, "seed": SEED}
    return Loader(corpus, tokenizer or ByteTokenizer(), dp_rank=dp_rank, dp_size=dp_size, **(settings | changes))  # type: ignore[arg-type]


@contextmanager
def ranks(corpus: Corpus, dp_size: int, state: State | None = None, **changes: object) -> Iterator[list[Loader]]:
    with ExitStack() as stack:
        yield [stack.enter_context(loader(corpus, rank, dp_size, state=state, **changes)) for rank in range(dp_size)]


def rows_of(batch: Batch) -> list[list[int]]:
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).tolist()


def steps(loaders: list[Loader], num_steps: int, rows_per_step: int = 16) -> list[list[list[int]]]:
    """The rows of each step in the order of the whole run: of all ranks, row i is the next of rank i mod W."""
    out = []
    for _ in range(num_steps):
        per_rank = [
            [row for _ in range(rows_per_step // len(loaders) // each._batch_rows) for row in rows_of(next(each))] for each in loaders
        ]
        out.append([row for at_once in zip(*per_rank, strict=True) for row in at_once])
    return out


def designed_turns(sizes: list[int], order: list[int], lanes: int, begun: int) -> list[list[tuple[int, int, int]]]:
    """What each lane takes of an epoch, as the design words it: (unit, from, to) by size. begun: the sum of all sizes before it."""
    targets = [sum(g % lanes == lane for g in range(begun, begun + sum(sizes))) for lane in range(lanes)]
    turns: list[list[tuple[int, int, int]]] = [[] for _ in range(lanes)]
    held, rest = [0] * lanes, [unit for unit in order if sizes[unit]]
    while len(rest) >= lanes and all(held[lane] + sizes[rest[lane]] <= targets[lane] for lane in range(lanes)):
        for lane in range(lanes):
            unit = rest.pop(0)
            turns[lane].append((unit, 0, sizes[unit]))
            held[lane] += sizes[unit]
    end_to_end = [(unit, at) for unit in rest for at in range(sizes[unit])]
    for lane in sorted(range(lanes), key=lambda lane: [lane >> bit & 1 for bit in range(20)]):
        mine, end_to_end = end_to_end[: targets[lane] - held[lane]], end_to_end[targets[lane] - held[lane] :]
        for unit in dict.fromkeys(unit for unit, _ in mine):
            places = [at for of, at in mine if of == unit]
            turns[lane].append((unit, places[0], places[-1] + 1))
    assert not end_to_end
    return turns


def designed_rows(data: Corpus | Mixture, lanes: int, slice_bytes: int = 1 << 30) -> Iterator[list[int]]:
    """The endless sequence of rows as the design words it, without threads, state or ranks."""
    (source,) = Mixture.of(data).sources
    corpus = source.corpus
    all_units = units(corpus.shards, UNIT_BYTES)
    counted = source.rows
    sizes = [sum(rows) for rows in counted] if counted else [unit.text_bytes for unit in all_units]

    def bounds(index: int) -> list[int]:
        if counted:
            return np.cumsum([0, *counted[index]]).tolist()
        slices = -(-sizes[index] // slice_bytes)
        return [sizes[index] * k // slices for k in range(slices + 1)]

    @lru_cache
    def packed(epoch: int, index: int) -> list[list[list[int]]]:
        parts = cut(documents(corpus.files, corpus.shards[all_units[index].shard], all_units[index]), slice_bytes)
        encoded = [ByteTokenizer().encode_flat(part.texts) for part in parts]
        keys = [(SEED, epoch, index, number) for number in range(len(encoded))]
        return [pack(*flat, BOS, SEQ_LEN + 1, key, np.uint16).rows.tolist() for flat, key in zip(encoded, keys, strict=True)]

    def of_epoch(epoch: int) -> list[list[list[int]]]:
        """Each lane's rows."""
        order = permutation(len(all_units), SEED, epoch).tolist()
        rows: list[list[list[int]]] = [[] for _ in range(lanes)]
        for lane, turns in enumerate(designed_turns(sizes, order, lanes, epoch * sum(sizes))):
            for unit, first, last in turns:
                edges = bounds(unit)
                for number, part in enumerate(packed(epoch, unit)):
                    start, end = edges[-2:] if number > len(edges) - 2 else edges[number : number + 2]
                    a, b = (
                        math.floor(Fraction(len(part) * (min(max(x, start), end) - start), end - start) + Fraction(1, 2))
                        for x in (first, last)
                    )
                    rows[lane] += part[a:b]
        return rows

    queues: list[list[list[int]]] = [[] for _ in range(lanes)]
    epochs = count()
    for g in count():
        while not queues[g % lanes]:
            for queue, more in zip(queues, of_epoch(next(epochs)), strict=True):
                queue += more
        yield queues[g % lanes].pop(0)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("device_batch_size", [1, 2])
def test_the_rows_of_a_run_are_the_designed_ones_for_any_ranks_and_micro_batch(corpus, dp_size, device_batch_size):
    num_steps = 130
    expected = list(islice(designed_rows(corpus, 8), 16 * num_steps))
    with ranks(corpus, dp_size, device_batch_size=device_batch_size) as loaders:
        assert list(chain(*steps(loaders, num_steps))) == expected
        batch = next(loaders[0])
    assert batch.epoch > 1.1  # the order was seen past the first epoch


@given(
    stops=st.lists(st.tuples(st.integers(0, 25), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2])), min_size=1, max_size=4),
    lanes=st.sampled_from([8, 16]),
)
@settings(max_examples=15, deadline=None)
def test_a_run_stopped_anywhere_goes_on_exactly_with_any_ranks(corpus, stops, lanes):
    expected = designed_rows(corpus, lanes)
    state = None
    for num_steps, dp_size, device_batch_size in stops:
        with ranks(corpus, dp_size, state, device_batch_size=device_batch_size, lanes=lanes) as loaders:
            for got in steps(loaders, num_steps):
                assert got == list(islice(expected, 16))
            state = json.loads(json.dumps(merge_states([each.state for each in loaders])))
    assert state["row"] == 16 * sum(num_steps for num_steps, _, _ in stops)


def test_a_resumed_run_shows_the_same_epoch_shard_and_row_group(corpus):
    def shown(batch: Batch) -> tuple:
        return batch.epoch, batch.pq, batch.rg, batch.state

    with loader(corpus) as straight:
        expected = [shown(next(straight)) for _ in range(100)]
    with loader(corpus, state=expected[39][-1]) as resumed:
        assert [shown(next(resumed)) for _ in range(60)] == expected[40:]


def test_the_state_is_that_of_the_last_batch_taken_however_many_are_ready(corpus):
    with loader(corpus) as batches:
        assert batches.state["row"] == 0
        first = next(batches)
        while not batches._ready.full():
            threading.Event().wait(0.001)
        assert batches.state == first.state
        assert first.state["row"] == 2
        assert [cursors[0][2] for cursors in first.state["lanes"]] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_an_epoch_of_one_unit_a_lane_shows_every_text_once(tmp_path):
    """With U = L units of equal size, L x (rows of a unit) rows are one epoch: nothing twice, only tails missing."""
    texts = [f"{doc:03d}" + "abcdefgh" * 9 for doc in range(32)]  # 4 a unit: 300 tokens, 20 rows of 16 with every <|bos|>
    corpus = write(tmp_path, texts, ["v" * 100])
    with loader(corpus, device_batch_size=8, rows_per_step=8, lanes=8) as batches:
        epoch = [next(batches) for _ in range(20)]
        assert epoch[-1].epoch == pytest.approx(1.0)
        assert all(a.epoch < b.epoch for a, b in pairwise(epoch))
        assert next(batches).epoch == pytest.approx(1.0 + 1 / 20)
    spoken = [id for batch in epoch for row in rows_of(batch) for id in row if id != BOS]
    everything = np.bincount(np.frombuffer("".join(texts).encode(), np.uint8), minlength=256)
    missing = everything - np.bincount(spoken, minlength=256)
    assert missing.min() >= 0
    assert missing.sum() < 8 * 16


@pytest.mark.parametrize("dp_size", [1, 4])
def test_a_unit_above_the_limit_is_packed_in_slices_and_resumes_in_the_middle(tmp_path, monkeypatch, dp_size):
    monkeypatch.setattr(slices, "MIN_SLICE_BYTES", 150)
    limit = max(150, UNIT_BYTES)
    texts = ["é" * 700, *numbered(20, 5), "", "x" * 3000, "日本の本" * 40, *numbered(20, 6)]
    corpus = write(tmp_path, texts, ["v" * 100], group=8)
    assert max(unit.text_bytes for unit in units(corpus.shards, UNIT_BYTES)) > 5 * limit
    expected = designed_rows(corpus, 4, limit)
    state = None
    for _ in range(12):
        with ranks(corpus, dp_size, state, lanes=4, device_batch_size=1, rows_per_step=4) as loaders:
            for got in steps(loaders, 15, rows_per_step=4):
                assert got == list(islice(expected, 4))
            state = merge_states([each.state for each in loaders])
    assert max(cursors[0][1] for cursors in state["lanes"]) > 1


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(4, 40))
def test_slices_hold_all_text_in_order_within_their_bound(texts, max_bytes):
    parts = list(cut(texts, max_bytes))
    together = [""] * len(texts)
    for part in parts:
        assert sum(map(utf8_bytes, part.texts)) <= max_bytes
        assert len(set(part.docs)) == len(part.docs)
        for doc, text in zip(part.docs, part.texts, strict=True):
            together[doc] += text
    assert together == texts
    numbers = [doc for part in parts for doc in part.docs]
    assert numbers == sorted(numbers)


words = st.text(st.characters(codec="utf-8"), max_size=25)


@given(
    texts=st.lists(st.one_of(st.none(), st.just(""), words, words.map(lambda text: text * 40)), min_size=1, max_size=25),
    group=st.sampled_from([1, 3, 25]),
)
@settings(max_examples=40, deadline=None)
def test_any_corpus_with_a_full_row_streams_and_any_other_is_an_error(texts, group):
    """Empty and null documents, one small file, row groups of one document, documents of many rows, any script."""
    tokenizer = ByteTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), texts, ["v" * 100], group=group)
        if not has_full_row(corpus, tokenizer, SEQ_LEN, UNIT_BYTES):
            with loader(corpus, lanes=1, device_batch_size=1, rows_per_step=1) as batches, pytest.raises(DataError, match="16 tokens"):
                next(batches)
            return
        with loader(corpus, lanes=1, device_batch_size=1, rows_per_step=1) as batches:
            got = [row for _ in range(40) for row in rows_of(next(batches))]
        assert got == list(islice(designed_rows(corpus, 1), 40))
        assert all(row[0] == BOS for row in got)


def test_documents_come_from_all_row_groups_with_nulls_as_empty(tmp_path):
    texts = ["one", None, "", "zwölf", "日本", "six", "seven"]
    corpus = write(tmp_path, texts, ["v"], group=2)
    (unit,) = units(corpus.shards, UNIT_BYTES)
    assert list(documents(corpus.files, corpus.shards[0], unit)) == [text or "" for text in texts]
    part_of_it = unit._replace(rg_start=1, rg_end=3)
    assert list(documents(corpus.files, corpus.shards[0], part_of_it)) == ["", "zwölf", "日本", "six"]


def test_a_large_row_group_is_never_held_whole(tmp_path):
    texts = [f"{doc} " + "lorem ipsum " * 400 for doc in range(8000)]  # 39 MB
    corpus = write(tmp_path, texts, ["v"], group=8000)
    (unit,) = units(corpus.shards, 1 << 20)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in documents(corpus.files, corpus.shards[0], unit)]
    assert len(held) == 8000
    assert max(held) < 6 << 20


def test_lanes_are_opened_when_their_first_row_is_needed(corpus):
    """One batch of one row taken, READY_BATCHES wait, and as many are drawn together next: later lanes' units are not touched."""
    tokenizer = ByteTokenizer()
    settings = {"seq_len": SEQ_LEN, "unit_bytes": UNIT_BYTES, "seed": SEED, "device_batch_size": 1, "rows_per_step": 1}
    all_units = units(corpus.shards, UNIT_BYTES)
    order = permutation(len(all_units), SEED, 0)
    with Loader(corpus, tokenizer, lanes=(lanes := 12), **settings) as batches:
        next(batches)
        while not batches._ready.full():
            threading.Event().wait(0.001)
        seen = set(tokenizer.seen)
    ready = 1 + stream.READY_BATCHES
    for lane in range(lanes):
        unit = all_units[order[lane]]
        texts = {text for text in documents(corpus.files, corpus.shards[unit.shard], unit) if text}
        assert lane >= ready or texts <= seen
        assert lane < ready + stream.READY_BATCHES or not texts & seen


def test_batches_say_what_they_hold(corpus):
    with loader(corpus, device_batch_size=4) as batches:
        batch = next(batches)
    assert batch.inputs.shape == batch.targets.shape == (4, SEQ_LEN)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
    assert batch.tokens == 4 * SEQ_LEN
    assert batch.wait_ms >= 0
    shard = corpus.shards[batch.pq]
    assert text_of(rows_of(batch)[-1]).strip("0123456789- ") == ""
    assert 0 <= batch.rg < len(shard.row_groups)
    assert f"{batch.pq + 1}-" in text_of(rows_of(batch)[-1])  # the shard's documents say which it is


def test_units_without_a_full_row_are_passed_over(tmp_path):
    short = ["ab", "c"]
    texts = ["ab" * 60, *short * 20, "cd" * 60]
    corpus = write(tmp_path, texts, ["v"], group=1)
    few_bytes = 1  # one row group a unit
    with Loader(
        corpus, ByteTokenizer(), seq_len=SEQ_LEN, unit_bytes=few_bytes, lanes=4, seed=0, device_batch_size=4, rows_per_step=4
    ) as batches:
        for _ in range(40):
            for row in rows_of(next(batches)):
                assert set(text_of(row)) in ({"a", "b"}, {"c", "d"})


def test_what_fails_in_the_background_is_raised_by_next_and_again(tmp_path):
    corpus = write(tmp_path, numbered(40, 1), numbered(5, 2))
    (tmp_path / "0.parquet").unlink()
    with loader(corpus) as batches:
        for _ in range(2):
            with pytest.raises(DataError, match=r"0\.parquet cannot be read: No such file"):
                next(batches)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped"])
def test_a_shard_damaged_after_the_scan_is_an_error_that_names_it(tmp_path, damage):
    corpus = write(tmp_path, numbered(40, 1), numbered(5, 2))
    path = tmp_path / "0.parquet"
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(raw[:-100])
    elif damage == "flipped":
        raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
        path.write_bytes(raw)
    else:
        write(tmp_path / "other", numbered(8, 1), ["v"])
        path.write_bytes((tmp_path / "other" / "0.parquet").read_bytes())
    with loader(corpus) as batches, pytest.raises(DataError, match=r"0\.parquet"):
        for _ in range(100):
            next(batches)


def test_text_that_is_not_utf8_is_an_error_that_names_the_place(tmp_path):
    write(tmp_path, ["x" * 300], ["v" * 300])
    binary = pa.array([b"fine" * 90, b"\xff\xfe"], pa.binary())
    text = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "0.parquet")
    with loader(scan(tmp_path, "bad"), lanes=1) as batches, pytest.raises(DataError, match=r"0\.parquet.* not valid UTF-8"):
        next(batches)


def test_a_bug_in_the_background_keeps_its_type_and_traceback(corpus):
    class Broken(ByteTokenizer):
        def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            raise ZeroDivisionError("in the tokenizer")

    settings = {"seq_len": SEQ_LEN, "unit_bytes": UNIT_BYTES, "lanes": 8, "seed": 0, "device_batch_size": 1, "rows_per_step": 8}
    with Loader(corpus, Broken(), **settings) as batches, pytest.raises(ZeroDivisionError) as info:
        next(batches)
    assert "encode_flat" in [entry.name for entry in info.traceback]


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_no_thread_outlives_close(corpus, taken):
    before = set(threading.enumerate())
    batches = loader(corpus)
    assert set(threading.enumerate()) - before == set()
    batches.__enter__()
    for _ in range(taken):
        next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert set(threading.enumerate()) - before == set()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_closing_after_a_failure_ends_the_threads_too(tmp_path):
    corpus = write(tmp_path, numbered(40, 1), numbered(5, 2))
    (tmp_path / "0.parquet").unlink()
    before = set(threading.enumerate())
    with loader(corpus) as batches, pytest.raises(DataError):
        next(batches)
    assert set(threading.enumerate()) - before == set()


def test_lanes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    check_lanes(lanes=8, num_units=8, dp_size=4, rows_per_step=12)
    with pytest.raises(DataError, match="data.lanes=16: .* there are 5; at most 5 lanes"):
        check_lanes(16, 5, 1, 16)
    with pytest.raises(DataError, match=r"dp_size 6 does not divide the 16 lanes .*: 4 and 8$"):
        check_lanes(16, 20, 6, 12)
    with pytest.raises(DataError, match=r"dp_size 32 does not divide the 16 lanes .*: 16$"):
        check_lanes(16, 20, 32, 64)
    with pytest.raises(DataError, match=r"dp_size 4 does not divide the 10 rows of a step; .*: 8 and 12$"):
        check_lanes(16, 20, 4, 10)
    with pytest.raises(DataError, match=r"dp_size 4 does not divide the 2 rows of a step; .*: 4$"):
        check_lanes(16, 20, 4, 2)


def test_fewer_units_than_lanes_are_refused_by_the_loader(tmp_path):
    corpus = write(tmp_path, ["x" * 500], ["v"])
    with pytest.raises(DataError, match="at most 1 lanes"):
        loader(corpus, lanes=2)


def test_a_state_of_another_run_is_refused(corpus, tmp_path):
    with loader(corpus) as batches:
        for _ in range(3):
            state = next(batches).state
    with pytest.raises(DataError, match="data.lanes=4: the checkpoint's stream has 8"):
        loader(corpus, lanes=4, state=state)
    with pytest.raises(DataError, match="dp_size 4 does not divide the 6 rows"):
        loader(corpus, dp_size=4, state=state)
    other = write(tmp_path, numbered(60, 8), numbered(30, 9), ["v"])
    with loader(other, state=state) as batches, pytest.raises(DataError, match="changed since"):
        for _ in range(8):
            next(batches)


def test_states_merge_only_when_they_belong_together(corpus):
    with ranks(corpus, 2) as loaders:
        ahead, behind = next(loaders[0]).state, loaders[1].state
        with pytest.raises(ValueError, match="different rows"):
            merge_states([ahead, behind])
        with pytest.raises(ValueError, match="lane 1"):
            merge_states([ahead])
        merged = merge_states([ahead, next(loaders[1]).state])
    assert merge_states([merged, merged]) == merged


def test_validation_rows_are_the_shards_first_in_file_order(corpus):
    tokenizer = ByteTokenizer()
    texts = numbered(9, 3)
    every = validation_rows(corpus, tokenizer, SEQ_LEN, None, UNIT_BYTES)
    assert len(every.rows) > 50
    raw = [text.encode() for text in texts]
    for row, start, end in zip(every.rows.tolist(), every.span_ptr[:-1], every.span_ptr[1:], strict=True):
        spans = zip(every.span_doc[start:end], every.span_first[start:end], every.span_len[start:end], strict=True)
        assert row == [id for doc, first, length in spans for id in [BOS, *raw[doc][first : first + length]]]
    # Numbers count over the whole shard, unit after unit, and what is in no row is the tail of each unit.
    assert every.span_doc.max() == 8 and len(units([corpus.val], UNIT_BYTES)) > 1
    assert every.span_len.sum() + every.dropped_tokens == sum(map(len, raw))
    some = validation_rows(corpus, tokenizer, SEQ_LEN, 20, UNIT_BYTES)
    assert some.rows.tolist() == every.rows[:20].tolist()
    assert some.span_len.tolist() == every.span_len[: every.span_ptr[20]].tolist()


def test_validation_rows_read_no_more_than_they_need(corpus):
    tokenizer = ByteTokenizer()
    validation_rows(corpus, tokenizer, SEQ_LEN, 2, UNIT_BYTES)
    first = units([corpus.val], UNIT_BYTES)[0]
    assert len(tokenizer.seen) == sum(group.rows for group in corpus.val.row_groups[: first.rg_end])


def test_a_validation_shard_without_a_full_row_is_an_error(tmp_path):
    corpus = write(tmp_path, ["x" * 300], ["v" * 10])
    with pytest.raises(DataError, match=r"1\.parquet, which validates, fills no row of 16 tokens"):
        validation_rows(corpus, ByteTokenizer(), SEQ_LEN, 5, UNIT_BYTES)


def test_batches_for_another_device_are_widened_there(corpus):
    with loader(corpus, device="meta", device_batch_size=4) as batches:
        batch = next(batches)
        assert batches._ready.get().ids.dtype == torch.int32  # half the bytes over the bus
    assert batch.inputs.device.type == batch.targets.device.type == "meta"
    assert batch.inputs.dtype == torch.int64
    assert batch.targets.shape == (4, SEQ_LEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_cuda_are_those_of_the_cpu(corpus):
    with loader(corpus) as on_cpu, loader(corpus, device="cuda") as on_cuda:
        for _ in range(50):
            expected, batch = next(on_cpu), next(on_cuda)
            assert batch.inputs.is_cuda and batch.inputs.dtype == torch.int64
            assert torch.equal(expected.inputs, batch.inputs.cpu())
            assert torch.equal(expected.targets, batch.targets.cpu())


def traced_peak(corpus: Corpus, num_batches: int, lanes: int) -> int:
    """Bytes at the peak of numpy's and Python's allocations while batches are taken; the manifest is not among them."""
    tracemalloc.start()
    settings = {"seq_len": 1023, "unit_bytes": 1, "rows_per_step": 2, "device_batch_size": 2}
    with loader(corpus, lanes=lanes, tokenizer=ForgetfulTokenizer(), **settings) as batches:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(num_batches):
            next(batches)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def test_memory_stays_within_the_stated_bound_whatever_the_number_of_shards(tmp_path, monkeypatch):
    slice_bytes, lanes = 1 << 18, 4
    monkeypatch.setattr(slices, "MIN_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(slices, "READ_BYTES", 1 << 15)
    # Row groups of four slices each. The fewer shards are passed over three times, the more ones half.
    texts = ["word " * 400] * (4 * slice_bytes // 2000)
    few = write(tmp_path / "few", *[texts] * 4, ["v"], group=len(texts))
    many = write(tmp_path / "many", *[texts] * 24, ["v"], group=len(texts))
    of_a_slice = 5 + 4 + 2  # bytes: text, ids, rows; this tokenizer makes a token of every byte
    bound = lanes * 2 * slice_bytes * 2 + stream.WORKERS * slice_bytes * of_a_slice + (1 << 20)
    # A peak has two values, a slice's making apart: both workers make a slice at the same moment, or they do not.
    # The threads' timing decides, so two corpora's peaks may differ by that much; the promise is the bound.
    num_batches = 6000
    assert num_batches * 2 * 1024 * 2 > 2 * bound  # a loader that keeps the ids it has made is found out
    for corpus in (few, many):
        assert traced_peak(corpus, num_batches, lanes) < bound
