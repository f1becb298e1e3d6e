"""An evaluation bundle by URL: downloaded once, checked against its SHA-256, unpacked into the cache folder.

The archive (zip or tar) is trusted with nothing: members that leave the folder, links, devices, doubles and absurd sizes
refuse it as a whole. The folder appears under its final name only when all of it is there.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from picotrain.data.remote.errors import retry
from picotrain.data.remote.store import open_store
from picotrain.errors import DataError
from picotrain.text import size

MAX_ARCHIVE_BYTES = 4 << 30
MAX_UNPACKED_BYTES = 16 << 30
MAX_RATIO, FREE_RATIO_BYTES = 100, 64 << 20  # what an archive unpacks to, in times of its own size; so much it may in any case
MAX_MEMBERS = 100_000
MAX_INDEX_BYTES = 64 << 20  # of a zip's table of contents, which is held in memory
MAX_HEADER_BYTES = 8 << 20  # of a tar's extended header, which is read at once
SPARE_BYTES = 64 << 20  # that stay free on the disk
BLOCK_BYTES = 1 << 20
ZIP_END_BYTES = (1 << 16) + 22 + 76  # within which a zip's last records stand
UNPACKERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_BROKEN = (
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)


class _Member(NamedTuple):
    name: str
    is_folder: bool
    refused: str  # what kind of thing it is, where it is neither file nor folder
    open: Callable[[], IO[bytes] | None]


def fetch(url: str, sha256: str, cache_dir: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the bundle at `url`, whose SHA-256 is known. It is downloaded unless it was before.

    Safe to call from several processes: whoever comes second finds, or drops, what it made. Raises DataError when it cannot
    be fetched, is another file, or is no archive of a bundle; then nothing is left behind.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise DataError(f"the SHA-256 of an evaluation bundle is 64 hex digits, not {sha256!r}")
    folder = Path(cache_dir) / "bundles" / sha256[:16]
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as place:
                archive, unpacked = Path(place) / "archive", Path(place) / "unpacked"
                _download(url, sha256, archive, say)
                unpack(archive, unpacked)
                _root(unpacked)
                _put(unpacked, folder)
        except OSError as error:
            raise DataError(f"the evaluation bundle cannot be put into {folder.parent}: {error.strerror or error}") from error
    return _root(folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into a new folder. Raises DataError for whatever is not plain files and folders in it, and for more
    than such an archive can hold, or the disk has room for; OSError of the disk."""
    folder.mkdir()
    room = _Room(archive, folder)
    try:
        members = _zip_members(archive, room) if zipfile.is_zipfile(archive) else _tar_members(archive)
        for number, member in enumerate(members, start=1):
            if number > MAX_MEMBERS:
                raise DataError(f"the archive has more than {MAX_MEMBERS:,} members")
            _unpack_member(member, folder, room)
    except _BROKEN as error:
        raise DataError(f"the archive is damaged, or neither zip nor tar: {error}") from error


class _Room:
    """How much an archive may unpack to: by what its size makes likely, and by what the disk has."""

    def __init__(self, archive: Path, folder: Path):
        bytes_ = archive.stat().st_size
        self._likely = min(MAX_UNPACKED_BYTES, max(FREE_RATIO_BYTES, MAX_RATIO * bytes_))
        self._free = shutil.disk_usage(folder).free - SPARE_BYTES
        self._archive, self._taken = bytes_, 0

    def require(self, amount: int) -> None:
        """Raise DataError unless so many bytes more may be written."""
        if self._taken + amount > self._likely:
            raise DataError(
                f"the archive has {size(self._archive)} and unpacks to more than {size(self._likely)}, which no bundle of its size does; "
                "it is not used"
            )
        if self._taken + amount > self._free:
            raise DataError(f"the archive unpacks to more than the {size(max(0, self._free))} that the disk has room for; free some space")

    def take(self, amount: int) -> None:
        """So many bytes are to be written now."""
        self.require(amount)
        self._taken += amount


def _unpack_member(member: _Member, folder: Path, room: _Room) -> None:
    """Write one member, as far as there is room, whatever the archive claims."""
    name = PurePosixPath(member.name)
    if member.refused:
        raise DataError(f"the archive holds {member.refused}, {member.name!r}; a bundle has files and folders only")
    if name.is_absolute() or ".." in name.parts or {"\\", "\0", ":"} & set(member.name):
        raise DataError(f"the archive holds {member.name!r}, which leaves its folder")
    path = folder / name
    try:
        (path if member.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"the archive holds {member.name!r}, and part of that name as a file, too") from None
    if member.is_folder:
        return
    source = member.open()
    if source is None:
        raise DataError(f"the archive holds {member.name!r}, which cannot be read")
    with closing(source), _create(path, member.name) as out:
        while block := source.read(BLOCK_BYTES):
            room.take(len(block))
            out.write(block)


def _create(path: Path, name: str) -> IO[bytes]:
    try:
        return open(path, "xb")
    except (FileExistsError, IsADirectoryError):
        raise DataError(f"the archive holds {name!r} twice") from None


def _zip_members(archive: Path, room: _Room) -> Iterator[_Member]:
    _check_index(archive)
    with zipfile.ZipFile(archive) as file:
        room.require(sum(info.file_size for info in file.infolist()))  # before anything is written
        for info in file.infolist():
            mode = info.external_attr >> 16
            odd = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
            yield _Member(info.filename, info.is_dir(), "a link or device" if odd else "", lambda info=info: file.open(info))


def _check_index(archive: Path) -> None:
    """Raise DataError where a zip's table of contents is too long to be held in memory. Its last record says how long it is."""
    with open(archive, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - ZIP_END_BYTES))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    if length == 0xFFFFFFFF and (at := tail.rfind(b"PK\x06\x06")) >= 0:  # zip64
        length = int.from_bytes(tail[at + 40 : at + 48], "little")
    if at >= 0 and length > MAX_INDEX_BYTES:
        raise DataError(f"the archive's table of contents has {size(length)}, and at most {size(MAX_INDEX_BYTES)} are read")


class _Bounded(io.RawIOBase):
    """What a tar is read from. tarfile reads an extended header in one piece, however long it claims to be. A long one is refused here."""

    def __init__(self, inner: IO[bytes]):
        self._inner = inner

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError(f"the archive holds a header of {size:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
        return self._inner.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()


def _tar_members(archive: Path) -> Iterator[_Member]:
    with open(archive, "rb") as raw:
        head = raw.read(6)
    opener = next((opener for begin, opener in UNPACKERS.items() if head.startswith(begin)), open)
    with opener(archive, "rb") as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as file:  # type: ignore[arg-type]
        for info in file:
            odd = not (info.isreg() or info.isdir())
            yield _Member(info.name, info.isdir(), "a link or device" if odd else "", lambda info=info: file.extractfile(info))


def _download(url: str, sha256: str, archive: Path, say: Callable[[str], None]) -> None:
    base, question_mark, query = url.partition("?")
    base, _, name = base.rpartition("/")
    stop = threading.Event()
    store = open_store(base + question_mark + query, stop)
    say(f"fetching the evaluation bundle {store.where(name)}")
    arrived = 0

    def attempt() -> str:
        nonlocal arrived
        digest, arrived = hashlib.sha256(), 0
        with open(archive, "wb") as out, closing(store.read(name)) as blocks:
            for block in blocks:
                arrived += len(block)
                if arrived > MAX_ARCHIVE_BYTES:
                    raise DataError(f"{store.where(name)} has more than {size(MAX_ARCHIVE_BYTES)}")
                digest.update(block)
                out.write(block)
        return digest.hexdigest()

    found = retry(attempt, store.where(name), stop, say, lambda: 0)
    if found != sha256:
        raise DataError(f"{store.where(name)} has the SHA-256 {found} ({arrived:,} bytes), expected was {sha256}; it is not used")


def _put(unpacked: Path, folder: Path) -> None:
    """Give the unpacked folder its name, unless another process was first."""
    try:
        os.rename(unpacked, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(unpacked, ignore_errors=True)


def _root(folder: Path) -> Path:
    """Where core.yaml is: in the folder, or in the only one that it holds."""
    inner = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    for place in (folder, *inner):
        if (place / "core.yaml").is_file():
            return place
    raise DataError(f"{folder.name} is no evaluation bundle: there is no core.yaml in it")
