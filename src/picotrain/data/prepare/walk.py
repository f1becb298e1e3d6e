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

Thing = tuple[Path, str, str]  # a path, of what kind it is that is not read ("": it is read), and why


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
        return _looked(path, sorted(_below(path)), f"{path} holds no file that can be read")
    if not path.exists() and glob.has_magic(str(path)):
        matches = [match for match in map(Path, sorted(glob.glob(str(path), recursive=True))) if not match.is_dir()]
        base = Path(os.path.commonpath([match.parent for match in matches])) if matches else path
        return _looked(base, [(match, *_what(match, None)) for match in matches], f"nothing that can be read matches {path}")
    if not path.exists():
        raise DataError(f"there is no {path.absolute()}{hint_for(path.absolute())}")
    if not kind_of(path, SUFFIXES):
        raise DataError(f"{path}: cannot read a {path.suffix or 'file without a suffix'}; known are {KNOWN}")
    if what := kind_of_mode(path.stat().st_mode):
        raise DataError(f"{path} is no file: {what}; known are {KNOWN}")
    return Looked([Input(path, named(path.name))], [])


def _looked(base: Path, things: Sequence[Thing], nothing: str) -> Looked:
    """Raises DataError, saying `nothing`, where no file is to be read."""
    looked = Looked([], [])
    for path, kind, reason in things:
        name = named(path.relative_to(base).as_posix())
        if kind:
            looked.left.append(Left(name, kind, reason))
        else:
            looked.files.append(Input(path, name))
    if not looked.files:
        raise DataError("; ".join([f"{nothing}; known are {KNOWN}", *looked.words()]))
    return looked


def _below(folder: Path) -> Iterator[Thing]:
    """Everything below a folder that is no folder. Hidden folders, and links to folders, count as one thing."""
    home = os.path.realpath(folder)
    unread: list[OSError] = []
    for here, folders, names in os.walk(folder, onerror=unread.append):
        for name in folders:
            if (path := Path(here, name)).is_symlink():
                yield path, LINK, "to a folder"
            elif name.startswith("."):
                yield path, HIDDEN, "a hidden folder"
        folders[:] = [name for name in folders if not name.startswith(".")]  # in place: where os.walk goes next
        yield from ((path, *_what(path, home)) for path in (Path(here, name) for name in names))
    yield from ((Path(error.filename), UNREADABLE, error.strerror or "cannot be read") for error in unread)


def _what(path: Path, home: str | None) -> tuple[str, str]:
    """Of what kind it is that a file is not read, and why; "" where it is. home: the folder that links may not lead out of."""
    if path.name.startswith(".") and home is not None:
        return HIDDEN, "hidden"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and not kind_of(path, SUFFIXES):
            return LINK, f"that leads nowhere ({error.strerror})"
        return UNREADABLE, error.strerror or "cannot be read"
    if what := kind_of_mode(mode):
        return NO_FILE, what
    if home is not None and path.is_symlink() and not os.path.realpath(path).startswith(home + os.sep):
        return LINK, "out of the folder"
    return ("", "") if kind_of(path, SUFFIXES) else (NOT_READ, f"a {path.suffix or 'file without a suffix'} is not read")


def named(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are shown by their numbers."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
