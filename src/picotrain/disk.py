"""Files on a local disk, one place for each thing done to them: read within bounds, written whole or not at all, hashed.

What is read may be a stranger's: only regular files, never more than a bound, JSON without surprises. Without torch.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 256 << 20  # the data.json of a corpus of 100,000 shards
MAX_DEPTH = 50  # of JSON: whoever walks the value may recurse
HASH_BYTES = 1 << 22  # read at once


def read_plain(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file. Raises OSError for anything else, without waiting for it, and for more than `max_bytes`."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO without a writer would block
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, and at most {max_bytes:,} are read")
        return file.read(max_bytes)


def parse_json(data: bytes | str) -> Any:
    """Strict JSON. Raises ValueError, also for NaN, which JSON does not have, and for brackets without end."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        if not (level := [item for item in inner if isinstance(item, dict | list)]):
            return value
    raise ValueError("it is nested too deeply")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises OSError where it cannot be read, ValueError where it holds something else."""
    value = parse_json(read_plain(path))
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def find_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def write_whole(path: Path, data: bytes | str, place: Callable[[Path, Path], object] = os.replace, shared: bool = False) -> None:
    """Write a file, whole or not at all, and return when its content is on disk. Raises OSError.

    A process that is killed, or a machine that goes down in between, leaves what was there before; the next call writes over the
    temporary file that it left. place: gives the finished file its name. shared: several processes may write this file at once.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    file = open(temporary, "wb", opener=no_link)  # noqa: SIM115
    try:
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def no_link(path: str, flags: int) -> int:
    """Open a file that is no symlink, which in a stranger's folder could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json(path: Path, value: Any, place: Callable[[Path, Path], object] = os.replace) -> None:
    """`write_whole` of JSON, in ASCII: names of files may hold what is no Unicode. Raises ValueError for NaN."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n", place)


def fsync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def content_hash(path: Path, read: Callable[[int], object] | None = None) -> str:
    """XXH3 (64 bits) of a file's content as 16 hex digits. read: is told the number of bytes as they are read."""
    import xxhash

    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
            if read is not None:
                read(len(block))
    return digest.hexdigest()


def is_own_json(path: Path, *keys: str) -> bool:
    """Whether nothing is at `path`, or a JSON object with these keys, as picotrain writes it: only that may be written anew."""
    if _is_nothing(path):
        return True
    found = find_json(path)
    return found is not None and set(keys) <= found.keys()


def _is_nothing(path: Path) -> bool:
    """Whether nothing is there that could be lost: no file, or an empty one."""
    return not os.path.lexists(path) or (path.is_file() and not path.is_symlink() and not path.stat().st_size)


def is_own_picture(path: Path) -> bool:
    """Whether nothing is at `path`, or a PNG as picotrain makes them: without the name of a program, which others write."""
    if _is_nothing(path):
        return True
    try:
        head = read_plain(path)[:512]
    except OSError:
        return False
    return head.startswith(b"\x89PNG\r\n") and b"Software" not in head


def is_own_text(path: Path, *beginnings: str) -> bool:
    """Whether nothing is at `path`, or a text whose first lines begin like this."""
    if _is_nothing(path):
        return True
    try:
        lines = read_plain(path).decode("utf-8", "replace").split("\n", len(beginnings))
        return len(lines) > len(beginnings) and all(map(str.startswith, lines, beginnings))
    except OSError:
        return False


def is_own_page(path: Path) -> bool:
    """Whether nothing is at `path`, or a page of HTML that picotrain made."""
    if _is_nothing(path):
        return True
    try:
        return b'<meta name="generator" content="picotrain">' in read_plain(path)[:4096]
    except OSError:
        return False
