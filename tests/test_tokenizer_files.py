"""A tokenizer.json that would lose, add or shuffle text is mended at load, or refused by name; and so is a file that is none."""

from __future__ import annotations

import copy
import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SUBJECTS, picotrain

from picotrain import minimal
from picotrain.config import compose
from picotrain.errors import TokenizerError
from picotrain.tokenizer import BOS, byte_alphabet, load_tokenizer, train_tokenizer
from picotrain.tokenizer.proof import LONG, SAMPLE

Parts = dict[str, Any]
VOCAB = 500
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "tokenizer.json"
    train_tokenizer([*SAMPLE, *SUBJECTS, Path(__file__).read_text()] * 2, VOCAB, path)
    return path


@pytest.fixture
def changed(sound: Path, tmp_path: Path) -> Callable[[Callable[[Parts], object]], Path]:
    """A copy of the sound file with a change made to its parts."""

    def write(change: Callable[[Parts], object]) -> Path:
        parts = json.loads(sound.read_text())
        change(parts)
        (out := tmp_path / "changed.json").write_text(json.dumps(parts))
        return out

    return write


def top(**parts: object) -> Callable[[Parts], object]:
    return lambda whole: whole.update(copy.deepcopy(parts))


def model(**parts: object) -> Callable[[Parts], object]:
    return lambda whole: whole["model"].update(parts)


def before_bytes(*parts: Parts) -> Callable[[Parts], object]:
    """Pre-tokenizers in front of ByteLevel."""
    return top(pre_tokenizer={"type": "Sequence", "pretokenizers": [*parts, BYTE_LEVEL | {"use_regex": False}]})


def added(*tokens: Parts) -> Callable[[Parts], object]:
    return lambda whole: whole["added_tokens"].extend(FLAGS | token for token in tokens)


def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Parts], object]:
    return lambda whole: change(whole["model"]["vocab"])


def word(whole: Parts) -> str:
    """A word that merges make."""
    return next(token for token in map("".join, whole["model"]["merges"]) if token.isascii() and token.isalpha() and len(token) > 2)


TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": BOS}
SWITCHED_OFF = {
    "truncation": (top(truncation=TRUNCATION), "truncation to 16 tokens"),
    "truncation on the left": (top(truncation=TRUNCATION | {"direction": "Left", "max_length": 2048}), "truncation to 2,048 tokens"),
    "padding": (top(padding=PADDING), "padding is"),
    "padding to multiples": (
        top(padding=PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 8, "direction": "Left"}),
        "padding is",
    ),
    "dropout": (model(dropout=0.3), "BPE dropout 0.3"),
    "full dropout": (model(dropout=1.0), "BPE dropout 1"),
    "all of it": (lambda whole: (top(truncation=TRUNCATION, padding=PADDING)(whole), model(dropout=0.1)(whole)), "dropout 0.1 are"),
}


def exact(path: Path, encoder: Any) -> list[list[int]]:
    """The ids of texts that come back to the byte, whose tokens' bytes add up, twice alike and in both ways of encoding."""
    tokenizer = load_tokenizer(path, encoder)
    texts = [*SAMPLE, LONG, "a" * 3000, " ".join(SUBJECTS) * 50]
    first = [tokenizer.encode(text) for text in texts]
    assert first == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode_bytes(ids) for ids in first] == [text.encode() for text in texts]
    lengths = tokenizer.token_bytes()
    assert [int(lengths[ids].sum()) for ids in first] == [len(text.encode()) for text in texts]
    flat, _ = tokenizer.encode_flat(texts)
    assert flat.tolist() == [id for ids in first for id in ids]
    assert tokenizer.bos_id not in set(flat.tolist())
    return first


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_what_cuts_pads_or_draws_is_switched_off_and_said(name: str, sound: Path, changed):
    change, said = SWITCHED_OFF[name]
    path = changed(change)
    assert [said in note and "switched off" in note for note in load_tokenizer(path).changes] == [True]
    assert exact(path, "auto") == exact(path, "tokenizers") == exact(sound, "auto")


SPLIT = {"type": "Split", "pattern": {"String": "-"}, "behavior": "Isolated", "invert": False}
HARMLESS: dict[str, Callable[[Parts], object]] = {
    "nothing": lambda whole: None,
    "a normalizer that does nothing": top(normalizer={"type": "Sequence", "normalizers": []}),
    "GPT-2's pre-tokenizer": top(pre_tokenizer=BYTE_LEVEL),
    "a split that keeps what it cuts at": before_bytes(SPLIT, SPLIT | {"behavior": "MergedWithPrevious"}),
    "digits one by one": before_bytes({"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Contiguous"}),
    "sequences in a sequence": before_bytes({"type": "Sequence", "pretokenizers": [SPLIT]}),
    "byte_fallback and unk_token without use": model(byte_fallback=True, unk_token="!", fuse_unk=True),
    "ignore_merges": model(ignore_merges=True),
    "empty affixes, as in GPT-2's file": model(continuing_subword_prefix="", end_of_word_suffix=""),
    "a post-processor that adds tokens": top(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
        }
    ),
    "added tokens that swallow white space": added(
        {"id": VOCAB, "content": "grey dog", "lstrip": True, "rstrip": True, "normalized": True}
    ),
    "an added token of white space": added({"id": VOCAB, "content": "    ", "special": False}),
    "an ordinary token that is listed as an added one": lambda whole: added(
        {"id": whole["model"]["vocab"][word(whole)], "content": word(whole), "special": False}
    )(whole),
    "a special token of another program in the text": added({"id": VOCAB, "content": "<|endoftext|>"}),
    "holes in the ids": added({"id": VOCAB + 70, "content": "<|end|>"}),
    "merges in another order": lambda whole: whole["model"]["merges"].reverse(),
    "half the merges": lambda whole: whole["model"].update(merges=whole["model"]["merges"][::2][:20]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_every_byte_as_it_is_is_taken(name: str, changed):
    path = changed(HARMLESS[name])
    assert load_tokenizer(path).changes == []
    assert exact(path, "auto") == exact(path, "tokenizers")


def normalizer(**part: object) -> Callable[[Parts], object]:
    return top(normalizer=part)


def cat_by_ignore_merges(whole: Parts) -> None:
    added({"id": whole["model"]["vocab"].setdefault("cat", VOCAB), "content": "cat"})(whole)
    whole["model"]["ignore_merges"] = True


REFUSED: dict[str, tuple[Callable[[Parts], object], str]] = {
    "no pre-tokenizer": (top(pre_tokenizer=None), "no pre-tokenizer ByteLevel"),
    "splits without bytes": (top(pre_tokenizer=SPLIT), "no pre-tokenizer ByteLevel"),
    "bytes of bytes": (before_bytes(BYTE_LEVEL), "2 pre-tokenizers ByteLevel"),
    "a space in front": (top(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space should be false"),
    "Metaspace": (before_bytes({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}), "Metaspace"),
    "Whitespace": (before_bytes({"type": "Whitespace"}), "Whitespace drops"),
    "WhitespaceSplit": (before_bytes({"type": "WhitespaceSplit"}), "WhitespaceSplit drops"),
    "BertPreTokenizer": (before_bytes({"type": "BertPreTokenizer"}), "BertPreTokenizer drops"),
    "CharDelimiterSplit": (before_bytes({"type": "CharDelimiterSplit", "delimiter": "~"}), "CharDelimiterSplit drops"),
    "a split that drops what the sample lacks": (before_bytes(SPLIT | {"pattern": {"String": "qzx"}, "behavior": "Removed"}), "Removed"),
    "punctuation dropped": (before_bytes({"type": "Punctuation", "behavior": "Removed"}), "Punctuation drops"),
    "nested": (before_bytes({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}), "Whitespace drops"),
    "lowercase": (normalizer(type="Lowercase"), "Lowercase normalizes"),
    "NFC": (normalizer(type="NFC"), "NFC normalizes"),
    "NFKC in a sequence": (normalizer(type="Sequence", normalizers=[{"type": "NFKC"}, {"type": "StripAccents"}]), r"NFKC \+ StripAccents"),
    "replacement of what the sample lacks": (normalizer(type="Replace", pattern={"String": "qzx"}, content=""), "Replace normalizes"),
    "strip": (normalizer(type="Strip", strip_left=True, strip_right=True), "Strip normalizes"),
    "prepend": (normalizer(type="Prepend", prepend="_"), "Prepend normalizes"),
    "an affix of words": (model(end_of_word_suffix="</w>"), 'end_of_word_suffix \\("</w>"\\)'),
    "an affix of parts": (model(continuing_subword_prefix="##"), 'continuing_subword_prefix \\("##"\\)'),
    "a byte without a token": (vocabulary(lambda vocab: vocab.update({"~~": vocab.pop("~")})), "some of the 256 bytes have no token"),
    "a token of no bytes": (vocabulary(lambda vocab: vocab.update({"▁x": VOCAB})), "'▁', which stands for no byte"),
    "a token with a bare space": (vocabulary(lambda vocab: vocab.update({"a b": VOCAB})), "' ', which stands for no byte"),
    "two tokens of one id": (vocabulary(lambda vocab: vocab.update({"!!!zq": 7})), "same id 7"),
    "ids out of proportion": (vocabulary(lambda vocab: vocab.update({"!!!zq": 10_000_000})), "below twice as many"),
    "two added tokens of one id": (added({"id": 0, "content": "<|x|>"}), "same id 0"),
    "an added token in an ordinary one's place": (added({"id": 66, "content": "<|x|>"}), "same id 66"),
    "an added token that the vocabulary has elsewhere": (
        lambda whole: added({"id": VOCAB, "content": word(whole)})(whole), "as an added token",
    ),
    "an added token twice": (added({"id": VOCAB, "content": "<|x|>"}, {"id": VOCAB + 1, "content": "<|x|>"}), "more than one id"),
    "an id that is a text": (added({"id": "7", "content": "<|x|>"}), "the id '7'"),
    "an id that is a truth value": (added({"id": True, "content": "<|x|>"}), "the id True"),
    "no added tokens at all": (lambda whole: whole.pop("added_tokens"), "no special token"),
    "a special token that merges make": (
        lambda whole: added({"id": whole["model"]["vocab"][word(whole)], "content": word(whole)})(whole), "yields the special token",
    ),
    "a special token that ignore_merges makes": (
        cat_by_ignore_merges,
        "yields the special token",
    ),
    "WordPiece": (
        top(model={"type": "WordPiece", "unk_token": "!", "continuing_subword_prefix": "##", "max_input_chars_per_word": 10,
                   "vocab": {char: id for id, char in enumerate([BOS, *byte_alphabet()])}}),
        "its model is WordPiece",
    ),
    "Unigram": (
        top(model={"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": [[c, -1.0] for c in [BOS, *byte_alphabet()]]}),
        "its model is Unigram",
    ),
    "merges of tokens that are not there": (model(merges=[["zq", "qz"]]), "is no tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_or_add_text_is_refused_by_name(name: str, changed):
    change, message = REFUSED[name]
    path = changed(change)
    for encoder in ("auto", "tokenizers"):
        with pytest.raises(TokenizerError, match=message) as error:
            load_tokenizer(path, encoder)
        assert str(path) in str(error.value)


def test_all_that_is_wrong_is_said_at_once(changed):
    path = changed(
        lambda whole: (
            before_bytes({"type": "Whitespace"})(whole),
            normalizer(type="Lowercase")(whole),
            model(end_of_word_suffix="x")(whole),
        )
    )
    with pytest.raises(TokenizerError, match=r"Lowercase.*Whitespace.*end_of_word_suffix"):
        load_tokenizer(path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}])
def test_a_decoder_that_does_not_give_text_back_is_said_and_not_used(decoder: Parts | None, changed):
    path = changed(top(decoder=decoder))
    assert ["decoder" in note for note in load_tokenizer(path).changes] == [True]
    exact(path, "auto")


def test_the_long_text_holds_every_byte_that_utf8_has():
    assert set(LONG.encode()) == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert len(LONG) > 4096


@pytest.mark.parametrize("name", ["truncation", "padding", "dropout", "bom"])
def test_losses_are_those_of_the_sound_file(name: str, sound: Path, changed, tiny, tmp_path: Path):
    if name == "bom":
        (path := tmp_path / "changed.json").write_bytes(b"\xef\xbb\xbf" + sound.read_bytes())
    else:
        path = changed(SWITCHED_OFF[name][0])

    def losses(tokenizer: Path) -> list[float]:
        overrides = tiny(tmp_path / "run", f"tokenizer.path={tokenizer}", f"tokenizer.vocab_size={VOCAB}", "train.max_steps=2")
        return list(minimal.losses(compose(overrides)))

    assert losses(path) == losses(sound)


def test_a_run_says_once_what_was_switched_off_and_keeps_a_file_that_others_can_read(sound: Path, changed, tiny, tmp_path: Path):
    import tokenizers

    path = changed(SWITCHED_OFF["dropout"][0])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    command = ["train", *tiny(tmp_path / "run", f"tokenizer.path={path}", f"tokenizer.vocab_size={VOCAB}", "train.max_steps=1")]
    first, again = picotrain(*command), picotrain(*command)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert (first.stdout + first.stderr).count("BPE dropout 0.3 is switched off") == 1
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "run/tokenizer.json")).get_vocab_size() == VOCAB


def test_a_run_of_a_version_that_truncated_is_not_gone_on_with(changed, tiny, tmp_path: Path):
    run = tmp_path / "run"
    path = changed(SWITCHED_OFF["truncation"][0])
    command = ["train", *tiny(run, f"tokenizer.path={path}", f"tokenizer.vocab_size={VOCAB}", "train.max_steps=1", "train.eval_every=0")]
    assert picotrain(*command).returncode == 0
    for horizon, recorded, code in ((2, {}, 0), (3, {"encoder": "gigatoken"}, 0), (4, {"encoder": "tokenizers"}, 2)):
        data = json.loads((run / "data.json").read_text())
        if recorded:  # as versions wrote it that did not switch off
            data["tokenizer"] = {key: data["tokenizer"][key] for key in ("fingerprint", "vocab_size")} | recorded
            (run / "data.json").write_text(json.dumps(data))
        before = (run / "data.json").read_bytes()
        done = picotrain("resume", str(run), f"train.max_steps={horizon}")
        assert done.returncode == code, done.stderr
    assert "truncation to 16 tokens" in done.stderr and "environment.json" in done.stderr
    assert (run / "data.json").read_bytes() == before


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "it is empty"),
    "white space": (lambda data: b" \n", "it is empty"),
    "a byte order mark alone": (lambda data: b"\xef\xbb\xbf", "it is empty"),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without its mark": (lambda data: data.decode().encode("utf-16-le"), "UTF-16"),
    "UTF-32": (lambda data: data.decode().encode("utf-32-be"), "is no tokenizer.json"),
    "Latin-1": (lambda data: data.replace(b"<|bos|>", b"\xe9"), "is not UTF-8 text"),
    "gzip": (gzip.compress, "compressed with gzip"),
    "cut": (lambda data: data[: len(data) // 2], "is no tokenizer.json"),
    "a list": (lambda data: b"[1, 2]", "is no tokenizer.json"),
    "a page": (lambda data: b"<!doctype html><html></html>", "is no tokenizer.json"),
    "a pointer of Git LFS": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "git lfs pull"),
    "deep nesting": (lambda data: b'{"added_tokens": ' + b"[" * 200_000, "is no tokenizer.json"),
    "deep nesting elsewhere": (lambda data: data.replace(b"{", b'{"x":' + b"[" * 5000 + b"]" * 5000 + b",", 1), "is no tokenizer.json"),
    "zeros": (lambda data: bytes(len(data)), "is no tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_none_is_a_message(name: str, sound: Path, tmp_path: Path):
    change, message = BROKEN[name]
    (path := tmp_path / "broken.json").write_bytes(change(sound.read_bytes()))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_what_is_no_file_is_a_message(tmp_path: Path, tiny):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "empty").mkdir()
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(300 << 20)
    for name, message in (("pipe.json", "regular file"), ("empty", "No such file"), ("large.json", "at most")):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path / name)
        with pytest.raises(TokenizerError, match=message):
            next(minimal.losses(compose(tiny(tmp_path / "run", f"tokenizer.path={tmp_path / name}"))))


def test_a_fault_in_an_encoders_rust_code_is_a_message(sound: Path, monkeypatch: pytest.MonkeyPatch):
    import tokenizers

    class PanicException(BaseException):
        """As pyo3 names it."""

    def panic(*args: object, **options: object) -> None:
        raise PanicException("index out of bounds")

    gigatoken = pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(sound)
    with monkeypatch.context() as patch:
        patch.setattr(gigatoken.Tokenizer, "encode_batch_list", panic)
        with pytest.raises(TokenizerError, match="index out of bounds"):
            tokenizer.encode("x")
        assert load_tokenizer(sound).encoder == "tokenizers"
        with pytest.raises(TokenizerError, match="index out of bounds"):
            load_tokenizer(sound, "gigatoken")
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", panic)
    with pytest.raises(TokenizerError, match=r"that `tokenizers` can load: .*index out of bounds"):
        load_tokenizer(sound)


@pytest.mark.parametrize("encoder", ["auto", "tokenizers"])
def test_threads_encode_single_texts_beside_batches(encoder: Any, sound: Path, monkeypatch: pytest.MonkeyPatch):
    """As a sample does beside the loader's threads."""
    monkeypatch.setattr("picotrain.tokenizer.FORGET_AFTER_TOKENS", 20_000)
    tokenizer = load_tokenizer(sound, encoder)
    texts = [f"{text} {number}" for number in range(20) for text in SAMPLE]
    single = [tokenizer.encode(text) for text in texts]
    flat = [id for ids in single for id in ids]
    faults: list[str] = []
    started = threading.Barrier(4)

    def hammer(work: Callable[[], bool]) -> None:
        started.wait()
        try:
            faults.extend("other ids" for _ in range(8) if not work())
        except BaseException as error:
            faults.append(repr(error))

    works = [lambda: [tokenizer.encode(text) for text in texts] == single] * 2
    works += [
        lambda: tokenizer.encode_flat(texts)[0].tolist() == flat,
        lambda: tokenizer.encode_flat(texts, use_threads=True)[0].tolist() == flat,
    ]
    threads = [threading.Thread(target=hammer, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
