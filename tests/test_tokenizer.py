"""The tokenizer: exact bytes, no special token from text, the same ids from both encoders."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picotrain import tokenizer as tokenizer_module
from picotrain.errors import TokenizerError
from picotrain.tokenizer import BOS, SAMPLE, Tokenizer, byte_alphabet, load_tokenizer, train_tokenizer

SOURCE = [Path(tokenizer_module.__file__).read_text(), Path(__file__).read_text(), *SAMPLE] * 2
VOCAB = 600
PIECES = [BOS, "<|", "|>", "bos", " ", "\n", "\r\n", "\t", "  ", "'ll", "'S", "123", "é", "e\u0301", "日本", "🙂", "def ", "\x00"]
# Text that the split pattern and the special token care about, and any other text.
TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            [BOS, "<|", "|>", "bos", " ", "\n", "\r\n", "\t", "  ", "'ll", "'S", "123", "é", "e\u0301", "日本", "🙂", "def ", "\x00"]
        ),
    )
).map("".join)


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(SOURCE, VOCAB, out)
    return out


@pytest.fixture(scope="session")
def fast(path: Path) -> Tokenizer:
    pytest.importorskip("gigatoken")
    return load_tokenizer(path, "gigatoken")


@pytest.fixture(scope="session")
def plain(path: Path) -> Tokenizer:
    return load_tokenizer(path, "tokenizers")


def edited(path: Path, out: Path, **changes: object) -> Path:
    """A copy of a tokenizer.json with some top-level parts replaced."""
    out.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_encoders_agree_and_text_comes_back_and_is_never_special(text: str, fast: Tokenizer, plain: Tokenizer) -> None:
    ids = fast.encode(text)
    assert ids == plain.encode(text)
    assert plain.decode(ids) == text
    assert fast.bos_id not in ids


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXT, max_size=8), threads=st.booleans())
def test_flat_encoding_is_the_texts_one_by_one(texts: list[str], threads: bool, fast: Tokenizer, plain: Tokenizer) -> None:
    expected = [fast.encode(text) for text in texts]
    for tokenizer in (fast, plain):
        ids, offsets = tokenizer.encode_flat(texts, use_threads=threads)
        assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(texts) + 1)
        assert (offsets[0], offsets[-1]) == (0, len(ids))
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected


def test_long_runs_without_a_split_are_encoded_alike(fast: Tokenizer, plain: Tokenizer) -> None:
    for text in ("a" * 20_000, " " * 20_000, "\n" * 5_000, "ab" * 5_000, "1" * 5_000, "=" * 5_000, "é" * 5_000, "\u200b" * 3_000):
        assert fast.encode(text) == plain.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_token_bytes_add_up_to_the_utf8_length(text: str, plain: Tokenizer) -> None:
    assert plain.token_bytes()[plain.encode(text)].sum() == len(text.encode())


def test_token_bytes_cover_the_vocabulary_and_specials_count_none(plain: Tokenizer) -> None:
    lengths = plain.token_bytes()
    assert (lengths.dtype, lengths.shape) == (np.int32, (VOCAB,))
    assert lengths[plain.bos_id] == 0
    assert (np.delete(lengths, plain.bos_id) > 0).all()
    assert sum(lengths == 1) == 256


def test_a_special_token_shows_as_its_name_and_a_part_of_a_character_as_a_replacement(plain: Tokenizer) -> None:
    euro = [id for byte in "€".encode() for id in [plain._bytes.index(bytes([byte]))]]
    assert plain.decode([plain.bos_id, *euro]) == f"{BOS}€"
    assert plain.decode(euro[:2]) == "\ufffd"
    assert plain.decode_bytes(euro[:2]) == "€".encode()[:2]


def test_training_is_deterministic_and_a_hugging_face_artifact(path: Path, tmp_path: Path) -> None:
    import tokenizers

    train_tokenizer(iter(SOURCE), VOCAB, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "again.json"]
    artifact = tokenizers.Tokenizer.from_file(str(path))
    assert artifact.get_vocab_size() == VOCAB
    assert artifact.encode(f"{BOS}x").ids[0] == artifact.token_to_id(BOS) == load_tokenizer(path).bos_id


def test_too_little_text_names_the_vocabulary_that_can_be_reached(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"vocab_size=1000 cannot be reached: .* yields 2\d\d tokens; set tokenizer.vocab_size=(2\d\d) "
    ) as error:
        train_tokenizer(["banana bandana"], 1000, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
    reachable = int(str(error.value).split("set tokenizer.vocab_size=")[1].split()[0])
    train_tokenizer(["banana bandana"], reachable, tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").vocab_size == reachable
    with pytest.raises(TokenizerError, match="need 257"):
        train_tokenizer(["x"], 256, tmp_path / "t.json")


def test_byte_level_vocabulary_alone_encodes_everything(tmp_path: Path) -> None:
    train_tokenizer([], 257, tmp_path / "t.json")
    tokenizer = load_tokenizer(tmp_path / "t.json")
    text = "héllo 🙂"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_alphabet())) == 256


def test_the_fingerprint_follows_the_file(path: Path, tmp_path: Path) -> None:
    (copy := tmp_path / "copy.json").write_bytes(path.read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(path).fingerprint
    assert load_tokenizer(edited(path, copy)).fingerprint != load_tokenizer(path).fingerprint


def test_a_folder_stands_for_the_file_in_it(path: Path) -> None:
    assert load_tokenizer(path.parent).path == path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens": []}, r"has no special token '<\|bos\|>' \(its special tokens: none\)"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}}, "is no byte-level BPE"),
        ({"model": {"type": "Nonsense"}}, "is no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_would_count_wrong_is_refused(path: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(edited(path, tmp_path / "t.json", **changes))


def test_missing_and_damaged_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no readable tokenizer .*missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    for number, damaged in enumerate((b"", b"{", path.read_bytes()[:-100], b"\xff\xfe")):
        (file := tmp_path / f"{number}.json").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=rf"{number}\.json is no tokenizer\.json"):
            load_tokenizer(file)


def test_special_tokens_beyond_the_merges_count_into_the_vocabulary(path: Path, tmp_path: Path) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 0, "content": BOS, **flags}, {"id": VOCAB + 4, "content": "<|end|>", **flags}]
    for encoder in ("auto", "tokenizers"):
        tokenizer = load_tokenizer(edited(path, tmp_path / "t.json", added_tokens=added), encoder)
        assert tokenizer.vocab_size == VOCAB + 5
        assert len(tokenizer.token_bytes()) == VOCAB + 5
        assert tokenizer.decode([VOCAB + 4]) == "<|end|>"
        assert max(tokenizer.encode("<|end|>")) < VOCAB


def test_a_lone_surrogate_is_no_text(fast: Tokenizer, plain: Tokenizer) -> None:
    for tokenizer in (fast, plain):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.encode("a\ud800b")


def test_without_gigatoken_the_same_ids_come_from_tokenizers(path: Path, plain: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(path, "auto")
    assert (tokenizer.encoder, tokenizer.note) == ("tokenizers", "gigatoken is not installed")
    assert tokenizer.encode(SAMPLE[1]) == plain.encode(SAMPLE[1])
    with pytest.raises(TokenizerError, match=r"tokenizer\.encoder=gigatoken: gigatoken is not installed; .*auto works"):
        load_tokenizer(path, "gigatoken")


def test_an_encoder_that_differs_on_the_sample_is_not_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    honest = gigatoken.Tokenizer.encode_batch_list

    def wrong_on_digits(self: object, texts: list[str], parallel: bool) -> list[list[int]]:
        return [ids[::-1] if "1234" in text else ids for text, ids in zip(texts, honest(self, texts, parallel=parallel), strict=True)]

    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch_list", wrong_on_digits)
    tokenizer = load_tokenizer(path, "auto")
    assert tokenizer.encoder == "tokenizers"
    assert "different ids for '1 12 123" in tokenizer.note
    with pytest.raises(TokenizerError, match="different ids"):
        load_tokenizer(path, "gigatoken")


def test_a_split_pattern_unknown_to_gigatoken_falls_back(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    parts = json.loads(path.read_text())
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\P{N}+"
    tokenizer = load_tokenizer(edited(path, tmp_path / "t.json", pre_tokenizer=parts["pre_tokenizer"]))
    assert tokenizer.encoder == "tokenizers"
    assert "gigatoken" in tokenizer.note
    assert tokenizer.decode(tokenizer.encode("abc 12345")) == "abc 12345"


def test_importing_costs_no_torch_and_no_encoder() -> None:
    code = "import sys, picotrain.tokenizer; print([m for m in ('torch', 'tokenizers', 'gigatoken', 'awkward') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_fast_encoder_starts_afresh_before_its_memory_of_words_grows(path: Path, plain: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(tokenizer_module, "FORGET_AFTER_TOKENS", 50)
    tokenizer = load_tokenizer(path, "gigatoken")
    first = tokenizer._fast
    for text in SAMPLE:
        ids, _ = tokenizer.encode_flat([text])
        assert ids.tolist() == plain.encode(text)
    assert tokenizer._fast is not first
