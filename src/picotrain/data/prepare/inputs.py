"""What input files are by name and content, and the lock and the rename that make a folder appear as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from picotrain import lock
from picotrain.data.footers import require_regular
from picotrain.errors import DataError

PLAIN = (".txt", ".md", ".rst")  # running text: cut when long
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".zig", ".java", ".kt", ".scala", ".swift", ".m"),
    *(".js", ".mjs", ".jsx", ".ts", ".tsx", ".cs", ".fs", ".php", ".rb", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".erl"),
    *(".clj", ".el", ".lisp", ".scm", ".dart", ".sh", ".bash", ".sql", ".f90", ".asm", ".tex"),
)  # one document a file
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CSV = (".csv", ".csv.gz", ".csv.zst")
PARQUET = ".parquet"
SUFFIXES = (*PLAIN, *CODE, *JSON_LINES, *CSV, PARQUET)
KNOWN = f"{', '.join(PLAIN)}, .py and other source code, {', '.join(JSON_LINES)}, {', '.join(CSV)}, {PARQUET}"
VERSION = 2  # part of the identity: raised when the same input would give other shards
READERS = 4  # files hashed at once
HASH_BYTES = 1 << 20  # read at once for it
UNREADABLE = "unreadable"  # in place of a hash

Say = Callable[[str], None]
Listed = list[tuple[str, int, str]]  # source, bytes and hash of each input file
Identified = tuple[str, Listed]  # the hash of all inputs, and of each


class Input(NamedTuple):
    """A file to take documents from; `source` is how its documents name it."""

    path: Path
    source: str


def silent(_message: str) -> None:
    """Say nothing."""


def kind_of(path: Path, suffixes: str | tuple[str, ...]) -> bool:
    """Whether a file has one of these suffixes, in whatever case."""
    return path.name.lower().endswith(suffixes)


def identify(files: Sequence[Input], unreadable: bool = False, read: Callable[[int], None] | None = None) -> Identified:
    """32 hex digits for the content of these files, and (source, bytes, hash) of each; `read` is told the bytes as they are read.

    Raises DataError for a file that cannot be read, or with `unreadable` gives it the size 0 and no hash.
    """
    stop = threading.Event()

    def one(file: Input) -> tuple[str, int, str]:
        try:
            size, digest = _size_and_hash(file.path, stop, read)
        except OSError as error:
            if not unreadable:
                raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
            size, digest = 0, UNREADABLE
        return file.source, size, digest

    with ThreadPoolExecutor(READERS) as pool:
        try:
            listed = list(pool.map(one, files))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return hashlib.blake2b(json.dumps([VERSION, listed]).encode(), digest_size=16).hexdigest(), listed


@contextmanager
def locked(path: Path, say: Say = silent) -> Iterator[None]:
    """Hold `path` against other processes; `say` is told when that takes waiting. Raises DataError."""
    told = False

    def wait() -> None:
        nonlocal told
        if not told:
            say(f"waiting for another process that makes {path}")
            told = True
        time.sleep(lock.LOOK_S)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written: {error.strerror}") from error
    with lock.locked(path, wait):
        yield


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`; an older one is moved away first and then removed."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _size_and_hash(path: Path, stop: threading.Event, read: Callable[[int], None] | None) -> tuple[int, str]:
    digest = hashlib.blake2b(digest_size=16)
    require_regular(path)
    with open(path, "rb") as file:
        while not stop.is_set() and (chunk := file.read(HASH_BYTES)):
            digest.update(chunk)
            if read is not None:
                read(len(chunk))
        return file.tell(), digest.hexdigest()
