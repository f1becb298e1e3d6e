"""Where a config's corpus comes from: the standard library, the user's files, a URL, the Hugging Face Hub, or another package's source
(`made`).

`resolve` does the work (once: all results stay in the cache folder), `known` only looks, for a plan. Its tokenizer: `tokenizers`. How
much text there is before any of it is prepared: `amounts`. Without torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from picotrain.config.compose import data_preset
from picotrain.config.places import is_url
from picotrain.config.schema import DataConfig
from picotrain.contracts import Source as MadeSource
from picotrain.data import hub, made
from picotrain.data.corpus import (
    ORIGIN,
    Corpus,
    OnBad,
    Remote,
    assemble,
    scan,
    short_hash,
)
from picotrain.data.folder import RULE, choose, has_shards
from picotrain.data.mixture import Mixture, Source
from picotrain.data.prepare import NOT_TEXT, Input, Options, Progress, Say, identify, look, prepare, silent
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError
from picotrain.places import expanded
from picotrain.text import several, size
from picotrain.ticker import ticking

if TYPE_CHECKING:
    pass

PRESETS = ("pystdlib", "climbmix", "fineweb_edu")  # what a mixture may name instead of a path
DOWNLOADS = 4  # shards fetched at once
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
        return scan(made.make(data, cache, say), data.name, data.val_shard, cache=cache, on_bad=passing_over(data, say))
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
        folder = made.folder_of(data, cache)
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
    return cache / "corpora" / f"inputs-{short_hash([str(file.path.absolute()) for file in files])}.json"


def _stats(files: list[Input]) -> str:
    return short_hash([[(stat := file.path.stat()).st_size, stat.st_mtime_ns] for file in files])


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
    return cache / "corpora" / f"url-{short_hash([RULE, data.path, data.val_shard, data.on_bad_shard])}.json"


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
