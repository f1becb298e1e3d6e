"""Where validation documents are from: the column `source`, up to its first colon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picotrain.data import origins
from picotrain.data.corpus import Corpus, scan
from picotrain.data.mixture import Mixture, Source
from picotrain.data.origins import Document, validation_documents, validation_origins
from picotrain.data.stream import validation_rows
from picotrain.errors import DataError

BOS = 256


class ByteTokenizer:
    """Every UTF-8 byte is a token."""

    bos_id, vocab_size = BOS, 257

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raw = [text.encode() for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8).astype(np.uint32), np.cumsum([0, *map(len, raw)])


def write(root: Path, texts: list[str | None], sources: list | None = None, name: str = "files") -> Corpus:
    root.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["training"]}), root / "0.parquet")
    columns = {"text": pa.array(texts, pa.string())} | ({} if sources is None else {"source": pa.array(sources)})
    pq.write_table(pa.table(columns), root / "1.parquet", row_group_size=2)
    return scan(root, name)


def test_documents_come_in_file_order_with_what_stands_before_the_colon(tmp_path: Path):
    corpus = write(tmp_path / "c", ["one", None, "three", "four", ""], ["web:a/b:c", "books", None, "", "web"])
    expected = [("one", "web"), ("", "books"), ("three", "unknown"), ("four", "unknown"), ("", "web")]
    assert list(validation_documents(corpus)) == [Document(*pair) for pair in expected]
    found = validation_origins(corpus)
    assert found and [found.names[i] for i in found.of] == [origin for _, origin in expected]


def test_an_even_spread_is_a_fixed_one(tmp_path: Path):
    corpus = write(tmp_path / "c", [str(i) for i in range(10)])
    assert [one.text for one in validation_documents(corpus, 4)] == ["0", "2", "5", "7"]
    assert [one.text for one in validation_documents(corpus, 1)] == ["0"]
    assert len(list(validation_documents(corpus, 10))) == len(list(validation_documents(corpus, 99))) == 10


def test_a_corpus_without_the_column_or_with_one_origin_has_none(tmp_path: Path):
    plain = write(tmp_path / "plain", ["a", "b"])
    assert validation_origins(plain) is None
    assert [one.origin for one in validation_documents(plain)] == ["", ""]
    assert validation_origins(write(tmp_path / "one", ["a", "b"], ["web:1", "web:2"])) is None


def test_origins_in_a_mixture_are_led_by_the_name_of_their_corpus(tmp_path: Path):
    first = write(tmp_path / "a", ["1", "2"], ["web:x", "books"], "english")
    mixture = Mixture("both", (Source(first), Source(write(tmp_path / "b", ["3"], name="german"))))
    found = [("1", "english/web"), ("2", "english/books"), ("3", "german")]
    assert list(validation_documents(mixture)) == [Document(*pair) for pair in found]


def test_the_rarest_of_many_origins_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(origins, "MOST", 2)
    sources = ["b", "a", "c", "a", "b", "d"]
    corpus = write(tmp_path / "c", list("123456"), sources)
    assert [one.origin for one in validation_documents(corpus)] == ["b", "a", "other", "a", "b", "other"]
    found = validation_origins(corpus)
    assert found and found.names == ["a", "b", "other"]


@pytest.mark.parametrize("column", [[[1], [2]], [{"a": 1}, {"a": 2}]])
def test_a_column_that_holds_no_text_is_an_error_that_names_it(tmp_path: Path, column: list):
    corpus = write(tmp_path / "c", ["a", "b"], column)
    with pytest.raises(DataError, match="1.parquet: its column 'source' cannot be read"):
        list(validation_documents(corpus))


def test_every_token_of_a_row_belongs_to_its_document(tmp_path: Path):
    texts, sources = ["aaaaa", "bbb", "cccccccc", "a", "bb"], ["a", "b", "c", "a", "b"]
    corpus = write(tmp_path / "c", texts, sources)
    packed = validation_rows(corpus, ByteTokenizer(), 7, None, 1)
    found = validation_origins(corpus)
    assert found is not None
    of = found.of_tokens(packed)
    assert of.shape == packed.rows.shape and len(of)
    for id, origin in zip(packed.rows.flatten().tolist(), of.flatten().tolist(), strict=True):
        assert id == BOS or chr(id) == found.names[origin]
