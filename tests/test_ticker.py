"""Lines that tell how far long work is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from picotrain import ticker, tokenizer
from picotrain.config.schema import TokenizerConfig
from picotrain.data import sources, tokenizers
from picotrain.data.corpus import scan


def waits_for(said: list[str], text: str) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if any(text in line for line in said):
            return True
        time.sleep(0.01)
    return False


def test_long_work_is_told_now_and_then_and_when_it_is_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ticker, "EVERY_S", 0.02)
    said: list[str] = []
    with ticker.lines(said.append) as show:
        show("reading", 0, 0)
        assert waits_for(said, "reading: 0:00 so far")
        show("bits", 3, 1200)
        assert waits_for(said, "bits: 3/1,200")
        show("bits", 1200, 1200)
        time.sleep(0.1)
    assert said[-1] == "bits: 1,200/1,200 in 0:00"  # once, and nothing after it
    before = len(said)
    time.sleep(0.1)
    assert len(said) == before


def test_short_work_is_not_told():
    said: list[str] = []
    with ticker.lines(said.append) as show:
        for i in range(5):
            show("task", i + 1, 5)
    assert said == []


def test_training_a_tokenizer_tells_how_much_it_has_read(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ticker, "EVERY_S", 0.02)
    said: list[str] = []
    sample = sources.Mixture.sample

    def slow(self: sources.Mixture, max_bytes: int, *rest: object) -> Iterator[str]:
        for i, text in enumerate(sample(self, max_bytes, *rest)):  # type: ignore[arg-type]
            if i == 5:
                assert waits_for(said, "training the tokenizer: read ")
            yield text

    def train(texts: Iterator[str], *rest: object) -> None:
        kept = list(texts)
        assert waits_for(said, "merging")
        train_tokenizer(kept, *rest)  # type: ignore[arg-type]

    train_tokenizer = tokenizer.train_tokenizer
    monkeypatch.setattr(sources.Mixture, "sample", slow)
    monkeypatch.setattr(tokenizer, "train_tokenizer", train)
    section = TokenizerConfig(kind="bpe", vocab_size=300, train_bytes=200_000, path=None, encoder="auto")
    tokenizers.obtain_tokenizer(section, scan(corpus_dir, "corpus", None), tmp_path, said.append)
    assert said[0].startswith("training a tokenizer of 300 tokens")
