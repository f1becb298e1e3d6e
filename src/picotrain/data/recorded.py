"""A corpus as a run recorded it, held against what is there now. Without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from picotrain.config.schema import DataConfig
from picotrain.data.corpus import BadShard, Corpus, Remote, Shard, found_in, read_footers
from picotrain.data.folder import choose, has_shards
from picotrain.data.mixture import Mixture
from picotrain.data.sources import is_remote, mixture_of, parts_of, resolve, url_root
from picotrain.errors import DataError
from picotrain.places import expanded

Say = Callable[[str], None]

NAMED = 8  # shards that a refusal names before it counts


class Now(NamedTuple):
    """What is where a recorded corpus should be.

    shards: those of its names that are there and can be read; bad: those that cannot; names: every shard that a new run would use.
    """

    where: str
    root: Path
    shards: Sequence[Shard]
    bad: Sequence[DataError]
    names: Iterable[str]
    remote: Remote | None = None


class Differs(DataError):
    """A corpus that is not the recorded one."""


def reopened(recorded: Corpus, name: str, now: Now, skip: bool, say: Say) -> Corpus:
    """The recorded corpus where it is now, its shards in their places whatever a new run would make of the folder.

    With `skip` a training shard that is missing or changed stays in its place, to be passed over, so that the rows of the others come
    in the same order; `say` is told. Raises Differs, with a line for each shard that is missing, changed or new.
    """
    there, bad = {shard.name: shard for shard in now.shards}, {error.name: error for error in now.bad if isinstance(error, BadShard)}
    lines: dict[str, str] = {}
    for shard in (*recorded.shards, recorded.val):
        found = there.get(shard.name)
        if found is not None and found.fingerprint == shard.fingerprint:
            continue
        if shard.name in bad:
            lines[shard.name] = str(bad[shard.name])
        elif found is None:
            lines[shard.name] = f"{now.where}: {shard.name} is missing"
        else:
            what = f"{found.bytes:,} bytes and {found.rows:,} rows, had {shard.bytes:,} and {shard.rows:,}"
            lines[shard.name] = f"{now.where}: {shard.name} changed: it has {what}"
    own = {shard.name for shard in (*recorded.shards, recorded.val)}
    added = [f"{now.where}: {new} was added" for new in now.names if new not in own]
    corpus = replace(recorded, name=name, root=now.root, remote=now.remote)
    if not lines and not added:
        return corpus
    if recorded.val.name in lines:
        lines[recorded.val.name] += ", and it validates: no figure would compare with the earlier ones"
    if not skip or recorded.val.name in lines or len(lines) == len(recorded.shards):
        raise Differs("\n".join(f"  - {line}" for line in _some([*lines.values(), *added])))
    for line in _some(list(lines.values())):
        say(f"data.on_bad_shard=skip passes over it: {line}")
    for line in _some(added):
        say(f"{line} since this run was started, which goes on without it")
    return corpus


def reopen(data: DataConfig, recorded: Mixture, cache: Path, say: Say) -> Mixture:
    """What a run recorded, where it is now: its own shards, whatever a new run would take. Raises DataError; see `reopened`."""
    parts = parts_of(data)
    if len(parts) != len(recorded.sources):
        raise DataError(f"the run draws from {len(recorded.sources)} sources, and its config from {len(parts)}")
    corpora = []
    for part, corpus in zip(parts, recorded.corpora, strict=True):
        now = _now(part, corpus, expanded(cache).absolute(), say)
        corpora.append(reopened(corpus, part.name, now, part.on_bad_shard == "skip", say))
    return mixture_of(data, corpora)


def _now(data: DataConfig, recorded: Corpus, cache: Path, say: Say) -> Now:
    """What is there of a recorded corpus."""
    names = {shard.name for shard in (*recorded.shards, recorded.val)}
    bad: list[DataError] = []
    if is_remote(data):
        from picotrain.data.remote import list_shards, read_shards, redacted

        assert data.path is not None
        files = list_shards(data.path, also=names)
        shards = read_shards(data.path, [file for file in files if file.name in names], cache, say, bad.append)
        new = _in_use([file.name for file in files], data)
        return Now(redacted(data.path), url_root(data, cache), shards, bad, new, Remote(data.path, data.cache_bytes))
    folder = expanded(data.path or "").absolute()
    if data.kind == "hub":
        root, new = recorded.root, []
        try:
            root = resolve(data, cache, say).root
        except BadShard:
            pass  # told apart below
        except DataError as error:
            if data.on_bad_shard == "stop":
                raise
            say(str(error))
    elif data.kind == "files" and (has_shards(folder) or (folder.is_dir() and not _was_prepared(recorded))):
        root, new = folder, _in_use(found_in(folder).names, data)
    else:
        corpus = resolve(data, cache, say)
        shards = [*corpus.shards, corpus.val]
        return Now(str(corpus.root), corpus.root, shards, [], [shard.name for shard in shards])
    there = sorted(name for name in names if (root / name).is_file())
    return Now(str(root), root, read_footers(root, there, cache, bad.append), bad, new)


def _in_use(names: list[str], data: DataConfig) -> list[str]:
    """The shards of these that a new run would use."""
    try:
        chosen = choose(names, data.path or "", data.val_shard)
    except (DataError, LookupError):
        return names
    return [*chosen.train, chosen.val]


def _was_prepared(corpus: Corpus) -> bool:
    """Whether a recorded corpus was made of files in a cache folder, as `resolve` names it."""
    return corpus.root.parent.name == "corpora" and bool(re.fullmatch(r".*-[0-9a-f]{16}", corpus.root.name))


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - NAMED:,} more"] if len(lines) > NAMED else []
    return [*lines[:NAMED], *more]
