"""What a run or config from somebody else makes this machine read, and what it sends where: said before it happens, a line a place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from picotrain import parts, ranks
from picotrain.config import Config
from picotrain.config.places import is_url, redacted
from picotrain.contracts import Source, Tracker
from picotrain.data import sources
from picotrain.data.mixture import Mixture
from picotrain.terminal import say


def of_config(config: Config, typed: Sequence[str], file: str) -> None:
    """Of a resolved config that was read from `file`, before a run starts; without the keys that were typed beside it."""
    keys = {word.partition("=")[0].lstrip("+") for word in typed}
    for key, text in _of_config(config):
        if key not in keys:
            say(f"{file} {text} ({key})")


def _of_config(config: Config) -> Iterator[tuple[str, str]]:
    """Each key that names a place, and what happens there."""
    data, core, trackers = config.data, config.evaluation.core, config.logger.trackers
    for part in sources.parts_of(data):
        if isinstance(part, Source):
            yield "data.kind", part.reads
            continue
        key = "data.mixture" if data.kind == "mixture" else "data.path" if part.kind == "files" else "data.repo_id"
        if part.kind == "files":
            yield key, f"reads text from {redacted(part.path or '')}"
        elif part.kind == "hub":
            yield key, f"downloads text from the Hugging Face Hub, {part.repo_id}"
    if config.tokenizer.path:
        yield "tokenizer.path", f"reads a tokenizer from {config.tokenizer.path}"
    if core.bundle and config.train.core_metric_every > 0:
        yield "evaluation.core.bundle", f"{'downloads' if is_url(core.bundle) else 'reads'} CORE tasks from {redacted(core.bundle)}"
    if config.archive.url:
        yield "archive.url", f"sends the whole run, its weights and its samples to {redacted(config.archive.url)}"
    for name in trackers:
        if sends := parts.find("trackers", name, Tracker).sends:
            yield "logger.trackers", f"sends {sends}"
    if config.run.cache_dir and Path(config.run.cache_dir) != _own_cache():
        yield "run.cache_dir", f"keeps corpora, tokenizers and bundles in {config.run.cache_dir}"
    if config.launch.nnodes > 1:
        yield "launch.rdzv_endpoint", f"meets other machines at {config.launch.rdzv_endpoint}"


def of_evaluation(run: Path, corpus: Mixture, bundle: str | None) -> None:
    """Of a run that is measured: where its text and its bundle (None: none, or typed) are read. What this user's cache has is no news."""
    if ranks.here().rank > 0:
        return
    for part in corpus.corpora:
        place = redacted(part.remote.url) if part.remote else str(part.root)
        if part.remote or not _is_in(Path(place), _own_cache()):
            say(f"{run} reads text from {place} (data.json)")
    if bundle:
        say(f"{run} {'downloads' if is_url(bundle) else 'reads'} CORE tasks from {redacted(bundle)} (evaluation.core.bundle)")


def _own_cache() -> Path:
    """Where this user keeps corpora, whatever a config says."""
    return Path(os.environ.get("PICOTRAIN_CACHE") or "~/.cache/picotrain").expanduser().absolute()


def _is_in(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
