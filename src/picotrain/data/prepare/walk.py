"""Which files are meant by what the user names, and what lies beside them and is not read, with a word for each."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from picotrain.data.corpus import hint_for
from picotrain.data.folder import kind_of_mode, suffix_of
from picotrain.data.prepare.inputs import KNOWN, SUFFIXES, Input, kind_of
from picotrain.errors import DataError
from picotrain.places import expanded

NOT_READ, HIDDEN, LINK, NO_FILE, UNREADABLE = "not read", "hidden", "link", "no file", "unreadable"
SHOWN = 12  # kinds of files that a line names


class Left(NamedTuple):
    """Something that is not read: how it is called, one of the kinds above, and why."""

    source: str
    kind: str
    reason: str


class Looked(NamedTuple):
    """The files to read, and what is left."""

    files: list[Input]
    left: list[Left]

    def words(self) -> list[str]:
        """What to say of what is left: a line for each kind."""
        kinds = Counter(item.kind for item in self.left)
        lines = []
        if count := kinds[NOT_READ]:
            by_suffix = Counter(suffix_of(item.source) for item in self.left if item.kind == NOT_READ).most_common()
            told = [f"{number:,} {suffix}" for suffix, number in by_suffix[:SHOWN]]
            told += [f"{sum(number for _, number in by_suffix[SHOWN:]):,} of other kinds"] if len(by_suffix) > SHOWN else []
            lines.append(f"left out {_count(count, 'file')} of kinds that are not read: {', '.join(told)}")
        for kind, what in ((HIDDEN, "hidden file"), (LINK, "link"), (NO_FILE, "thing"), (UNREADABLE, "unreadable thing")):
            if count := kinds[kind]:
                reasons = Counter(item.reason for item in self.left if item.kind == kind)
                why = "" if kind == HIDDEN else ": " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
                lines.append(f"left out {_count(count, what)}{why}")
        return lines


def look(inputs: str | Path | Iterable[str | Path | Input]) -> Looked:
    """What is meant by files, folders and globs, sorted within each. Raises DataError when no file is."""
    found, left = [], []
    for item in [inputs] if isinstance(inputs, str | Path) else list(inputs):
        looked = Looked([item], []) if isinstance(item, Input) else _look(expanded(item))
        found += looked.files
        left += looked.left
    unique = {entry.path.absolute(): entry for entry in found}
    if not unique:
        raise DataError("no input files were given")
    return Looked(list(unique.values()), left)


def expand(inputs: str | Path | Iterable[str | Path | Input]) -> list[Input]:
    """The files of `look`."""
    return look(inputs).files


def _look(path: Path) -> Looked:
    if path.is_dir():
        looked = _looked(path, sorted(_below(path)))
        if not looked.files:
            raise DataError("; ".join([f"{path} holds no file that can be read; known are {KNOWN}", *looked.words()]))
        return looked
    if not path.exists() and glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for match in matches if not match.is_dir()]
        base = Path(os.path.commonpath([match.parent for match in matches])) if matches else path
        looked = _looked(base, [(match, _what(match, None)) for match in matches])
        if not looked.files:
            raise DataError("; ".join([f"nothing that can be read matches {path}; known are {KNOWN}", *looked.words()]))
        return looked
    if not path.exists():
        raise DataError(f"there is no {path.absolute()}{hint_for(path.absolute())}")
    if not kind_of(path, SUFFIXES):
        raise DataError(f"{path}: cannot read a {path.suffix or 'file without a suffix'}; known are {KNOWN}")
    if what := kind_of_mode(path.stat().st_mode):
        raise DataError(f"{path} is no file: {what}; known are {KNOWN}")
    return Looked([Input(path, named(path.name))], [])


def _looked(base: Path, found: Sequence[tuple[Path, Left | None]]) -> Looked:
    names = [named(path.relative_to(base).as_posix()) for path, _ in found]
    files = [Input(path, name) for (path, left), name in zip(found, names, strict=True) if left is None]
    return Looked(files, [left._replace(source=name) for (_, left), name in zip(found, names, strict=True) if left is not None])


def _below(folder: Path) -> Iterator[tuple[Path, Left | None]]:
    """Everything below a folder that is no folder, and why it is not read. Hidden folders, and links to folders, count as one thing."""
    home = os.path.realpath(folder)
    unread: list[OSError] = []
    for here, folders, names in os.walk(folder, onerror=unread.append):
        for name in folders:
            path = Path(here, name)
            if path.is_symlink():
                yield path, Left("", LINK, "to a folder")
            elif name.startswith("."):
                yield path, Left("", HIDDEN, "a hidden folder")
        folders[:] = [name for name in folders if not name.startswith(".")]  # in place: where os.walk goes next
        for name in names:
            path = Path(here, name)
            yield path, _what(path, home)
    for error in unread:
        yield Path(error.filename), Left("", UNREADABLE, error.strerror or "cannot be read")


def _what(path: Path, home: str | None) -> Left | None:
    """Why a file is not read; None where it is. home: the folder that links may not lead out of."""
    if path.name.startswith(".") and home is not None:
        return Left("", HIDDEN, "hidden")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and not kind_of(path, SUFFIXES):
            return Left("", LINK, f"that leads nowhere ({error.strerror})")
        return Left("", UNREADABLE, error.strerror or "cannot be read")
    if what := kind_of_mode(mode):
        return Left("", NO_FILE, what)
    if home is not None and path.is_symlink() and not os.path.realpath(path).startswith(home + os.sep):
        return Left("", LINK, "out of the folder")
    return None if kind_of(path, SUFFIXES) else Left("", NOT_READ, f"a {path.suffix or 'file without a suffix'} is not read")


def named(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are shown by their numbers."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
