"""Text <-> token ids: a byte-level BPE whose artifact is a Hugging Face `tokenizer.json`.

Trained by `tokenizers`, encoded by `gigatoken` (measured: tens of times faster, the same ids) where it is there and
agrees with `tokenizers` on `SAMPLE`. Text is data: the characters `<|bos|>` in a document never become the special
token, because both encoders are given the vocabulary without its special tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from picotrain.config.saved import read_plain
from picotrain.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

BOS = "<|bos|>"
Encoder = Literal["auto", "gigatoken", "tokenizers"]

# How text is cut before merging, as in Llama 3 (meta-llama/llama3, llama/tokenizer.py); gigatoken has a fast path for it.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# What the two encoders must agree on at every load: the places where split patterns and merges are easily got wrong.
SAMPLE = (
    "The quick brown fox can't jump; it'll WALK, they'RE told. I'd've said: don't!",
    'def f(x: int) -> dict[str, float]:\n\t"""Doc."""\n    return {\'a\': x ** 2, "b": 0x1F_FF, \'c\': 1e-10}  # done\r\n\r\n',
    "   leading, trailing   \n\n\n \t mixed\u00a0spaces\u2003and\u3000more \r\n \r \n  x\n",
    "1 12 123 1234 12345 3.14159 1,000,000 ١٢٣ ४५६ ½ Ⅷ ²³",
    "naïve café Straße ÅÄÖ ñandú œuvre İstanbul ſ K — “quotes” … €100 £5",
    "Съешь же ещё этих мягких булок. Ξεσκεπάζω την ψυχοφθόρα. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया",
    "今日は世界。こんにちは、元気ですか？ 你好，世界！ 안녕하세요 สวัสดีชาวโลก",
    "emoji: 🙂👩‍👩‍👧‍👦🏳️‍🌈🇪🇺 e\u0301 a\u0308 \u200b\ufeff \x00\x01\x7f \U0010ffff",
    f"{BOS} text{BOS}{BOS}more <|bos |> <|endoftext|> <bos>",
    "https://example.org/a_b?c=d&e=%20#f ~/.x/../y $HOME \\n <!-- --> <div class='z'>&amp;</div> " + "=" * 80 + " " * 70 + "a" * 300,
    "'s'S 'll'LL 't 've!!!???\n...---___+++\n'",
    "",
)

# gigatoken remembers every distinct word it has met, about 95 bytes each, for ever; after so many tokens it starts afresh.
FORGET_AFTER_TOKENS = 100_000_000

ADDED_TOKENS = re.compile(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)')


class Tokenizer:
    """A loaded `tokenizer.json`.

    path: the file. vocab_size: ids are 0 .. vocab_size - 1, specials included. bos_id: the id of `<|bos|>`.
    fingerprint: hash of the file. encoder: "gigatoken" or "tokenizers", the one in use; note: why it is not the fast one.
    """

    _fast: Any  # gigatoken's Tokenizer, or None

    def __init__(self, path: Path, data: bytes, encoder: Encoder = "auto"):
        import tokenizers

        self.path = path
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        try:
            added, plain = _without_added_tokens(data.decode())
            self._plain = tokenizers.Tokenizer.from_str(plain)
            self._specials = {token["id"]: token["content"] for token in added}
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"{path} is no tokenizer.json that `tokenizers` can load: {str(error)[:200]}") from error
        _check_byte_level(path, self._plain)
        self.vocab_size = 1 + _largest_id(path, self._plain, self._specials)
        if BOS not in self._specials.values():
            has = ", ".join(map(repr, self._specials.values())) or "none"
            raise TokenizerError(f"{path} has no special token {BOS!r} (its special tokens: {has}); train one with `picotrain tokenizer`")
        self.bos_id = next(id for id, content in self._specials.items() if content == BOS)
        self._json, self._encoded_tokens = plain, 0
        self._fast, self.note = (None, "") if encoder == "tokenizers" else _load_gigatoken(plain, self._plain)
        if encoder == "gigatoken" and self._fast is None:
            raise TokenizerError(f"tokenizer.encoder=gigatoken: {self.note}; tokenizer.encoder=tokenizers or auto works without it")
        self.encoder = "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without `<|bos|>`; special tokens are never among them."""
        try:
            if self._fast is not None:
                return self._fast.encode(text).tolist()
            return self._plain.encode(text, add_special_tokens=False).ids
        except TypeError:  # both refuse lone surrogates so
            raise TokenizerError("the text holds a lone surrogate, so that it is not valid Unicode") from None

    def encode_flat(self, texts: Sequence[str], use_threads: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end: (ids uint32 (total,), offsets int64 (n + 1,)); text i is ids[offsets[i]:offsets[i + 1]].

        With gigatoken the GIL is released for the whole call and no Python list is built. `use_threads` spreads the
        texts over all cores; the ids are the same.
        """
        if self._fast is not None:
            layout = self._fast.encode_batch(list(texts), parallel=use_threads).layout.to_ListOffsetArray64(True)
            offsets = np.asarray(layout.offsets.data)
            self._count(int(offsets[-1]))
            return np.asarray(layout.content.data)[: offsets[-1]], offsets
        if use_threads:
            encoded = [item.ids for item in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            encoded = [self._plain.encode(text, add_special_tokens=False).ids for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        ids = np.fromiter((id for ids in encoded for id in ids), dtype=np.uint32, count=int(offsets[-1]))
        return ids, offsets

    def _count(self, tokens: int) -> None:
        """Replace an encoder that has seen FORGET_AFTER_TOKENS; calls under way in other threads keep the old one."""
        self._encoded_tokens += tokens
        if self._encoded_tokens > FORGET_AFTER_TOKENS:
            import gigatoken

            self._fast, self._encoded_tokens = gigatoken.Tokenizer.from_json(self._json), 0

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of these ids; one id may be a part of a character. A special token shows as its name."""
        return b"".join([self._bytes[id] for id in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no whole character show as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the UTF-8 bytes that each id stands for; 0 for special tokens."""
        lengths = np.fromiter(map(len, self._bytes), dtype=np.int32, count=self.vocab_size)
        lengths[list(self._specials)] = 0
        return lengths

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes by id, read from the byte-level vocabulary (decoding ids one by one would break characters)."""
        table = [b""] * self.vocab_size
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        for token, id in self._plain.get_vocab(with_added_tokens=False).items():
            if id not in self._specials:
                try:
                    table[id] = bytes([byte_of[char] for char in token])
                except KeyError as error:
                    raise TokenizerError(f"{self.path}: token {id} ({token!r}) holds {error}, which stands for no byte") from None
        for id, content in self._specials.items():
            table[id] = content.encode()
        return table


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE of `vocab_size` ids (256 bytes, merges, `<|bos|>`) and write it to `out`, whole or not at all.

    The same texts in the same order give the same file. Raises TokenizerError when the texts hold too few pairs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise TokenizerError(f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {BOS} need 257")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) < vocab_size:
        raise TokenizerError(
            f"tokenizer.vocab_size={vocab_size} cannot be reached: the training text yields {reached} tokens; "
            f"set tokenizer.vocab_size={reached} or less, or give more text (data, tokenizer.train_bytes)"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save(str(temporary), pretty=False)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def load_tokenizer(path: Path, encoder: Encoder = "auto") -> Tokenizer:
    """Load a `tokenizer.json`. Raises TokenizerError when it is missing, damaged, not byte-level or without `<|bos|>`,
    or when `encoder="gigatoken"` is asked for and gigatoken is missing or gives other ids than `tokenizers`."""
    path = Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        data = read_plain(path)
    except OSError as error:
        shown = re.sub(r"(?<=:/)[^/]*@", "...@", str(path))  # of an URL, which is no path, not the password
        raise TokenizerError(f"there is no readable tokenizer {shown}: {error.strerror}") from error
    return Tokenizer(path, data, encoder)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte 0 .. 255 in a byte-level vocabulary (openai/gpt-2, src/encoder.py: bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _without_added_tokens(text: str) -> tuple[list[dict[str, Any]], str]:
    """The added tokens of a tokenizer.json, and the same JSON without them (cut out as text: parsing a vocabulary is slow)."""
    match = ADDED_TOKENS.search(text)
    if match is None:
        return [], text
    added, end = json.JSONDecoder().raw_decode(text, match.end())
    return added, f"{text[: match.end()]}[]{text[end:]}"


def _check_byte_level(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Bytes per token are only known when every byte has its token and nothing rewrites the text before."""
    if tokenizer.normalizer is not None:
        raise TokenizerError(
            f"{path} normalizes text, so its tokens are not the bytes of the text; picotrain needs a byte-level BPE without a normalizer"
        )
    if any(tokenizer.token_to_id(char) is None for char in byte_alphabet()):
        raise TokenizerError(f"{path} is no byte-level BPE: some of the 256 bytes have no token")


def _largest_id(path: Path, tokenizer: tokenizers.Tokenizer, specials: dict[Any, Any]) -> int:
    """Raises TokenizerError where ids are out of proportion: tables are as long as the largest of them."""
    ids = [*specials, *tokenizer.get_vocab().values()]
    if not all(isinstance(id, int) and 0 <= id < 2 * len(ids) for id in ids) or not all(
        isinstance(name, str) for name in specials.values()
    ):
        raise TokenizerError(f"{path} has {len(ids):,} tokens, and ids that are no numbers below twice as many, or tokens without a name")
    return max(ids)


def _load_gigatoken(plain: str, reference: tokenizers.Tokenizer) -> tuple[Any, str]:
    """The fast encoder, or None and the reason."""
    try:
        import gigatoken
    except ImportError:
        return None, "gigatoken is not installed"
    try:
        fast = gigatoken.Tokenizer.from_json(plain)
        differs = _first_difference(lambda text: fast.encode(text).tolist(), reference)
    except Exception as error:  # an unknown split pattern, for one
        return None, f"gigatoken cannot load this tokenizer ({error})"
    return (fast, "") if differs is None else (None, f"gigatoken and tokenizers give different ids for {differs[:40]!r}")


def _first_difference(encode: Callable[[str], list[int]], reference: tokenizers.Tokenizer) -> str | None:
    """The first text of SAMPLE that the two encode differently."""
    for text in SAMPLE:
        if encode(text) != reference.encode(text, add_special_tokens=False).ids:
            return text
    return None
