"""The store behind an archive, and what of a run directory belongs into it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from picotrain.checkpoint.folder import PREFIX, Manifest
from picotrain.config.places import flaw, is_url, redacted, scheme_of
from picotrain.data.remote.errors import Missing, Transient, reason_of
from picotrain.data.remote.store import Store
from picotrain.disk import parse_json
from picotrain.errors import CheckpointError, DataError, RunError
from picotrain.places import expanded

OWNER, CONFIG, METRICS = "archive.json", "config.yaml", "metrics.jsonl"
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
FILES = (CONFIG, "plan.json", "data.json", "tokenizer.json", "environment.json", "overrides.txt", f"{METRICS}*")
FILES += ("report.md", "report.html", "summary.json", "*.png", "*.svg", "wandb_id.txt")
FOLDERS = ("attempts", "eval", "profile")
RENAMING = ("file", "local", "sftp", "ssh")  # where a half-written file would be seen: written beside, then moved
MAX_MANIFEST_BYTES = 16 << 20


def open_remote(url: str, stop: threading.Event) -> Remote:
    """The store of an archive; a path without a scheme is a local folder. Nothing is asked of it yet.

    Raises RunError when the protocol is unknown or cannot be written, its package is missing, or it connects at once and cannot.
    """
    if wrong := flaw(url, "write"):
        raise RunError(f"archive {wrong[0]} ({wrong[1]})")
    if not is_url(url):
        url = f"file://{expanded(url).absolute()}"
    try:
        return Remote(url, stop)
    except DataError as error:
        raise RunError(f"archive {error}") from error
    except Exception as error:  # some connect at once: sftp://
        raise RunError(f"archive {redacted(url)} cannot be opened: {reason_of(error, url)}") from error


class Remote(Store):
    """The files of an archive by their names below its URL. Raises what a `Store` does: Missing, DataError, Transient; and
    Cancelled once `stop` is set."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name, as it is now; names are the store's and not to be trusted (see `escapes`)."""
        self._fs.invalidate_cache()
        found: dict[str, Any] = self._call(self.where(), "find", self._path(), detail=True)
        root = self._path() + "/"
        files = {name: info for name, info in found.items() if info.get("type") == "file" and not info.get("islink")}
        return {name.removeprefix(root): info["size"] for name, info in files.items() if name.startswith(root) and not name.endswith("/")}

    def content(self, name: str) -> bytes:
        return self._call(self.where(name), "cat_file", self._path(name))

    def fetch(self, name: str, target: Path) -> None:
        self._call(self.where(name), "get_file", self._path(name), str(target))

    def put(self, name: str, source: Path | bytes) -> None:
        """Replace a file at once: it is never there in part."""
        where, target = self.where(name), self._path(name)
        arriving = target
        if scheme_of(self.url) in RENAMING:
            folder, _, last = target.rpartition("/")
            arriving = f"{folder}/.tmp-{last}"
            self._call(where, "makedirs", folder, exist_ok=True)
        if isinstance(source, bytes):
            self._call(where, "pipe_file", arriving, source)
        else:
            self._call(where, "put_file", str(source), arriving)
        if arriving != target:
            self._call(where, "mv", arriving, target)

    def delete(self, name: str) -> None:
        with suppress(Missing):
            self._call(self.where(name), "rm_file", self._path(name))

    def delete_folder(self, name: str) -> None:
        """Remove an empty folder where folders are more than parts of names."""
        if scheme_of(self.url) in RENAMING:
            with suppress(DataError, Transient):
                self._call(self.where(name), "rmdir", self._path(name))


def is_mirrored(name: str) -> bool:
    """Whether a file of a run directory goes into the archive by itself: no checkpoint, lock or temporary file."""
    first, *rest = name.split("/")
    if any(part.startswith(".") or part.endswith(".tmp") for part in (first, *rest)):
        return False
    return first in FOLDERS if rest else any(fnmatchcase(first, pattern) for pattern in FILES)


def mirrored_files(run_dir: Path) -> Iterator[tuple[str, Path]]:
    """Those files by name, the run's own before those of its folders. Links are not followed."""
    for folder, folders, names in os.walk(run_dir):
        at = Path(folder)
        folders[:] = sorted(name for name in folders if at != run_dir or name in FOLDERS)
        for name in sorted(names):
            path = at / name
            inside = path.relative_to(run_dir).as_posix()
            if is_mirrored(inside) and path.is_file() and not path.is_symlink():
                yield inside, path


def escapes(name: str) -> bool:
    """Whether a file of this name would not be inside the folder it is put into."""
    return bool({"", ".", ".."} & set(name.split("/"))) or bool({"\\", "\0"} & set(name))


def manifest_sizes(step: str, manifest: bytes) -> dict[str, int]:
    """Bytes of a checkpoint's files by its manifest. Raises CheckpointError when it is none, or names a file elsewhere."""
    try:
        return {name: entry.bytes for name, entry in Manifest.model_validate(parse_json(manifest)).files.items()}
    except ValueError as error:  # pydantic's is one
        raise CheckpointError(f"{step} is damaged: its {MANIFEST} cannot be read, or names no files, or files outside it") from error


def steps_in(names: Iterable[str]) -> set[str]:
    """The checkpoint folders that files of these names are in, whole or not."""
    parts = (name.split("/") for name in names)
    found = {part[1] for part in parts if len(part) == 3 and part[0] == CHECKPOINTS}
    return {step for step in found if step.startswith(PREFIX) and step.removeprefix(PREFIX).isdecimal()}


def by_step(steps: Iterable[str]) -> list[str]:
    """Names of checkpoint folders, the oldest first."""
    return sorted(steps, key=lambda step: int(step.removeprefix(PREFIX)))
