"""`picotrain tokenizer eval`, and what it measures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picotrain

from picotrain import compression
from picotrain.compression import CODE, LANGUAGES, evaluate, known_vocabularies, shipped_texts
from picotrain.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

DOCUMENTS = ["the cat sees the river. " * 20, "a grey dog follows the naïve café", "", "日本の本 🙂 <|bos|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([*DOCUMENTS, *shipped_texts().values()], 600, path)
    return load_tokenizer(path)


def test_the_shipped_texts_are_short_and_of_their_script() -> None:
    texts = shipped_texts()
    assert set(CODE) | set(LANGUAGES) < set(texts)
    for name, text in texts.items():
        assert 400 <= len(text.encode()) <= 1300, name
    for name, letter in {
        "russian": "ж",
        "greek": "ω",
        "arabic": "ن",
        "hindi": "क",
        "chinese": "的",
        "japanese": "の",
        "korean": "다",
    }.items():
        assert letter in texts[name], name
    folder = Path(compression.__file__).parent / "texts"
    assert {path.stem for path in folder.iterdir()} == set(texts)  # none is forgotten in the list


def test_bytes_per_token_speed_and_used_vocabulary(tokenizer: Tokenizer) -> None:
    results = evaluate(tokenizer, DOCUMENTS, {"bytes": lambda text: len(text.encode())})
    validation = results.texts["validation"]
    ids = [id for text in DOCUMENTS for id in tokenizer.encode(text)]
    assert validation.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert validation.bytes_per_token == pytest.approx(validation.bytes / len(ids))
    assert (validation.bytes_per_token_of("bytes"), validation.bytes_per_token_of("gpt2")) == (1.0, None)
    assert results.used == pytest.approx(len(set(ids)) / 599)  # of all but <|bos|>
    assert results.encode_mb_per_s > 0
    assert results.failures == []
    assert list(results.texts) == ["validation", *shipped_texts()]


def test_a_text_that_does_not_come_back_is_named(tokenizer: Tokenizer) -> None:
    class Lossy:
        """Loses what is Greek."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text.replace("ω", "o"))

        def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            return tokenizer.encode_flat([text.replace("ω", "o") for text in texts])

    results = evaluate(Lossy(), [*DOCUMENTS, "ω"], {})  # type: ignore[arg-type]
    assert results.failures == ["validation document 4", "greek"]


def test_a_vocabulary_is_used_where_its_file_is_whole_and_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    bytewise = tiktoken.Encoding("o200k_base", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    asked: list[str] = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or bytewise)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert known_vocabularies() == {}

    (url,) = compression.VOCABULARIES["o200k_base"]
    file = tmp_path / hashlib.sha1(url.encode()).hexdigest()
    file.write_bytes(b"cut short")
    assert known_vocabularies() == {}
    assert asked == []
    monkeypatch.setitem(compression.VOCABULARIES, "o200k_base", {url: hashlib.sha256(b"cut short").hexdigest()})
    assert known_vocabularies()["o200k_base"]("naïve") == 6
    assert asked == ["o200k_base"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken's way to say: keep nothing
    assert known_vocabularies() == {}


def common(corpus_dir: Path) -> list[str]:
    return ["data=files", f"data.path={corpus_dir}", "tokenizer.vocab_size=300", "tokenizer.train_bytes=200000"]


@pytest.fixture(autouse=True)
def _no_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))


def test_the_command_prints_json_or_a_table(corpus_dir: Path) -> None:
    done = picotrain("tokenizer", "eval", *common(corpus_dir), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["vocab_size"] == 300
    assert found["encoder"] in ("gigatoken", "tokenizers")
    assert 0.1 < found["vocabulary_used"] <= 1
    assert found["texts"]["validation"]["bytes"] > 1000
    assert found["texts"]["python"]["gpt2"] is None
    assert found["texts"]["chinese"]["bytes_per_token"] == pytest.approx(1.0, abs=0.1)  # never seen in training
    assert found["round_trip_failures"] == []

    done = picotrain("tokenizer", "eval", "--path", found["path"], *common(corpus_dir)[:2])
    assert done.returncode == 0, done.stderr
    for words in ("bytes per token", "validation", "japanese", "not here", "300 tokens", "MB/s", "every text comes back as it was"):
        assert words in done.stdout


def test_the_command_fails_for_a_tokenizer_that_loses_text(corpus_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(DOCUMENTS, 300, path)
    data = json.loads(path.read_text())
    lossy = {"type": "Split", "pattern": {"String": "ω"}, "behavior": "Removed", "invert": False}
    data["pre_tokenizer"]["pretokenizers"].insert(0, lossy)
    path.write_text(json.dumps(data))
    done = picotrain("tokenizer", "eval", "--path", str(path), *common(corpus_dir)[:2])
    assert done.returncode == 2
    assert "Split drops what it cuts at" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_tokenizer_is_one_message(corpus_dir: Path, tmp_path: Path) -> None:
    done = picotrain("tokenizer", "eval", "--path", str(tmp_path / "no.json"), *common(corpus_dir)[:2])
    assert done.returncode == 2
    assert "there is no readable tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
