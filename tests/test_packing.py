"""Packing: rows without padding, made of true spans, by the design's rule; permutations that never change."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain.data.packing import DOCUMENTS, ROWS, Packed, concatenate, pack, permutation, row_dtype

BOS = 60_000


class Piece(NamedTuple):
    rank: int
    doc: int
    first: int
    tokens: list[int]


def reference_rows(documents: list[list[int]], order: list[int], row_len: int) -> tuple[list[list[tuple[int, int, int]]], int]:
    """The rule as the design words it: for each full row its (document, first token, length) spans, and the tokens dropped."""
    pool = [Piece(rank, doc, 0, documents[doc]) for rank, doc in enumerate(order) if documents[doc]]
    rows, row, room = [], [], row_len
    while pool:
        fitting = [piece for piece in pool if 1 + len(piece.tokens) <= room]
        if fitting:
            piece = max(fitting, key=lambda piece: (len(piece.tokens), -piece.rank))
            pool.remove(piece)
            taken = piece.tokens
        else:
            piece = min(pool, key=lambda piece: piece.rank)
            pool.remove(piece)
            taken = piece.tokens[: room - 1]
            pool.append(piece._replace(first=piece.first + len(taken), tokens=piece.tokens[len(taken) :]))
        row.append((piece.doc, piece.first, len(taken)))
        room -= 1 + len(taken)
        if room == 0:
            rows.append(row)
            row, room = [], row_len
    return rows, sum(length for _, _, length in row)


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([token for document in documents for token in document], dtype=np.uint32)
    return ids, np.cumsum([0] + [len(document) for document in documents])


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token in a wrong place is seen."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def spans_of(packed: Packed) -> list[list[tuple[int, int, int]]]:
    spans = list(zip(packed.span_doc.tolist(), packed.span_first.tolist(), packed.span_len.tolist(), strict=True))
    return [spans[start:end] for start, end in zip(packed.span_ptr[:-1], packed.span_ptr[1:], strict=True)]


def assert_spans_are_true(packed: Packed, documents: list[list[int]], row_len: int) -> None:
    """Every row is exactly its spans: `<|bos|>` and a piece of a document, with nothing in between or behind."""
    for row, spans in zip(packed.rows.tolist(), spans_of(packed), strict=True):
        assert row == [token for doc, first, length in spans for token in [BOS, *documents[doc][first : first + length]]]
        assert len(row) == row_len


lengths_and_row_len = st.tuples(st.lists(st.integers(0, 40), max_size=40), st.integers(2, 24))


@given(lengths_and_row_len, st.tuples(st.integers(0, 2**40), st.integers(0, 5)))
def test_rows_are_those_of_the_rule_in_the_order_of_the_second_permutation(case, key):
    lengths, row_len = case
    documents = documents_of(lengths)
    packed = pack(*flat(documents), BOS, row_len, key, np.uint16)
    rows, dropped = reference_rows(documents, permutation(len(documents), *key, DOCUMENTS).tolist(), row_len)
    assert spans_of(packed) == [rows[i] for i in permutation(len(rows), *key, ROWS)]
    assert packed.dropped_tokens == dropped
    assert_spans_are_true(packed, documents, row_len)


@given(lengths_and_row_len)
def test_without_a_key_documents_and_rows_keep_their_order(case):
    lengths, row_len = case
    documents = documents_of(lengths)
    packed = pack(*flat(documents), BOS, row_len, None, np.uint32)
    assert (spans_of(packed), packed.dropped_tokens) == reference_rows(documents, list(range(len(documents))), row_len)
    assert_spans_are_true(packed, documents, row_len)


@given(lengths_and_row_len, st.integers(0, 2**40))
def test_every_token_is_in_exactly_one_row_or_dropped(case, seed):
    lengths, row_len = case
    documents = documents_of(lengths)
    packed = pack(*flat(documents), BOS, row_len, (seed,), np.uint16)
    seen = np.sort(packed.rows[packed.rows != BOS])
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) + packed.dropped_tokens == sum(lengths)
    assert packed.dropped_tokens < row_len
    assert packed.span_len.sum() == len(seen)


def test_one_slot_left_takes_a_lone_bos_and_leaves_the_next_document_whole():
    packed = pack(*flat([[1, 2], [3, 4, 5], [6]]), BOS, 4, None, np.uint16)
    # Row 0: the largest that fits is document 1. Row 1: document 0 fits, and one slot stays for document 2's <|bos|>.
    assert packed.rows.tolist() == [[BOS, 3, 4, 5], [BOS, 1, 2, BOS]]
    assert spans_of(packed)[1] == [(0, 0, 2), (2, 0, 0)]
    assert packed.dropped_tokens == 1


def test_a_document_of_more_than_a_hundred_rows_comes_in_order_and_whole():
    documents = documents_of([1500, 4, 5])
    packed = pack(*flat(documents), BOS, 11, None, np.uint16)
    pieces = [span for spans in spans_of(packed) for span in spans if span[0] == 0]
    assert len(pieces) > 100
    assert [first for _, first, _ in pieces] == np.cumsum([0] + [length for _, _, length in pieces])[:-1].tolist()
    assert_spans_are_true(packed, documents, 11)


def test_too_little_text_for_a_row_gives_no_row():
    for lengths in ([], [0, 0], [8]):
        packed = pack(*flat(documents_of(lengths)), BOS, 10, (1,), np.uint16)
        assert packed.rows.shape == (0, 10)
        assert packed.span_ptr.tolist() == [0]
        assert packed.dropped_tokens == sum(lengths)


def test_long_documents_do_not_come_first():
    """Best-fit packs the long ones first; the second permutation spreads them over the rows."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4.5, 1.0, 6000).astype(int)
    packed = pack(np.zeros(lengths.sum(), np.uint32), np.cumsum([0, *lengths]), BOS, 257, (3, 0, 7), np.uint16)
    per_row = np.array([np.mean([lengths[doc] for doc, _, _ in spans]) for spans in spans_of(packed)])
    quarter = len(per_row) // 4
    first, last = per_row[:quarter], per_row[-quarter:]
    noise = np.sqrt(first.var() / quarter + last.var() / quarter)
    assert abs(first.mean() - last.mean()) < 4 * noise
    in_placement_order = per_row[np.argsort(permutation(len(per_row), 3, 0, 7, ROWS))[: len(per_row)]]
    start, end = in_placement_order[:quarter], in_placement_order[-quarter:]
    assert abs(start.mean() - end.mean()) > 4 * noise  # so that the test would see it


@given(st.lists(lengths_and_row_len.map(lambda case: case[0]), min_size=1, max_size=4), st.integers(0, 30))
@settings(max_examples=50)
def test_concatenated_parts_keep_their_rows_and_spans(parts_of_lengths, max_rows):
    parts = [pack(*flat(documents_of(lengths)), BOS, 9, None, np.uint16) for lengths in parts_of_lengths]
    whole = concatenate(parts, max_rows)
    assert whole.rows.tolist() == [row for part in parts for row in part.rows.tolist()][:max_rows]
    assert spans_of(whole) == [spans for part in parts for spans in spans_of(part)][:max_rows]


def test_permutations_are_those_of_the_runs_made_so_far():
    """Old runs stay reproducible only while these never change; splitmix64's own first outputs are from its reference C code."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def splitmix64(state: int) -> int:
        z = (state + golden) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert splitmix64(1234567) == 6457827717110365317  # as published with the algorithm
    state = splitmix64((splitmix64(1337) + 2) & mask)
    hashes = [splitmix64((state + i * golden) & mask) for i in range(100)]
    assert permutation(100, 1337, 2).tolist() == sorted(range(100), key=hashes.__getitem__)
    assert permutation(8, 1337, 0).tolist() == [2, 5, 1, 0, 6, 4, 7, 3]


@given(st.integers(0, 200), st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_a_permutation_holds_every_index_once(n, key):
    assert sorted(permutation(n, *key).tolist()) == list(range(n))


def test_permutations_of_different_keys_differ_and_show_no_pattern():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert len({tuple(permutation(20, *key).tolist()) for key in keys}) == len(keys)
    places = np.stack([permutation(10, seed, 0) for seed in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)  # every index is equally often in every place


def test_rows_take_the_smallest_type_that_holds_every_id():
    assert row_dtype(32_768) is np.uint16
    assert row_dtype(65_536) is np.uint16
    assert row_dtype(65_537) is np.uint32


def test_packing_slices_and_lanes_do_not_import_torch():
    code = "import sys, picotrain.data.packing, picotrain.data.slices, picotrain.data.lanes; print({'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
