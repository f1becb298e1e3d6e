"""Where a config's corpus and tokenizer come from: the standard library, the user's files, or the Hugging Face Hub.

`resolve` and `obtain_tokenizer` do the work (once: all results stay in the cache folder); `known`, `known_tokenizer` and
`named_tokenizer` only look, for a plan. How much text there is before any of it is prepared: `amounts`. Without torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from picotrain.config.compose import data_preset
from picotrain.config.places import is_url
from picotrain.config.schema import DataConfig
from picotrain.contracts import Source as MadeSource
from picotrain.data import hub
from picotrain.data.corpus import (
    ORIGIN,
    Corpus,
    OnBad,
    Remote,
    assemble,
    hash_bytes,
    scan,
)
from picotrain.data.folder import RULE, choose, has_shards
from picotrain.data.mixture import Mixture, Source
from picotrain.data.prepare import NOT_TEXT, Input, Options, Progress, Say, identify, locked, look, prepare, silent
from picotrain.disk import find_json, read_plain, write_whole
from picotrain.errors import ConfigError, DataError, Problem, TokenizerError
from picotrain.places import expanded
from picotrain.signals import ending
from picotrain.text import clock, several, size
from picotrain.ticker import ticking

if TYPE_CHECKING:
    from picotrain.config.schema import TokenizerConfig
    from picotrain.tokenizer import Tokenizer

Text = Corpus | Mixture
PRESETS = ("pystdlib", "climbmix", "fineweb_edu")  # what a mixture may name instead of a path
DOWNLOADS = 4  # shards fetched at once
META_BYTES = 4_000_000  # text that bytes per token are measured on
META = "meta.json"  # what was measured of a tokenizer, in its cache folder
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def gather(data: DataConfig, cache: Path, say: Say = silent) -> Mixture:
    """What this config trains on, made or downloaded into `cache` when it is not there yet. Raises DataError."""
    return mixture_of(data, [resolve(part, cache, say) for part in parts_of(data)])


def known_mixture(data: DataConfig, cache: Path, say: Say = silent) -> Mixture | None:
    """What this config trains on if all of it is already there; see `known`."""
    corpora = [known(part, cache, say) for part in parts_of(data)]
    there = [corpus for corpus in corpora if corpus is not None]
    return mixture_of(data, there) if len(there) == len(corpora) else None


def resolve(data: DataConfig, cache: Path, say: Say = silent) -> Corpus:
    """The corpus of this config, made or downloaded into `cache` when it is not there yet; `say` is told what is left out of it.
    Raises DataError."""
    cache = expanded(cache).absolute()
    if isinstance(data, MadeSource):
        return scan(_make(data, cache, say), data.name, data.val_shard, cache=cache, on_bad=passing_over(data, say))
    if data.kind == "hub":
        return _download(data, cache, say)
    if is_remote(data):
        return _scan_url(data, cache, say)
    if (corpus := known(data, cache, say)) is not None:
        return corpus
    files, options = inputs(data)
    say(f"preparing {data.name} from {several(len(files), 'file')}")
    with _lines_of_bytes(say) as progress:
        identified = identify(files, read=_adding("reading", sum(file.path.stat().st_size for file in files), progress))
    folder = cache / "corpora" / f"{_label(data)}-{identified[0][:16]}"
    with _lines_of_bytes(say) as progress:
        prepare(files, folder, name=data.name, identified=identified, options=options, say=say, progress=progress)
    write_whole(_index(files, cache), json.dumps({"folder": folder.name, "stats": _stats(files)}).encode(), shared=True)
    return scan(folder, data.name, data.val_shard, on_bad=passing_over(data, say))


def passing_over(data: DataConfig, say: Say) -> OnBad | None:
    """What is told of text that cannot be read, where data.on_bad_shard=skip passes over it; None where it is an error."""
    return (lambda error: say(f"data.on_bad_shard=skip passes over it: {error}")) if data.on_bad_shard == "skip" else None


def known(data: DataConfig, cache: Path, say: Say = silent) -> Corpus | None:
    """The corpus if it is already there: no work beyond reading footers and file times, no download.

    Raises DataError for what can never be a corpus, such as a path that does not exist.
    """
    cache = expanded(cache).absolute()
    if isinstance(data, MadeSource):
        folder = _made_folder(data, cache)
        return scan(folder, data.name, data.val_shard, cache=cache, on_bad=passing_over(data, say)) if folder.is_dir() else None
    if data.kind == "hub":
        root, names = _hub_shards(data, cache)
        return _hub_corpus(data, root, names) if all((root / name).is_file() for name in names) else None
    if is_remote(data):
        return _known_url(data, cache)
    if (folder := _shard_folder(data)) is not None:
        return scan(folder, data.name, data.val_shard, cache=cache, say=say, on_bad=passing_over(data, say))
    files, _ = inputs(data, say)
    entry = find_json(_index(files, cache))
    if entry is None or entry.get("stats") != _stats(files):
        return None
    folder = cache / "corpora" / str(entry.get("folder"))
    return scan(folder, data.name, data.val_shard, on_bad=passing_over(data, say)) if (folder / ORIGIN).is_file() else None


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


@contextmanager
def _lines_of_bytes(say: Say) -> Generator[Progress]:
    """What shows how far a preparation is, a line now and then."""
    at = ""

    def update(what: str, done: int, total: int) -> None:
        nonlocal at
        at = f"{what}: {size(done)} of {size(total)}, {done / total:.0%}" if done < total else ""

    with ticking(say, lambda: at):
        yield update


def _adding(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    """What shows progress from how much more was done; threads call it."""
    done, lock = 0, threading.Lock()

    def add(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
            progress(what, done, total)

    return add


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
    return expanded(cache).absolute() / "tokenizers" / _hash(identity)


def _tokenizer_path(section: TokenizerConfig, home: Path) -> Path:
    if section.path is None:
        return home / "tokenizer.json"
    path = expanded(section.path).absolute()
    return path / "tokenizer.json" if path.is_dir() else path


def parts_of(data: DataConfig) -> list[DataConfig]:
    """A mixture's sources as data configs of their own; any other config is its own only part."""
    if data.kind != "mixture":
        return [data]
    found = []
    for entry in data.mixture:
        if entry.source in PRESETS:
            part = data_preset(entry.source)
            changes = {"num_shards": entry.num_shards or part.num_shards, "val_shard": entry.val_shard or part.val_shard}
        else:
            part = DataConfig(kind="files", name=entry.name, path=entry.source)
            changes = {"val_shard": entry.val_shard}
        found.append(part.model_copy(update={**changes, "cache_bytes": data.cache_bytes, "on_bad_shard": data.on_bad_shard}))
    return found


def mixture_of(data: DataConfig, corpora: list[Corpus]) -> Mixture:
    """The corpora of a data section, one for each of its parts, with their weights."""
    if data.kind != "mixture":
        return Mixture.of(corpora[0])
    pairs = zip(data.mixture, corpora, strict=True)
    return Mixture(data.name, tuple(Source(corpus, entry.weight, entry.at_end == "wrap") for entry, corpus in pairs))


def inputs(data: DataConfig, say: Say = silent) -> tuple[list[Input], Options]:
    """The files to prepare, and how (the library's own tests hold files that are not UTF-8 on purpose). `say` is told what
    lies beside them and is not read."""
    if data.kind == "pystdlib":
        return list(_stdlib_files()), Options(tolerated=Options().tolerated | {NOT_TEXT})
    assert data.path is not None  # the schema's business
    looked = look(data.path)
    for line in looked.words():
        say(f"{data.path}: {line}")
    return looked.files, Options()


def _shard_folder(data: DataConfig) -> Path | None:
    """The user's folder when it holds Parquet shards itself: then it is the corpus as it is."""
    if data.kind != "files" or data.path is None:
        return None
    folder = expanded(data.path)
    return folder if has_shards(folder) else None


def _stdlib_files() -> Iterator[Input]:
    """The running interpreter's own library, tests included, one document a file, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        found += [Path(here, name) for name in names if name.endswith(".py")]
    if not found:
        raise DataError(f"this Python has no library sources in {root}; use data=files data.path=... instead")
    return (Input(path, path.relative_to(root).as_posix()) for path in sorted(found))


def _label(data: DataConfig) -> str:
    """How the corpus folder is called, before its hash."""
    if data.kind == "pystdlib":
        return f"pystdlib-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in data.name)


def _index(files: list[Input], cache: Path) -> Path:
    """Which prepared folder belongs to these files, so that unchanged ones need not be read to be known."""
    return cache / "corpora" / f"inputs-{_hash([str(file.path.absolute()) for file in files])}.json"


def _stats(files: list[Input]) -> str:
    return _hash([[(stat := file.path.stat()).st_size, stat.st_mtime_ns] for file in files])


def _hash(value: Any) -> str:
    return hash_bytes(json.dumps(value).encode(), 8)


# --- sources of other packages --------------------------------------------------------------------

_NOT_TEXT = {"name", "val_shard", "licence", "lanes", "unit_bytes", "on_bad_shard"}  # keys that do not change what is written


def _made_folder(data: MadeSource, cache: Path) -> Path:
    """Where the shards of a source are that writes its own."""
    values = [data.version, data.model_dump(mode="json", exclude=_NOT_TEXT)]
    return cache / "corpora" / f"{data.kind}-{_hash(values)}"


def _make(data: MadeSource, cache: Path, say: Say) -> Path:
    """The folder with a source's shards, written when it is not there: whole or not at all."""
    folder = _made_folder(data, cache)
    with locked(folder, say):
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial, ending(f"writing {data.name}"):
            inner = Path(partial) / "shards"
            inner.mkdir()
            say(f"preparing {data.name}")
            data.write(inner, say)
            scan(inner, data.name, data.val_shard)  # what is no corpus is told now, and not kept
            inner.rename(folder)
    return folder


# --- URLs ----------------------------------------------------------------------------------------


def is_remote(data: DataConfig) -> bool:
    """Whether data.path is a URL; the corpora on the Hub are another kind."""
    return data.kind == "files" and data.path is not None and is_url(data.path)


def _scan_url(data: DataConfig, cache: Path, say: Say) -> Corpus:
    """The corpus behind a URL, from its footers alone; shards are fetched when they are needed."""
    from picotrain.data.remote import list_shards, read_shards, redacted

    assert data.path is not None
    shards = read_shards(data.path, list_shards(data.path, say), cache, say, passing_over(data, say))
    where = redacted(data.path)
    if not shards:
        raise DataError(f"{where} holds no *.parquet file that can be read")
    chosen = choose([shard.name for shard in shards], where, data.val_shard)
    for line in chosen.words:
        say(line)
    corpus = assemble(data.name, url_root(data, cache), shards, chosen, remote=Remote(data.path, data.cache_bytes))
    index = _url_index(data, cache)
    index.parent.mkdir(parents=True, exist_ok=True)
    write_whole(index, json.dumps(corpus.to_json()).encode(), shared=True)
    return corpus


def _known_url(data: DataConfig, cache: Path) -> Corpus | None:
    """What `_scan_url` found when it last looked; the network is not asked."""
    found = find_json(_url_index(data, cache))
    return Corpus.from_json(found) if found else None


def url_root(data: DataConfig, cache: Path) -> Path:
    """Where shards of a URL are fetched to."""
    from picotrain.data.remote import manifest_name

    assert data.path is not None
    return cache / "shards" / Path(manifest_name(data.path)).stem


def _url_index(data: DataConfig, cache: Path) -> Path:
    return cache / "corpora" / f"url-{_hash([RULE, data.path, data.val_shard, data.on_bad_shard])}.json"


# --- the Hugging Face Hub ------------------------------------------------------------------------


def _hub_shards(data: DataConfig, cache: Path) -> tuple[Path, list[str]]:
    """The folder of a Hub corpus and the file names in it: the validation shard first, then `num_shards` training shards."""
    assert data.file_pattern and data.num_shards and data.max_shards  # the schema's business, as is their range
    pattern = PurePosixPath(data.file_pattern)
    if "{" in str(pattern.parent):
        raise DataError(
            f"data.file_pattern={data.file_pattern!r}: the shards must stand in one folder, with {{index}} in their names alone"
        )
    val = data.val_shard or pattern.name.format(index=data.max_shards - 1)
    names = [pattern.name.format(index=index) for index in range(data.num_shards + 1)]
    train = [name for name in names if name != val][: data.num_shards]
    return cache / "corpora" / _label(data) / pattern.parent, [val, *train]


def _hub_corpus(data: DataConfig, root: Path, names: list[str]) -> Corpus:
    corpus = scan(root, data.name, names[0], only=names)
    return replace(corpus, origin={"kind": "hub", "repo_id": data.repo_id, "file_pattern": data.file_pattern})


def _download(data: DataConfig, cache: Path, say: Say) -> Corpus:
    """Fetch what is missing; a shard gets its name when it is whole, and a broken download goes on where it stopped."""
    root, names = _hub_shards(data, cache)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        terms = f" (licence: {data.licence})" if data.licence else ""
        say(f"downloading {len(missing)} of {len(names)} shards of {data.repo_id}{terms} into {root}")
        failed = threading.Event()

        def fetch(name: str) -> tuple[str, int]:
            if failed.is_set():  # another shard's error is on its way to the user
                raise CancelledError
            try:
                return _fetch(data, cache, name)
            except BaseException:
                failed.set()
                raise

        with hub.retries_said(say), ThreadPoolExecutor(DOWNLOADS) as pool:
            try:
                for count, (name, n_bytes) in enumerate(pool.map(fetch, missing), 1):
                    say(f"shard {count} of {len(missing)}: {name}, {n_bytes / 1e6:,.1f} MB")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return _hub_corpus(data, root, names)


def _fetch(data: DataConfig, cache: Path, name: str) -> tuple[str, int]:
    """One shard into the cache; HF_ENDPOINT, HF_TOKEN and the like are honoured by huggingface_hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    assert data.file_pattern and data.repo_id
    filename = str(PurePosixPath(data.file_pattern).parent / name)
    try:
        path = hf_hub_download(data.repo_id, filename, repo_type="dataset", local_dir=cache / "corpora" / _label(data))
    except GatedRepoError as error:
        raise DataError(f"{data.repo_id} asks for access; agree to its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"the Hub has no data set {data.repo_id} (or it is private: set HF_TOKEN); see data.repo_id") from error
    except LocalEntryNotFoundError as error:  # before EntryNotFoundError, its base: the Hub was not reached
        raise DataError(_unreachable(data, filename, error)) from error
    except EntryNotFoundError as error:
        raise DataError(f"{data.repo_id} has no file {filename}; see data.file_pattern, data.num_shards and data.max_shards") from error
    except Exception as error:  # whatever HTTP client the installed huggingface_hub has
        if isinstance(error, OSError) and error.errno is not None and shutil.disk_usage(cache).free < 1 << 28:
            raise DataError(f"{cache} is on a full disk: {error.strerror}; free some space or set PICOTRAIN_CACHE") from error
        raise DataError(_unreachable(data, filename, error)) from error
    return name, Path(path).stat().st_size


def _unreachable(data: DataConfig, filename: str, error: Exception) -> str:
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return (
        f"{filename} of {data.repo_id} cannot be downloaded: {reason[0]}; try again (what is there is kept), "
        "or train without a network: data=pystdlib, or data=files data.path=..."
    )
