"""What input files are, by name and by content."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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

Listed = list[tuple[str, int, str]]  # source, bytes and hash of each input file
Identified = tuple[str, Listed]  # the hash of all inputs, and of each


class Input(NamedTuple):
    """A file to take documents from; `source` is how its documents name it."""

    path: Path
    source: str


def kind_of(path: Path, suffixes: str | tuple[str, ...]) -> bool:
    """Whether a file has one of these suffixes, in whatever case."""
    return path.name.lower().endswith(suffixes)


def identify(files: Sequence[Input], unreadable: bool = False, read: Callable[[int], object] = lambda amount: None) -> Identified:
    """32 hex digits for the content of these files, and (source, bytes, hash) of each; `read` is told the bytes as they are read.

    Raises DataError for a file that cannot be read, or with `unreadable` gives it the size 0 and no hash.
    """
    stop = threading.Event()

    def one(file: Input) -> tuple[str, int, str]:
        digest = hashlib.blake2b(digest_size=16)
        try:
            require_regular(file.path)
            with open(file.path, "rb") as stream:
                while not stop.is_set() and (chunk := stream.read(HASH_BYTES)):
                    digest.update(chunk)
                    read(len(chunk))
                return file.source, stream.tell(), digest.hexdigest()
        except OSError as error:
            if not unreadable:
                raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
            return file.source, 0, UNREADABLE

    with ThreadPoolExecutor(READERS) as pool:
        try:
            listed = list(pool.map(one, files))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return hashlib.blake2b(json.dumps([VERSION, listed]).encode(), digest_size=16).hexdigest(), listed
