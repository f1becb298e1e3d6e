"""Mixtures: rows by weight, the same for any ranks and after any stop; what cannot be read is named, or passed over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain.data.corpus import Corpus, scan
from picotrain.data.lanes import State, merge_states
from picotrain.data.mixture import Choice, Mixture, Source
from picotrain.data.stream import Batch, Loader, validation_rows
from picotrain.data.units import WINDOW_SHARDS, Units, units
from picotrain.errors import DataError

SEQ_LEN, LANES = 15, 4


class Bytes:
    """Every UTF-8 byte is a token."""

    bos_id, vocab_size = 256, 257

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raw = [text.encode() for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8).astype(np.uint32), np.cumsum([0, *map(len, raw)])


def write(root: Path, letter: str, documents: int, shards: int = 2) -> Corpus:
    """A corpus whose text is one letter, so that a row says where it comes from."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(ord(letter))
    for index in range(shards + 1):
        texts = [letter * int(length) for length in rng.integers(10, 80, documents)]
        pq.write_table(pa.table({"text": texts}), root / f"{index}.parquet", row_group_size=4)
    return scan(root, letter)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    root = tmp_path_factory.mktemp("mixture")
    return Mixture(
        "mixed",
        (
            Source(write(root / "a", "a", 40), 0.6),
            Source(write(root / "b", "b", 24), 0.3, repeat=False),
            Source(write(root / "c", "c", 3), 0.1),  # fewer units than lanes
        ),
    )


@contextmanager
def ranks(data: Mixture | Corpus, dp_size: int = 1, state: State | None = None, **changes) -> Iterator[list[Loader]]:
    options = {"seq_len": SEQ_LEN, "unit_bytes": 200, "lanes": LANES, "seed": 3, "device_batch_size": 1, "rows_per_step": 4} | changes
    with ExitStack() as stack:
        yield [stack.enter_context(Loader(data, Bytes(), dp_rank=r, dp_size=dp_size, state=state, **options)) for r in range(dp_size)]


def steps(loaders: list[Loader], count: int) -> list[str]:
    """Rows in the order of the run, each as text."""
    rows = []
    for _ in range(count):
        for _ in range(4 // len(loaders)):
            rows += [text_of(next(each)) for each in loaders]
    return rows


def text_of(batch: Batch) -> str:
    return "".join(chr(id) for id in batch.inputs[0].tolist() if id < 256)


def letters(rows: list[str]) -> Counter[str]:
    return Counter(row[0] for row in rows)


@given(shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=5), lane=st.integers(0, 5000), start=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_stretch_of_a_lane_holds_each_source_by_its_weight(shares, lane, start):
    shares = [share / sum(shares) for share in shares]
    choice = Choice(shares, 1337, lane)
    drawn = Counter(choice.source(k) for k in range(start, start + 1000))
    for source, share in enumerate(shares):
        assert abs(drawn[source] - 1000 * share) <= 10


def test_lanes_do_not_draw_in_step():
    drawn = {tuple(Choice([0.5, 0.5], 1337, lane).source(k) for k in range(20)) for lane in range(32)}
    assert len(drawn) > 8


def test_the_share_of_a_source_that_left_goes_to_the_others_in_proportion():
    choice = Choice([0.5, 0.4, 0.1], 0, 0)
    assert choice.leave(0)
    drawn = Counter(choice.source(k) for k in range(1000))
    assert set(drawn) == {1, 2} and abs(drawn[1] - 800) <= 10
    assert choice.leave(2) and not choice.leave(1)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_a_mixture_gives_the_same_rows_to_any_number_of_ranks(mixture, dp_size):
    with ranks(mixture) as one, ranks(mixture, dp_size) as many:
        assert steps(one, 150) == steps(many, 150)


@given(stops=st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 2, 4])), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_mixture_stopped_anywhere_goes_on_exactly_past_a_source_that_ends(mixture, stops):
    with ranks(mixture) as loaders:
        expected = steps(loaders, sum(count for count, _ in stops) + 100)
    state = None
    for count, dp_size in [*stops, (100, 1)]:
        with ranks(mixture, dp_size, state) as loaders:
            got = steps(loaders, count)
            state = json.loads(json.dumps(merge_states([each.state for each in loaders])))
        assert got == expected[: len(got)]
        expected = expected[len(got) :]


def test_rows_come_by_weight_until_a_source_that_is_read_once_has_left(mixture):
    with ranks(mixture) as loaders:
        first = letters(steps(loaders, 40))
        assert abs(first["a"] - 96) <= 12 and abs(first["b"] - 48) <= 12
        rows = steps(loaders, 300)
        batch = next(loaders[0])
    assert set(letters(rows[-400:])) == {"a", "c"}
    assert abs(letters(rows[-400:])["a"] / 400 - 0.6 / 0.7) < 0.03
    assert batch.source_epochs[1] == 1.0
    assert batch.source_epochs[2] > batch.source_epochs[0] > 1  # small sources are read more often, and both repeat


def test_a_source_read_once_gives_every_row_of_one_epoch(mixture):
    b = mixture.sources[1].corpus
    alone = Mixture("b", (Source(b, 1.0, repeat=False), mixture.sources[2]))
    with ranks(alone) as loaders, ranks(b) as whole:
        mixed = [row for row in steps(loaders, 400) if row[0] == "b"]
        rows = []
        while (batch := next(whole[0])).epoch <= 1:
            rows.append(text_of(batch))
    assert sum(map(len, mixed)) == pytest.approx(sum(map(len, rows)), abs=len(rows[0]) * LANES)


def test_batches_count_rows_by_source(mixture):
    counted = Counter()
    with ranks(mixture, device_batch_size=2) as loaders:
        for _ in range(50):
            batch = next(loaders[0])
            assert sum(batch.source_rows) == 2
            counted.update({source: rows for source, rows in enumerate(batch.source_rows)})
    assert abs(counted[0] - 60) <= 8 and abs(counted[2] - 10) <= 5


def test_when_every_source_has_ended_it_is_said(mixture):
    once = Mixture("once", tuple(replace(source, repeat=False) for source in mixture.sources))
    with ranks(once) as loaders, pytest.raises(DataError, match="read once, and none repeats"):
        steps(loaders, 1000)


def test_a_checkpoint_of_other_sources_is_refused(mixture):
    with ranks(mixture) as loaders:
        state = loaders[0].state
    with pytest.raises(DataError, match="draws from 3 sources and this config from 1"), ranks(mixture.sources[0].corpus, state=state):
        pass


def test_validation_takes_each_source_by_its_share(mixture):
    rows = validation_rows(mixture, Bytes(), SEQ_LEN, 20, 200).rows
    drawn = Counter(chr(row[1]) for row in rows.tolist())
    assert drawn["a"] == 12 and drawn["b"] == 6 and drawn["c"] == 2


def test_a_mixture_survives_json_and_its_fingerprint_knows_weights_and_ends(mixture):
    again = Mixture.from_json(json.loads(json.dumps(mixture.to_json())))
    assert again == mixture and again.fingerprint == mixture.fingerprint
    one = Mixture.of(mixture.sources[0].corpus)
    assert Mixture.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.fingerprint == mixture.sources[0].corpus.fingerprint
    heavier = replace(mixture, sources=(replace(mixture.sources[0], weight=0.7), *mixture.sources[1:]))
    assert heavier.fingerprint != mixture.fingerprint


# -- the order of units


def test_an_epoch_takes_every_unit_once_window_by_window():
    num_shards = 3 * WINDOW_SHARDS + 5
    columns = np.array([(shard, rg, rg + 1, 10) for shard in range(num_shards) for rg in range(1 + shard % 4)])
    found = Units(columns)
    order = found.order(7, 2)
    assert sorted(order.tolist()) == list(range(len(found)))
    shards = [found[i].shard for i in order.tolist()]
    last_seen = {shard: place for place, shard in enumerate(shards)}
    first_seen = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    most_open = max(sum(first_seen[s] <= place <= last_seen[s] for s in first_seen) for place in range(len(shards)))
    assert most_open <= WINDOW_SHARDS
    assert order.tolist() != found.order(7, 3).tolist() != found.order(8, 3).tolist()


# -- what cannot be read


def damage(corpus: Corpus, shard: int) -> str:
    """Flip bytes in the middle of a shard's data, keeping size, footer and time."""
    path = corpus.root / corpus.shards[shard].name
    raw = bytearray(path.read_bytes())
    raw[4:200] = b"\xff" * 196
    path.write_bytes(raw)
    return path.name


def test_a_damaged_shard_is_named_with_row_group_and_document(tmp_path):
    corpus = write(tmp_path / "x", "x", 40)
    name = damage(corpus, 0)
    with ranks(corpus) as loaders, pytest.raises(DataError, match=rf"{name}, row group \d+, document \d+ cannot be read"):
        steps(loaders, 100)


def test_what_comes_before_a_damaged_unit_is_ready_and_the_failure_known_before_the_step(tmp_path):
    corpus = write(tmp_path / "x", "x", 40)
    damage(corpus, 0)
    with ranks(corpus) as loaders:
        good = 0
        while loaders[0].look_ahead(4) is None:
            steps(loaders, 1)
            good += 1
        assert isinstance(loaders[0].look_ahead(4), DataError)
        assert loaders[0].state["row"] == 4 * good


def test_a_damaged_unit_is_passed_over_and_noted_when_asked_to(tmp_path):
    corpus = write(tmp_path / "x", "x", 40)
    name = damage(corpus, 0)
    with ranks(corpus, on_bad_shard="skip") as loaders:
        rows = steps(loaders, 200)
        notes = loaders[0].skipped()
        assert len(rows) == 800 and all(f"{name}, row group" in note for note in notes) and notes
        assert loaders[0].skipped() == [] or loaders[0].skipped() == []
    with ranks(corpus, 2, on_bad_shard="skip") as loaders:
        assert steps(loaders, 200) == rows


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_unit_damaged_while_a_lane_stands_in_it_is_passed_over_after_the_resume(tmp_path, dp_size):
    corpus = write(tmp_path / "x", "x", 40)
    with ranks(corpus) as loaders:
        steps(loaders, 3)
        state = loaders[0].state
    damage(corpus, 0)
    damage(corpus, 1)
    with pytest.raises(DataError, match="cannot be read"), ranks(corpus, state=state) as loaders:
        steps(loaders, 1)
    with ranks(corpus, dp_size, state, on_bad_shard="skip") as loaders:
        rows = steps(loaders, 20)
        assert len(rows) == 80 and any(loader.skipped() for loader in loaders)


def test_a_corpus_of_damaged_shards_alone_is_refused_even_when_skipping(tmp_path):
    corpus = write(tmp_path / "x", "x", 40, shards=1)
    (corpus.root / corpus.shards[0].name).unlink()
    with ranks(corpus, on_bad_shard="skip") as loaders, pytest.raises(DataError, match="no readable unit"):
        steps(loaders, 100)


def test_a_shard_that_was_rewritten_with_the_same_size_is_refused(tmp_path):
    corpus = write(tmp_path / "x", "x", 40)
    path = corpus.root / corpus.shards[0].name
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 1  # in the footer
    path.write_bytes(raw)
    with ranks(corpus) as loaders, pytest.raises(DataError, match=r"0.parquet"):
        steps(loaders, 200)


def test_units_know_shards_and_bytes(mixture):
    corpus = mixture.sources[0].corpus
    found = units(corpus.shards, 200)
    assert sum(unit.text_bytes for unit in found) == corpus.text_bytes
    assert sorted({unit.shard for unit in found}) == [0, 1]
