"""Text <-> token ids: a byte-level BPE whose artifact is a Hugging Face `tokenizer.json`.

Trained by `tokenizers`, encoded by `gigatoken` (measured: tens of times faster, the same ids) where it is there and
agrees with `tokenizers` on the texts of `proof`. What a file may hold and what not, `artifact` says. Text is data: the characters
`<|bos|>` in a document never become the special token, because both encoders are given the vocabulary without its special tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from picotrain.disk import read_plain, write_whole
from picotrain.errors import TokenizerError
from picotrain.places import expanded
from picotrain.tokenizer import artifact, proof
from picotrain.tokenizer.artifact import BOS, byte_alphabet, without_bom
from picotrain.tokenizer.proof import SAMPLE

__all__ = ["BOS", "SAMPLE", "SPLIT_PATTERN", "Encoder", "Tokenizer", "byte_alphabet", "load_tokenizer", "train_tokenizer", "without_bom"]

Encoder = Literal["auto", "gigatoken", "tokenizers"]

# How text is cut before merging, as in Llama 3 (meta-llama/llama3, llama/tokenizer.py); gigatoken has a fast path for it.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# gigatoken remembers every distinct word it has met, about 95 bytes each, for ever; after so many tokens it starts afresh.
FORGET_AFTER_TOKENS = 100_000_000


class Tokenizer:
    """A loaded `tokenizer.json`; any number of threads may use it at once.

    path: the file. vocab_size: ids are 0 .. vocab_size - 1, specials included. bos_id: the id of `<|bos|>`.
    fingerprint: hash of the file. encoder: "gigatoken" or "tokenizers", the one in use; note: why it is not the fast one.
    switched_off: what in the file cuts, pads or draws, in words; "" for nothing. changes: a sentence for each thing that is not as it says.
    """

    _fast: Any  # gigatoken's Tokenizer, or None

    def __init__(self, path: Path, data: bytes, encoder: Encoder = "auto"):
        self.path = path
        self.fingerprint = hashlib.blake2b(without_bom(data), digest_size=16).hexdigest()
        found = artifact.read(path, data)
        self._plain, self._json, self._specials, self._bytes = found.bpe, found.json, found.specials, found.bytes
        self.vocab_size, self.bos_id, self.switched_off = len(found.bytes), found.bos_id, found.off
        verb = "are" if " and " in found.off else "is"
        self.changes = [f"{path}: {found.off} {verb} switched off; every text is encoded whole"] if found.off else []
        texts = proof.texts([*found.specials.values()])
        with self._faults("tokenizers"):
            if reason := proof.lost(self._encode_plain, texts, self._bytes_of_text):
                raise TokenizerError(f"{path} does not give text back: {reason}; train one with `picotrain tokenizer`")
        if not self._decodes(texts):
            self.changes += [f"{path}: its decoder does not give text back, and is not used here; other programs will show other text"]
        self._encoded_tokens = 0
        self._fast, self.note = (None, "") if encoder == "tokenizers" else self._load_gigatoken(texts)
        if encoder == "gigatoken" and self._fast is None:
            raise TokenizerError(f"tokenizer.encoder=gigatoken: {self.note}; tokenizer.encoder=tokenizers or auto works without it")
        self.encoder = "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without `<|bos|>`; special tokens are never among them."""
        try:
            with self._faults(self.encoder):
                return (_encode_fast(self._fast, [text]) if self._fast is not None else self._encode_plain([text]))[0]
        except TypeError:  # both refuse lone surrogates so
            raise TokenizerError("the text holds a lone surrogate, so that it is not valid Unicode") from None

    def encode_flat(self, texts: Sequence[str], use_threads: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end: (ids uint32 (total,), offsets int64 (n + 1,)); text i is ids[offsets[i]:offsets[i + 1]].

        With gigatoken the GIL is released for the whole call and no Python list is built. `use_threads` spreads the
        texts over all cores; the ids are the same.
        """
        with self._faults(self.encoder):
            if (fast := self._fast) is not None:
                layout = fast.encode_batch(list(texts), parallel=use_threads).layout.to_ListOffsetArray64(True)
                offsets = np.asarray(layout.offsets.data)
                self._count(int(offsets[-1]))
                return np.asarray(layout.content.data)[: offsets[-1]], offsets
            if use_threads:
                encoded = [item.ids for item in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
            else:
                encoded = self._encode_plain(texts)
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

    @property
    def _bytes_of_text(self) -> list[bytes]:
        """Bytes by id as text may yield them: none of a special token."""
        return [b"" if id in self._specials else stands_for for id, stands_for in enumerate(self._bytes)]

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._plain.encode(text, add_special_tokens=False).ids for text in texts]

    def _decodes(self, texts: Sequence[str]) -> bool:
        """Whether the file's own decoder, which others will use, gives the texts back."""
        return all(
            self._plain.decode(ids, skip_special_tokens=False) == text for text, ids in zip(texts, self._encode_plain(texts), strict=True)
        )

    def _load_gigatoken(self, texts: Sequence[str]) -> tuple[Any, str]:
        """The fast encoder, or None and the reason."""
        try:
            import gigatoken
        except ImportError:
            return None, "gigatoken is not installed"
        try:
            with artifact.panics():
                fast = gigatoken.Tokenizer.from_json(self._json)
                differs = proof.differing(lambda texts: _encode_fast(fast, texts), self._encode_plain, texts)
                reason = proof.lost(lambda texts: _encode_fast(fast, texts), texts, self._bytes_of_text)
        except Exception as error:  # an unknown split pattern, for one
            return None, f"gigatoken cannot load this tokenizer ({error})"
        if differs is not None:
            return None, f"gigatoken and tokenizers give different ids for {differs[:40]!r}"
        return (None, f"gigatoken does not give text back: {reason}") if reason else (fast, "")

    @contextmanager
    def _faults(self, encoder: str) -> Generator[None]:
        """Say a fault in an encoder's Rust code as a message that names the file."""
        try:
            with artifact.panics():
                yield
        except artifact.Panic as error:
            raise TokenizerError(f"{self.path}: {encoder} cannot encode a text: {error}") from error


def _encode_fast(fast: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids by gigatoken. Its `encode` is not used: it borrows the encoder for itself, and fails while another thread is in it."""
    return fast.encode_batch_list(list(texts), parallel=False)


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
    write_whole(out, tokenizer.to_str(pretty=False), shared=True)


def load_tokenizer(path: Path, encoder: Encoder = "auto") -> Tokenizer:
    """Load a `tokenizer.json`. Raises TokenizerError when it is missing, damaged, not byte-level or without `<|bos|>`,
    or when `encoder="gigatoken"` is asked for and gigatoken is missing or gives other ids than `tokenizers`."""
    path = expanded(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        data = read_plain(path)
    except OSError as error:
        shown = re.sub(r"(?<=:/)[^/]*@", "...@", str(path))  # of an URL, which is no path, not the password
        raise TokenizerError(f"there is no readable tokenizer {shown}: {error.strerror}") from error
    return Tokenizer(path, data, encoder)
