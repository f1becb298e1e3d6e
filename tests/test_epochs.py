"""An epoch trains every token once, whatever the lanes, the ranks and the stops; how long it is, is counted where that is quick."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import lines, losses, picotrain, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain import run as runs
from picotrain.config import compose
from picotrain.data import counts
from picotrain.data.corpus import Corpus, scan
from picotrain.data.lanes import merge_states
from picotrain.data.mixture import Mixture, Source
from picotrain.data.shares import Shares
from picotrain.data.slices import slice_bytes, tokenized
from picotrain.data.stream import Loader
from picotrain.data.units import Units, units
from picotrain.errors import DataError

SEQ_LEN, UNIT_BYTES = 15, 400


class Numbered:
    """A document says which ids it stands for, "first number ...", so that every token of a corpus is another id."""

    bos_id, vocab_size, fingerprint = 0, 1 << 20, "numbered"

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        spans = [tuple(map(int, text.split()[:2])) for text in texts]
        ids = [np.arange(first, first + length, dtype=np.uint32) for first, length in spans]
        return np.concatenate([*ids, np.zeros(0, np.uint32)]), np.cumsum([0, *(length for _, length in spans)])


def write(root: Path, lengths: list[int], group: int, padding: int = 1) -> tuple[Corpus, int]:
    """A corpus of documents of these many tokens, with about `padding` bytes of text a token; its tokens are 1 to n, also returned."""
    root.mkdir(parents=True, exist_ok=True)
    firsts = np.cumsum([1, *lengths]).tolist()
    texts = [f"{first} {length} " + "x" * (padding * length) for first, length in zip(firsts, lengths, strict=False)]
    for name, part in (("0", texts[::2]), ("1", texts[1::2]), ("2", ["900000 100"])):
        pq.write_table(pa.table({"text": pa.array(part, pa.string())}), root / f"{name}.parquet", row_group_size=group)
    return scan(root, "numbered"), firsts[-1] - 1


def counted(corpus: Corpus | Mixture, seed: int, cache: Path) -> Mixture:
    return counts.count(Mixture.of(corpus), Numbered(), Numbered.fingerprint, SEQ_LEN, UNIT_BYTES, seed, cache, lambda _: None)


def taken(
    data: Corpus | Mixture, rows: int, lanes: int, seed: int, stops: list[tuple[int, int]], tokens: int
) -> tuple[np.ndarray, list[list[int]]]:
    """How often each token stands in the first `rows` rows of a run that stops after so many rows and goes on with so many ranks; and
    these rows, in order. Every step has as many rows as there are lanes."""
    seen, found, state = np.zeros(tokens + 1, np.int64), [], None
    for until, ranks in [*stops, (rows, 1)]:
        steps = -(-min(until, rows) // lanes) - len(found) // lanes
        with ExitStack() as stack:
            options = {"seq_len": SEQ_LEN, "unit_bytes": UNIT_BYTES, "lanes": lanes, "seed": seed, "state": state, "rows_per_step": lanes}
            each = [
                stack.enter_context(Loader(data, Numbered(), **options, device_batch_size=lanes // ranks, dp_rank=rank, dp_size=ranks))
                for rank in range(ranks)
            ]
            for _ in range(steps):
                batches = [next(loader) for loader in each]
                rows_of = [np.concatenate([b.inputs.numpy(), b.targets.numpy()[:, -1:]], axis=1).tolist() for b in batches]
                found += [row for at_once in zip(*rows_of, strict=True) for row in at_once]
            state = json.loads(json.dumps(merge_states([loader.state for loader in each])))
    for row in found[:rows]:
        assert row[0] == 0 and len(row) == SEQ_LEN + 1
        np.add.at(seen, [id for id in row if 0 < id < 900000], 1)
    return seen[1:], found


@given(
    lengths=st.lists(st.one_of(st.integers(1, 60), st.integers(1, 900)), min_size=12, max_size=70),
    group=st.sampled_from([1, 3, 8]),
    padding=st.sampled_from([1, 3]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_every_token_of_a_counted_corpus_is_trained_once_in_the_first_epoch_but_for_the_tails_of_units(lengths, group, padding, seed, data):
    with TemporaryDirectory() as folder:
        corpus, tokens = write(Path(folder, "corpus"), lengths, group, padding)
        mixture = counted(corpus, seed, Path(folder))
        rows, num_units = mixture.epoch_rows, len(units(corpus.shards, UNIT_BYTES))
        if not rows:
            return
        lanes = data.draw(st.integers(1, min(num_units, 12)), "lanes")
        ranks = st.sampled_from([n for n in range(1, lanes + 1) if lanes % n == 0])
        stops = sorted(data.draw(st.lists(st.tuples(st.integers(0, rows), ranks), max_size=3), "stops"))
        seen, found = taken(mixture, rows, lanes, seed, stops, tokens)
        assert seen.max() == 1
        assert (seen == 0).sum() <= num_units * SEQ_LEN
        straight, expected = taken(mixture, rows, lanes, seed, [], tokens)
        assert found == expected and (seen == straight).all()


@pytest.mark.parametrize(("num_units", "lanes"), [(9, 8), (83, 64), (17, 16), (5, 4), (8, 8), (30, 7)])
def test_any_whole_number_of_epochs_trains_every_token_as_often_within_a_percent(tmp_path, num_units, lanes):
    rng = np.random.default_rng(num_units)
    group = 40  # documents of 30 tokens: a unit has about 75 rows, and its last one is half a percent
    lengths = rng.integers(10, 50, 2 * group * num_units).tolist()
    corpus, tokens = write(tmp_path / "corpus", lengths, 2 * group)
    there = len(units(corpus.shards, UNIT_BYTES))
    assert there in (num_units, num_units + 1)
    mixture = counted(corpus, 5, tmp_path)
    for epochs in (1, 3) if there < 20 else (1,):
        seen, _ = taken(mixture, epochs * mixture.epoch_rows, lanes, 5, [], tokens)
        assert np.abs(seen - epochs).sum() <= 0.01 * epochs * tokens


def test_the_first_epoch_is_as_even_where_units_are_only_weighed_by_their_bytes(tmp_path):
    lengths = np.random.default_rng(1).integers(10, 50, 2 * 40 * 9).tolist()
    corpus, tokens = write(tmp_path, lengths, 80, padding=4)
    rows = counted(corpus, 5, tmp_path).epoch_rows
    seen, _ = taken(corpus, rows, 8, 5, [], tokens)
    assert np.abs(seen - 1).sum() <= 0.03 * tokens  # whole units alone: 30 %


def test_a_mixture_of_small_sources_trains_each_token_of_a_source_once_before_any_again(tmp_path):
    """Fewer units than lanes: the lanes share them."""
    small, tokens = write(tmp_path / "small", np.random.default_rng(2).integers(10, 50, 400).tolist(), 100)
    large, _ = write(tmp_path / "large", np.random.default_rng(3).integers(10, 50, 4000).tolist(), 100)
    assert len(units(small.shards, UNIT_BYTES)) < 8 <= len(units(large.shards, UNIT_BYTES))
    large = Mixture.of(large).sources[0]
    mixture = counted(Mixture("mixed", (Source(small, 0.25), replace(large, weight=0.75))), 5, tmp_path)

    lanes, rows = 8, mixture.sources[0].epoch_rows
    seen = np.zeros(tokens + 1, np.int64)
    options = {"seq_len": SEQ_LEN, "unit_bytes": UNIT_BYTES, "lanes": lanes, "seed": 5, "rows_per_step": 1, "device_batch_size": 1}
    drawn = 0
    with Loader(mixture, Numbered(), **options) as loader:
        while drawn < rows:
            batch = next(loader)
            if batch.source_rows[0]:
                drawn += 1
                ids = np.append(batch.inputs[0].numpy(), batch.targets[0, -1])
                np.add.at(seen, ids[ids > 0], 1)
    assert batch.source_epochs[0] == pytest.approx(1, abs=0.01)
    assert np.abs(seen[1:] - 1).sum() <= 0.03 * tokens  # a lane draws from a source by weight within a few rows


# -- real text, through the command


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own text in row groups of about 64 KB, nine of which are trained on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-h]*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files if path.stat().st_size < 30_000]
    root = tmp_path_factory.mktemp("stdlib")
    parts = [texts[len(texts) * i // 10 : len(texts) * (i + 1) // 10] for i in range(10)]
    for name, groups in (("0", parts[:5]), ("1", parts[5:9]), ("2", parts[9:])):
        with pq.ParquetWriter(root / f"{name}.parquet", pa.schema([("text", pa.string())])) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": group}))
    return root


@pytest.mark.parametrize("lanes", [8, 4])
def test_one_epoch_of_real_text_is_every_row_once_and_the_steps_are_counted(tmp_path, stdlib, tiny, lanes):
    words = [word for word in tiny(tmp_path / "run", f"data.path={stdlib}", "data.unit_bytes=1", f"data.lanes={lanes}", "run.seed=3")]
    words = [word for word in words if not word.startswith("train.max_steps")] + ["train.num_train_epochs=1"]
    _, plan, data, tokenizer = runs.gather(runs.resolve(compose(words)), lambda _: None)
    (source,) = data.sources
    found = units(source.corpus.shards, plan.unit_bytes)
    assert len(found) == 9
    every: Counter[bytes] = Counter()
    tokens = dropped = 0
    for index, unit in enumerate(found):
        for number, part in enumerate(tokenized(source.corpus.files, source.corpus.shards[unit.shard], unit, tokenizer, slice_bytes(1))):
            packed = part.pack(tokenizer, plan.seq_len, (3, 0, index, number))
            every.update(row.tobytes() for row in packed.rows)
            tokens, dropped = tokens + int(part.offsets[-1]), dropped + packed.dropped_tokens
    assert dropped < 0.01 * tokens
    rows = sum(every.values())
    assert plan.epoch_rows == rows and plan.num_steps == -(-rows // plan.rows_per_step) and plan.epochs == pytest.approx(1, abs=0.01)
    with Loader(data, tokenizer, **{**plan.stream, "device_batch_size": 1}, seed=3) as loader:
        trained: Counter[bytes] = Counter()
        for _ in range(rows):
            batch = next(loader)
            trained.update([np.append(batch.inputs[0].numpy(), batch.targets[0, -1]).astype(np.uint16).tobytes()])
    assert trained == every
    assert batch.epoch == pytest.approx(1.0)


def num_train_epochs(words: list[str], epochs: float) -> list[str]:
    return [*(word for word in words if not word.startswith("train.max_steps")), f"train.num_train_epochs={epochs}"]


def test_a_run_of_one_epoch_ends_at_epoch_one_and_the_plan_says_the_same_before(tmp_path, tiny):
    run = tmp_path / "run"
    words = num_train_epochs(tiny(run, f"data.path={write_corpus(tmp_path / 'corpus', documents=150)}", "train.eval_every=0"), 1)
    before = picotrain("plan", *words)
    assert "estimated from the bytes of the text: its rows are counted when" in before.stdout
    done = picotrain("train", *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads((run / "plan.json").read_text())
    assert plan["epoch_rows"] > 0 and plan["num_steps"] == -(-plan["epoch_rows"] // 8)
    assert lines(run, "train")[-1]["epoch"] == pytest.approx(1, abs=1 / plan["num_steps"])
    again = json.loads(picotrain("plan", *words, "--json").stdout)
    assert (again["num_steps"], again["epoch_rows"]) == (plan["num_steps"], plan["epoch_rows"])
    other = json.loads(picotrain("plan", *words, "--json", "run.seed=77", "train.seq_len=16").stdout)
    assert other["epoch_rows"] > 1.8 * plan["epoch_rows"]  # from the same counts


def test_a_run_from_before_shares_goes_on_in_its_own_order(tmp_path, tiny):
    parted, straight = tmp_path / "parted", tmp_path / "straight"
    for run, *steps in ((parted, 3, 6), (straight, 6)):
        assert picotrain("train", *tiny(run, "train.max_steps=3", "data.lanes=16", "train.eval_every=0")).returncode == 0
        new_order = losses(run)
        for name, keys in (("plan.json", ["sharing", "epoch_rows"]), ("data.json", ["unit_rows"])):
            written = json.loads((run / name).read_text())
            for key in keys:
                del (written["corpus"] if name == "data.json" else written)[key]
            (run / name).write_text(json.dumps(written))
        shutil.rmtree(run / "checkpoints")
        (run / "summary.json").unlink()
        for last in steps:
            done = picotrain("resume", str(run), f"train.max_steps={last}")
            assert done.returncode == 0, done.stderr
        assert losses(run)[:3] != new_order
    assert losses(parted) == losses(straight)
    assert json.loads((parted / "plan.json").read_text())["sharing"] == "dealt"


def test_text_that_cannot_be_read_is_said_before_the_first_step_while_it_is_counted(tmp_path, tiny):
    corpus, run = write_corpus(tmp_path / "corpus", seed=9), tmp_path / "run"
    words = tiny(run, f"data.path={corpus}")
    assert picotrain("tokenizer", "train", *words).returncode == 0
    path = corpus / "shard_00001.parquet"
    raw = bytearray(path.read_bytes())
    raw[4:400] = b"\xff" * 396
    path.write_bytes(raw)
    done = picotrain("train", *words)
    assert done.returncode == 2 and "shard_00001.parquet, row group 0, document 0 cannot be read" in done.stderr
    assert "data.on_bad_shard=skip" in done.stderr and not (run / "metrics.jsonl").exists()


# -- the parts


@pytest.fixture
def some(tmp_path: Path) -> Corpus:
    return write(tmp_path / "corpus", [30] * 40, 8)[0]


def test_counts_that_were_kept_are_used_and_damaged_ones_measured_again(tmp_path, some):
    first = counted(some, 1, tmp_path)
    (kept,) = (tmp_path / "lengths").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], whole[:200] + b"\xff" * 20 + whole[220:]):
        kept.write_bytes(damaged)
        assert counts.known(Mixture.of(some), "numbered", SEQ_LEN, UNIT_BYTES, 1, tmp_path) == Mixture.of(some)
        assert counted(some, 1, tmp_path) == first
    assert kept.read_bytes() == whole
    assert counts.known(Mixture.of(some), "another tokenizer", SEQ_LEN, UNIT_BYTES, 1, tmp_path) == Mixture.of(some)


def test_a_corpus_with_its_rows_survives_json_and_rows_that_are_none_are_refused(tmp_path, some):
    found = counted(some, 1, tmp_path)
    described = json.loads(json.dumps(found.to_json()))
    assert Mixture.from_json(described) == found and found.fingerprint == some.fingerprint
    for bad in ([[-1]], [[1.5]], [["1"]], 7, [[None]]):
        with pytest.raises(DataError, match="unit_rows"):
            Mixture.from_json({**described, "unit_rows": bad})
    with pytest.raises(DataError, match=r"rows of 1 units were counted"):
        Loader(
            Mixture("x", (Source(some, rows=((3,),)),)), Numbered(),
            seq_len=SEQ_LEN, unit_bytes=UNIT_BYTES, lanes=1, seed=0, device_batch_size=1, rows_per_step=1,
        )  # fmt: skip


def test_large_corpora_and_those_elsewhere_are_not_counted(tmp_path, some, monkeypatch):
    monkeypatch.setattr(counts, "COUNT_BYTES", some.text_bytes - 1)
    assert counted(some, 1, tmp_path).epoch_rows is None
    monkeypatch.setattr(counts, "COUNT_BYTES", some.text_bytes)
    assert counted(some, 1, tmp_path).epoch_rows


def turns(shares: Shares, lanes: int, epoch: int) -> Iterator[tuple[int, int]]:
    """(unit, size taken) of every turn of an epoch."""
    for lane in range(lanes):
        for turn in shares.turns(lane, epoch * len(shares.units)):
            if turn.position >= (epoch + 1) * len(shares.units):
                break
            yield shares.at(turn.position)[1], turn.last - turn.first


def test_a_large_corpus_is_dealt_out_whole_and_only_its_rest_is_shared():
    """So that neighbours in the stream come from one window of shards, and next to nothing is tokenized twice."""
    rng = np.random.default_rng(0)
    num_units, lanes = 6000, 64
    sizes = rng.integers(900, 1300, num_units)
    shares = Shares(Units(np.array([(unit // 20, unit % 20, unit % 20 + 1, 1) for unit in range(num_units)])), sizes, lanes, 3)
    for epoch in (0, 4):
        found = list(turns(shares, lanes, epoch))
        assert len(found) <= num_units + lanes
        whole = sum(taken == sizes[unit] for unit, taken in found)
        assert whole > 0.9 * num_units
