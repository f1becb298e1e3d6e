"""A `tokenizer.json` as it may be trained with: what loses or adds text is switched off, and said, or refused by name.

Bits per byte are right only where the tokens of a text are its bytes, all of them, in order, the same at every call. The parts of a
file (Hugging Face's format, `tokenizers` docs/source/api) that could break that are known, so each is looked at; `proof` then tries it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

BOS = "<|bos|>"
UTF8_BOM = b"\xef\xbb\xbf"

_ADDED_TOKENS = re.compile(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)')

# `tokenizers` faults on some files whose parts of words have a prefix, so that these are found beforehand.
_BPE = re.compile(r'(?<!\\)"type"\s*:\s*"BPE"')
_PREFIX = re.compile(r'(?<!\\)"continuing_subword_prefix"\s*:\s*"([^"]+)"')

# What begins like this is no text in UTF-8, and what would help.
_BEGINNINGS = (
    (b"\x1f\x8b", "it is compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
    (b"\xff\xfe", "it is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16 text; save it as UTF-8"),
    (b"{\x00", "it is UTF-16 text; save it as UTF-8"),
    (b"\x00{", "it is UTF-16 text; save it as UTF-8"),
    (b"version https://git-lfs", "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"),
)

# Pre-tokenizers that cut a text and neither change nor drop any of it. The first two drop what they cut at under one behavior.
_CUTTING = {"Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength"}


@dataclass(frozen=True)
class Artifact:
    """A byte-level BPE that neither cuts, pads nor draws, and gives no added token; what each of its ids stands for."""

    bpe: tokenizers.Tokenizer
    json: str  # of `bpe`, for the other encoder
    specials: dict[int, str]  # the added tokens, which no text yields
    bytes: list[bytes]  # by id; a special's are its name's, those of an id without a token b""
    bos_id: int
    off: str = ""  # what was switched off, in words


def without_bom(data: bytes) -> bytes:
    """A file's content without the byte order mark that some editors put before UTF-8 text."""
    return data.removeprefix(UTF8_BOM)


def read(path: Path, data: bytes) -> Artifact:
    """The artifact in a file's content. Raises TokenizerError, with what is wrong and what would be right."""
    import tokenizers

    text = _decoded(path, without_bom(data))
    try:
        with panics():
            if (prefix := _PREFIX.search(text)) and _BPE.search(text):
                raise _refusal(path, [_affix("continuing_subword_prefix", prefix[1])])
            added, cut = _without_added_tokens(text)
            loaded = tokenizers.Tokenizer.from_str(cut)
            specials = _specials(path, added)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path} is no tokenizer.json that `tokenizers` can load: {str(error)[:200]}") from error
    _check_parts(path, loaded)
    off = _switch_off(loaded)
    bpe = tokenizers.Tokenizer(loaded.model)  # no truncation, padding, normalizer or post-processor
    bpe.pre_tokenizer = loaded.pre_tokenizer
    if loaded.decoder is not None:
        bpe.decoder = loaded.decoder
    vocab = loaded.get_vocab(with_added_tokens=False)
    _check_ids(path, vocab, specials)
    specials = _out_of_reach(path, bpe, specials, {token["id"] for token in added if token.get("special", True)})
    bos_id = next(id for id, content in specials.items() if content == BOS)
    plain = bpe.to_str() if off else cut  # writing it anew takes time
    return Artifact(bpe, plain, specials, _bytes(path, vocab, specials), bos_id, off)


class Panic(Exception):
    """A panic of Rust code, which itself is no Exception in Python."""


@contextmanager
def panics() -> Generator[None]:
    """Turn a panic of Rust code into a Panic."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panic(f"a fault in its Rust code: {error}") from None


def byte_alphabet() -> list[str]:
    """The character that stands for each byte 0 .. 255 in a byte-level vocabulary (openai/gpt-2, src/encoder.py: bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _decoded(path: Path, data: bytes) -> str:
    if not data.strip():
        raise TokenizerError(f"{path} is no tokenizer.json: it is empty")
    for beginning, what in _BEGINNINGS:
        if data.startswith(beginning):
            raise TokenizerError(f"{path} is no tokenizer.json: {what}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is no tokenizer.json: its byte {error.start:,} is not UTF-8 text") from None


def _without_added_tokens(text: str) -> tuple[list[dict[str, Any]], str]:
    """The added tokens of a tokenizer.json, and the same JSON without them (cut out as text: parsing a vocabulary is slow)."""
    match = _ADDED_TOKENS.search(text)
    if match is None:
        return [], text
    added, end = json.JSONDecoder().raw_decode(text, match.end())
    return added, f"{text[: match.end()]}[]{text[end:]}"


def _specials(path: Path, added: list[dict[str, Any]]) -> dict[int, str]:
    """The added tokens by id."""
    specials: dict[int, str] = {}
    for token in added:
        id, content = token["id"], token["content"]
        if type(id) is not int or not isinstance(content, str):
            raise TokenizerError(f"{path}: an added token has the id {id!r} and the content {content!r}; a number and a text are right")
        if specials.setdefault(id, content) != content:
            raise TokenizerError(f"{path}: the added tokens {specials[id]!r} and {content!r} have the same id {id}")
    if BOS not in specials.values():
        has = ", ".join(map(repr, list(specials.values())[:20])) or "none"
        raise TokenizerError(f"{path} has no special token {BOS!r} (its special tokens: {has}); train one with `picotrain tokenizer`")
    if len(set(specials.values())) < len(specials):
        twice = next(content for content in specials.values() if list(specials.values()).count(content) > 1)
        raise TokenizerError(f"{path}: the added token {twice!r} has more than one id")
    return specials


def _check_parts(path: Path, loaded: tokenizers.Tokenizer) -> None:
    """Refuse, all at once, every part that does not leave each byte of a text as it is."""
    problems = [*_rewriting(loaded), *_cutting(_state(loaded.pre_tokenizer))]
    model = loaded.model
    if (kind := type(model).__name__) != "BPE":
        problems = [f"its model is {kind}, and only BPE is known"]
    else:
        problems += [_affix(name, value) for name in ("continuing_subword_prefix", "end_of_word_suffix") if (value := getattr(model, name))]
        if any(model.token_to_id(char) is None for char in byte_alphabet()):
            problems.append("some of the 256 bytes have no token")
    if problems:
        raise _refusal(path, problems)


def _refusal(path: Path, problems: list[str]) -> TokenizerError:
    return TokenizerError(
        f"{path} is no byte-level BPE whose tokens are the bytes of the text: {'; '.join(problems)}. Bits per byte would be wrong; "
        "train one with `picotrain tokenizer`"
    )


def _affix(name: str, value: str) -> str:
    return f'its model has a {name} ("{value}"), which stands for no byte'


def _state(part: Any) -> dict[str, Any]:
    """A normalizer or pre-tokenizer as its JSON; {} for none."""
    return {} if part is None else json.loads(part.__getstate__())


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that a Sequence runs, one after the other."""
    if part.get("type") != "Sequence":
        return [part] if part else []
    return [inner for outer in part.get("normalizers", part.get("pretokenizers", [])) for inner in _flat(outer)]


def _rewriting(loaded: tokenizers.Tokenizer) -> list[str]:
    names = [part["type"] for part in _flat(_state(loaded.normalizer))]
    return [f"its normalizer {' + '.join(names)} normalizes text, and what it changes does not come back"] if names else []


def _cutting(pre_tokenizer: dict[str, Any]) -> list[str]:
    """What is wrong with a pre-tokenizer: it should cut the text, and map it to bytes once."""
    parts, problems = _flat(pre_tokenizer), []
    for part in parts:
        kind, behavior = part["type"], part.get("behavior")
        if kind == "ByteLevel":
            if part.get("add_prefix_space"):
                problems.append("its pre-tokenizer ByteLevel adds spaces that the text does not have (add_prefix_space should be false)")
        elif kind not in _CUTTING:
            problems.append(f"its pre-tokenizer {kind} drops or replaces characters")
        elif behavior == "Removed":
            problems.append(f"its pre-tokenizer {kind} drops what it cuts at (behavior Removed; Isolated keeps it)")
    if (number := sum(part["type"] == "ByteLevel" for part in parts)) != 1:
        problems.append(f"it has {number or 'no'} pre-tokenizer{'s' if number else ''} ByteLevel, and one is right")
    return problems


def _switch_off(loaded: tokenizers.Tokenizer) -> str:
    """What was switched off, in words; "" for nothing. (Truncation and padding are left behind with `loaded`.)"""
    found = []
    if loaded.truncation:
        found.append(f"truncation to {loaded.truncation['max_length']:,} tokens")
    if loaded.padding:
        found.append("padding")
    if dropout := loaded.model.dropout:  # type: ignore[attr-defined]
        loaded.model.dropout = None  # type: ignore[attr-defined]
        found.append(f"BPE dropout {dropout:.2g}")
    return " and ".join(found)


def _check_ids(path: Path, vocab: dict[str, int], specials: dict[int, str]) -> None:
    """One id a token, one token an id, and ids in proportion: tables are as long as the largest of them."""
    total = len({*vocab, *specials.values()})
    ids = [*vocab.values(), *specials]
    if not all(0 <= id < 2 * total for id in ids):
        raise TokenizerError(f"{path} has {total:,} tokens, and ids that are no numbers below twice as many")
    token_of = {id: token for token, id in vocab.items()}
    if len(token_of) < len(vocab):
        first, second = next((token_of[id], token) for token, id in vocab.items() if token_of[id] != token)
        raise TokenizerError(f"{path}: the tokens {first!r} and {second!r} have the same id {vocab[second]}")
    for id, content in specials.items():
        if token_of.get(id, content) != content:
            raise TokenizerError(f"{path}: the added token {content!r} and the token {token_of[id]!r} have the same id {id}")
        if vocab.get(content, id) != id:
            raise TokenizerError(f"{path}: {content!r} has the id {id} as an added token and {vocab[content]} in the vocabulary")


def _out_of_reach(path: Path, bpe: tokenizers.Tokenizer, specials: dict[int, str], special: set[int]) -> dict[int, str]:
    """The added tokens that no text yields. One that merges make is an ordinary token, unless it is marked as special."""
    letters = byte_alphabet()
    reached: set[int] = set()
    for content in specials.values():
        encoded = [bpe.encode(text, add_special_tokens=False).ids for text in (content, f" {content} ", f"a{content}a", f"\n{content}\n")]
        if not bpe.model.ignore_merges:  # type: ignore[attr-defined]  # whatever the pre-tokenizer lets through
            encoded.append([token.id for token in bpe.model.tokenize("".join(letters[byte] for byte in content.encode()))])
        reached.update(id for ids in encoded for id in ids)
    for id in reached & specials.keys():
        if id in special or specials[id] == BOS:
            raise TokenizerError(
                f"{path}: the text {specials[id]!r} yields the special token {id}, because its merges or ignore_merges make it"
            )
    return {id: content for id, content in specials.items() if id not in reached}


def _bytes(path: Path, vocab: dict[str, int], specials: dict[int, str]) -> list[bytes]:
    """Bytes by id, read from the byte-level vocabulary (decoding ids one by one would break characters)."""
    table = [b""] * (1 + max([*vocab.values(), *specials]))
    letters = byte_alphabet()
    byte_of = dict.fromkeys(range(256), "\u1000") | {ord(char): chr(byte) for byte, char in enumerate(letters)}
    for token, id in vocab.items():
        if id not in specials:
            try:
                table[id] = token.translate(byte_of).encode("latin-1")
            except UnicodeEncodeError as error:
                raise TokenizerError(f"{path}: token {id} ({token!r}) holds {token[error.start]!r}, which stands for no byte") from None
    for id, content in specials.items():
        table[id] = content.encode()
    return table
