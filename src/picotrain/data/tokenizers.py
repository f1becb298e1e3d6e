"""A corpus's tokenizer: made once and kept in the cache folder, or only looked at for a plan; and whether the corpus fills rows.

Without torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain.data.corpus import Corpus, OnBad, hash_bytes, short_hash
from picotrain.data.mixture import Mixture
from picotrain.data.prepare import Say, locked, silent
from picotrain.disk import find_json, read_plain, write_whole
from picotrain.errors import ConfigError, DataError, Problem, TokenizerError
from picotrain.places import expanded
from picotrain.signals import ending
from picotrain.text import clock, size
from picotrain.ticker import ticking

if TYPE_CHECKING:
    from picotrain.config.schema import TokenizerConfig
    from picotrain.tokenizer import Tokenizer

Text = Corpus | Mixture
META_BYTES = 4_000_000  # text that bytes per token are measured on
META = "meta.json"  # what was measured of a tokenizer, in its cache folder


def obtain_tokenizer(
    section: TokenizerConfig, corpus: Text, cache: Path, say: Say = silent, on_bad: OnBad | None = None
) -> tuple[Path, dict[str, Any]]:
    """The path of this config's `tokenizer.json` (the one it names, or one trained on the training split and kept in
    `cache`) and what was measured of it: {"vocab_size", "bytes_per_token", "corpus", "tokenizer"}.

    `on_bad` is told of text that cannot be read, which is then passed over; None: DataError is raised.
    Raises TokenizerError when the vocabulary is not the config's, or more than the text yields.
    """
    from picotrain.tokenizer import train_tokenizer

    home = _tokenizer_home(section, corpus, cache)
    path = _tokenizer_path(section, home)
    if path.is_file() and (meta := known_tokenizer(section, corpus, cache)) is not None:
        return path, meta
    if on_bad is not None:  # of less text it is another one, which nobody who has all of it may get
        home = home.with_name(f"{home.name}-skip")
        path = _tokenizer_path(section, home)
    with locked(home, say):
        if section.path is None and not path.is_file():
            used = min(section.train_bytes, corpus.text_bytes)
            say(f"training a tokenizer of {section.vocab_size:,} tokens on {used / 1e6:,.1f} MB of {corpus.name}")
            started = time.monotonic()
            sample = Mixture.of(corpus).sample(section.train_bytes, on_bad)
            with ending("training a tokenizer"), _telling_how_far(sample, used, say) as texts:  # most of it is in native code
                train_tokenizer(texts, section.vocab_size, path)
            say(f"trained it in {time.monotonic() - started:.1f} s: {path}")
        tokenizer = tokenizer_of(path, section)
        if tokenizer.vocab_size != section.vocab_size:
            raise TokenizerError(
                f"{path} has {tokenizer.vocab_size:,} tokens and tokenizer.vocab_size is {section.vocab_size:,}; "
                f"set tokenizer.vocab_size={tokenizer.vocab_size}, or name another tokenizer.path"
            )
        meta = _measure(tokenizer, corpus, on_bad)
        home.mkdir(parents=True, exist_ok=True)
        write_whole(home / META, json.dumps(meta, indent=1).encode(), shared=True)
    return path, meta


def tokenizer_of(path: Path, section: TokenizerConfig) -> Tokenizer:
    """The tokenizer in a file, for this section's encoder; loaded once as long as the file stays what it is. Raises TokenizerError."""
    there = path.stat() if path.is_file() else None
    return _loaded(path, section.encoder, there and (there.st_ino, there.st_size, there.st_mtime_ns))


@lru_cache(maxsize=1)
def _loaded(path: Path, encoder: Any, file: object) -> Tokenizer:
    from picotrain.tokenizer import load_tokenizer

    return load_tokenizer(path, encoder)


def named_tokenizer(section: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that `path` names; None: one will be trained. Raises ConfigError when it cannot be read or is of another vocabulary."""
    if section.path is None:
        return None
    try:
        tokenizer = tokenizer_of(_tokenizer_path(section, Path()), section)
    except TokenizerError as error:
        raise ConfigError([Problem("tokenizer.path", str(error))]) from error
    if tokenizer.vocab_size != section.vocab_size:
        rule = f"is {section.vocab_size:,}, but {tokenizer.path} has {tokenizer.vocab_size:,} tokens"
        right = f"tokenizer.vocab_size={tokenizer.vocab_size}, or another tokenizer.path"
        raise ConfigError([Problem("tokenizer.vocab_size", rule, right)])
    return tokenizer


def known_tokenizer(section: TokenizerConfig, corpus: Text, cache: Path) -> dict[str, Any] | None:
    """What `obtain_tokenizer` measured, if it has run for this corpus and section."""
    return find_json(_tokenizer_home(section, corpus, cache) / META)


def check_rows(data: Text, tokenizer: Tokenizer, seq_len: int, unit_bytes: int, on_bad: OnBad | None = None) -> None:
    """Raise DataError unless each source's training and validation shards fill at least one row of seq_len + 1 tokens.
    `on_bad` is told of training text that cannot be read, which is then passed over."""
    for corpus in Mixture.of(data).corpora:
        _check_rows(corpus, tokenizer, seq_len, unit_bytes, on_bad)


def _check_rows(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, unit_bytes: int, on_bad: OnBad | None) -> None:
    from picotrain.data.lanes import has_full_row, remedy, too_short

    if not has_full_row(corpus, tokenizer, seq_len, unit_bytes, on_bad):
        raise DataError(too_short(corpus, seq_len))
    if not has_full_row(replace(corpus, shards=(corpus.val,)), tokenizer, seq_len, unit_bytes):
        raise DataError(
            f"{corpus.root / corpus.val.name} ({corpus.val.rows:,} validation documents, {corpus.val.text_bytes:,} bytes) fills "
            f"no row of {seq_len + 1} tokens; {remedy(seq_len)}"
        )


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Bytes of these documents per token, the `<|bos|>` that leads each of them counted."""
    ids, _ = tokenizer.encode_flat(texts)
    return sum(len(text.encode()) for text in texts) / (len(ids) + len(texts))


def _measure(tokenizer: Tokenizer, corpus: Text, on_bad: OnBad | None) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token(tokenizer, list(Mixture.of(corpus).sample(META_BYTES, on_bad))),
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }


def _tokenizer_home(section: TokenizerConfig, corpus: Text, cache: Path) -> Path:
    """One folder for each corpus and vocabulary; the encoder is no part of it, as both give the same ids."""
    identity: list[Any] = [corpus.fingerprint, section.kind, section.vocab_size, section.train_bytes]
    if section.path is not None:
        file = _tokenizer_path(section, Path())
        try:
            content = hash_bytes(read_plain(file))
        except OSError:  # whoever loads it says what is wrong
            content = str(file)
        identity = [corpus.fingerprint, section.vocab_size, content, "whole texts"]  # older ones were measured on texts that a file cut
    return expanded(cache).absolute() / "tokenizers" / short_hash(identity)


def _tokenizer_path(section: TokenizerConfig, home: Path) -> Path:
    if section.path is None:
        return home / "tokenizer.json"
    path = expanded(section.path).absolute()
    return path / "tokenizer.json" if path.is_dir() else path


@contextmanager
def _telling_how_far(texts: Iterator[str], total: int, say: Say) -> Generator[Iterator[str]]:
    """The texts of a training that takes long, with a line now and then that says where it is."""
    started, done, merging = time.monotonic(), 0, False

    def counted() -> Iterator[str]:
        nonlocal done, merging
        for text in texts:
            done += len(text.encode())
            yield text
        merging = True

    def status() -> str:
        if merging:
            return f"training the tokenizer: the text is read, merging, {clock(time.monotonic() - started)} so far"
        return f"training the tokenizer: read {size(done)} of {size(total)}"

    with ticking(say, status):
        yield counted()
