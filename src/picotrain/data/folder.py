"""Which files of a folder are shards, which of these trains and which validates; with a word for all that is left out."""

from __future__ import annotations

import difflib
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from picotrain.errors import DataError

SUFFIX = ".parquet"
OWN = frozenset({"data.json", "origin.json", "inputs.json", "skipped.jsonl"})  # what picotrain writes beside shards
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
RULE = 2  # of `choose`; part of what is remembered of a folder
NAMED = 3  # files that a message names before it counts

Split = Literal["train", "validation", "test"]
# The words by which the Hugging Face Hub, too, knows a split in a file's name.
_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])")


class Found(NamedTuple):
    """The names of the shards in a folder, sorted, and what is to be said of the rest of it."""

    names: list[str]
    words: list[str]


class Chosen(NamedTuple):
    """The shards that train, sorted by name, the one that validates, and what is to be said of the choice."""

    train: list[str]
    val: str
    words: list[str]


def find_shards(root: Path) -> Found:
    """The `*.parquet` files directly in a folder. Hidden ones never count. Links to files are followed. Links that lead nowhere, and what
    is no file, are left out with a word. Raises OSError."""
    names, others, odd = [], [], []
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            what = kind_of_entry(entry)
            if entry.name.startswith(".") or not entry.name.endswith(SUFFIX):
                others.append(entry.name + "/" * (what == "folder"))
            elif what:
                odd.append(f"{entry.name} is left out: {what}")
            elif not is_text(entry.name):
                coding = sys.getfilesystemencoding()
                why = "its name is not UTF-8" if coding == "utf-8" else f"its name is not {coding}, the locale's encoding; set PYTHONUTF8=1"
                odd.append(f"{entry.name!a} is left out: {why}")
            else:
                names.append(entry.name)
    return Found(names, [f"{root}: {line}" for line in [*odd, *words_for_others(others)]])


def has_shards(root: Path) -> bool:
    """Whether there is a shard in a folder."""
    return root.is_dir() and bool(find_shards(root).names)


def words_for_others(names: Iterable[str]) -> list[str]:
    """What to say of names beside the shards; a folder's ends in "/". Picotrain's own files and hidden files that are no shards
    need no word."""
    counts: Counter[str] = Counter()
    for name in names:
        if name.startswith("."):
            counts["hidden"] += SUFFIX in name
        elif name.endswith("/"):
            counts["folder"] += 1
        elif name not in OWN:
            counts[suffix_of(name)] += 1
    told = [f"{count:,} {kind}" for kind, count in sorted(counts.items()) if count]
    return [f"ignored beside the shards: {', '.join(told)}"] if told else []


def choose(names: Sequence[str], where: str, val_shard: str | None) -> Chosen:
    """Which of these shards, sorted by name, train and which one validates. Raises DataError; `where` is the folder or URL for it.

    Where the names tell of a split that is held out, they rule. Shards called train train; where none is called so, those without a
    split's name do. The first shard of the validation split validates, or of the test split where there is none. All other shards are
    left out. Where the names hold no split out, the last shard validates and all others train. `val_shard` names another shard to validate.
    """
    by_split: dict[Split | None, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(name), []).append(name)
    held_out = by_split.get("validation") or by_split.get("test")
    train = by_split.get("train") or by_split.get(None)
    if not (held_out and train):
        val = validating(names, where, val_shard)
        return Chosen([name for name in names if name != val], val, [])
    val = held_out[0] if val_shard is None else validating(names, where, val_shard)
    used = {*train, val}
    left = [name for name in names if name not in used]
    words = f"{where}: by the names of the files {_count(len(used) - 1, 'shard')} train and {val} validates"
    return Chosen([name for name in train if name != val], val, [words + (f"; left out: {_some(left)}" if left else "")])


def split_of(name: str) -> Split | None:
    """The split that a file's name tells, by the last word of it that does."""
    found = _WORD.findall(name.lower().removesuffix(SUFFIX))
    return _WORDS[found[-1]] if found else None


def validating(names: Sequence[str], where: str, val_shard: str | None) -> str:
    """Which of these shards validates: `val_shard`, else the last. Raises DataError; `where` is the folder or URL for it."""
    val = names[-1] if val_shard is None else val_shard
    if val not in names:
        close = difflib.get_close_matches(val, names, n=1, cutoff=0)
        raise DataError(f"data.val_shard: {where} holds no shard {val!r}; the nearest is {close[0] if close else names[-1]!r}")
    if len(names) == 1:
        raise DataError(
            f"{where} holds only one shard, {names[0]}, and a corpus needs one to train on and one to validate on; "
            f"name the file itself (data.path={Path(where) / names[0]}) to have its documents split into both"
        )
    return val


def kind_of_entry(entry: os.DirEntry[str]) -> str:
    """ "" for a regular file, or a link to one; else what it is."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        what = "a link that leads nowhere" if entry.is_symlink() else "it cannot be looked at"
        return f"{what} ({error.strerror})"
    return kind_of_mode(mode)


def kind_of_mode(mode: int) -> str:
    """ "" for a regular file; else what it is."""
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def is_shard_name(name: str) -> bool:
    """Whether a file of this name counts as a shard."""
    return name.endswith(SUFFIX) and not name.startswith(".") and is_text(name)


def is_text(name: str) -> bool:
    """Whether a name is one in UTF-8, as JSON and YAML have to be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def suffix_of(name: str) -> str:
    """A file's kind by its name: ".txt", ".jsonl.gz", "without a suffix"."""
    path = Path(name.lower())
    suffix = path.suffix
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix + suffix
    return ascii(suffix)[1:-1][:20] or "without a suffix"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
