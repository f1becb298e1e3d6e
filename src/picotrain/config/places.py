"""The places that a config or a command line names: paths here, and URLs of protocols that are known here. What looks like a URL is
never taken for a path: a run that was to be kept elsewhere would end in a folder named `s3:`.

`is_url` says which of the two a text is, `flaw` what is wrong with it, `overlap` whether an archive and its run lie in one another.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from picotrain.config.keys import nearest
from picotrain.errors import Problem

Use = Literal["local", "read", "write"]  # what a place is named for; local: a path alone will do

# Protocol -> the package that speaks it, and how to get that. Of others fsspec says it.
PACKAGES = {
    "s3": ("s3fs", "pip install 'picotrain[s3]'"),
    "https": ("aiohttp", "pip install 'picotrain[http]'"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
    "sftp": ("paramiko", "pip install paramiko"),
    "az": ("adlfs", "pip install adlfs"),
}
ALIASES = {"s3a": "s3", "http": "https", "gcs": "gs", "ssh": "sftp", "abfs": "az"}
HERE = ("file", "local")
WITH_HOST = {*PACKAGES, *ALIASES, "ftp"}  # a URL of these names a host or a bucket first
COMMON = (*PACKAGES, *ALIASES, "file", "ftp")
ELSEWHERE = {"aws": "s3", "r2": "s3", "minio": "s3", "gcp": "gs", "azure": "az", "scp": "sftp", "rsync": "sftp", "huggingface": "hf"}
# They read inside of another file, or stand before another protocol: no place of their own.
WRAPPERS = {
    "zip", "tar", "libarchive", "dir", "reference", "generic", "blockcache", "filecache", "simplecache", "cached", "async_wrapper",
    "asyncwrapper", "data",
}  # fmt: skip
READ_ONLY = {"http", "https", "github", "gist", "git"}
_URL = re.compile(r"([^/]+)://")
_ONE_SLASH = re.compile(r"([A-Za-z][\w.+-]*):(/?)(?!/)")
_NO_COLON = re.compile(rf"({'|'.join(COMMON)})//", re.IGNORECASE)
_SCP = re.compile(r"([\w.-]+@[\w.-]+):")


def is_url(text: str) -> bool:
    """Whether this is written as a URL, of whatever protocol (`file://` is one), and no local path."""
    return _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """What stands before "://": https, s3, ...; of a path, the path."""
    return url.partition("://")[0]


def redacted(url: str) -> str:
    """The URL without user, password and the values of its query."""
    url = re.sub(r"(?<=://)[^/?#@\s]*@", "***@", url)
    return re.sub(r"([?&][^=&#\s]*=)[^&#\s'\"]*", r"\1***", url)


def flaw(text: str, use: Use) -> tuple[str, str] | None:
    """What is wrong with a place, and what would be right; None: nothing that can be told without going there."""
    found = _URL.match(text)
    if not found:
        return _half_a_url(text, use)
    scheme, rest, shown = found[1], text[found.end() :], redacted(text)
    lower = scheme.lower()
    if "::" in scheme:
        return f"chains protocols, {shown}, which cannot be used here", f"{redacted(text.rpartition('::')[2])} alone"
    if lower not in _protocols():
        return f"{shown} is of a protocol that is not known, {scheme}://", _known(lower, rest)
    if use == "local":
        right = f"the path {rest}" if lower in HERE and rest.startswith("/") else "a path on this machine"
        return f"must be a path, and {shown} is a URL", right
    if scheme != lower:
        return f"{shown}: protocols are written in small letters", redacted(f"{lower}://{rest}")
    if lower in WRAPPERS:
        return f"{shown}: {scheme}:// is no place of its own", "the URL of the folder itself, or a path"
    if lower in HERE and not rest.startswith("/"):
        return f"{shown} names no folder from the root on, as a URL has to", _absolute(rest)
    if lower in WITH_HOST and rest[:1] in ("", "/", "?"):
        thing = "host" if lower in ("http", "https", "sftp", "ssh", "ftp") else "bucket"
        return f"{shown} names no {thing}", f"{lower}://{thing.upper()}{rest or '/...'}"
    if use == "write" and lower in READ_ONLY:
        return f"{shown}: what is behind {scheme}:// cannot be written", "s3://, gs://, hf://datasets/..., sftp:// or a folder"
    return None


def _half_a_url(text: str, use: Use) -> tuple[str, str] | None:
    """What is wrong with `s3:/bucket`, `s3:bucket`, `s3//bucket` and `me@host:folder`, unless there is something of that name."""
    if os.path.lexists(os.path.expanduser(text)):
        return None
    if scp := _SCP.match(text):
        right = f"sftp://{scp[1]}/{text[scp.end() :].lstrip('/')}"
        return _neither(text, right, use)
    found = _ONE_SLASH.match(text) or _NO_COLON.match(text)
    if not found:
        return None
    scheme, rest = found[1], text[found.end() :]
    lower = scheme.lower()
    if lower in COMMON:
        right = _absolute(f"/{rest}" if found.re is _ONE_SLASH and found[2] else rest) if lower in HERE else f"{lower}://{rest}"
    elif found[2]:  # a word, a colon and a slash
        meant = _meant(lower)
        right = f"{meant}://{rest}" if meant else f"sftp://{scheme}/{rest} on another machine"
    else:
        return None
    return _neither(re.sub(r"[^/@\s]*@", "***@", text), redacted(right), use)


def _neither(shown: str, right: str, use: Use) -> tuple[str, str]:
    """The words for what is half a URL."""
    other = f"./{shown} for a path of that name"
    return f"{shown} is neither a URL nor there", other if use == "local" else f"{right}; {other}"


def _absolute(rest: str) -> str:
    """The URL of a local path that was written without its root."""
    rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return f"file://{Path(rest).expanduser().absolute()}, or a path without a protocol"


def _known(scheme: str, rest: str) -> str:
    """The nearest protocol, and what is installed of the common ones."""
    meant = _meant(scheme)
    there = [name for name, (package, _) in PACKAGES.items() if _installed(package)]
    absent = [f"{name}:// by `{install}`" for name, (package, install) in PACKAGES.items() if not _installed(package)]
    listed = f"installed are {', '.join(f'{name}://' for name in (*there, 'file'))}" + (f"; {', '.join(absent)}" if absent else "")
    return (f"did you mean {meant}://{redacted('://' + rest)[3:]}? " if meant else "") + listed


def _meant(scheme: str) -> str | None:
    """The known protocol that is most like this one."""
    return ELSEWHERE.get(scheme) or next(iter(nearest(scheme, [*COMMON, *_protocols()], 1)), None)


def missing_package(url: str) -> tuple[str, str] | None:
    """What is wrong with a place whose protocol needs a package that is not installed, and how to get it."""
    package, install = PACKAGES.get(ALIASES.get(scheme_of(url), scheme_of(url)), ("", ""))
    if not is_url(url) or not package or _installed(package):
        return None
    return f"{redacted(url)}: {scheme_of(url)}:// needs the package {package}, which is not installed", install


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _protocols() -> list[str]:
    from fsspec import available_protocols

    return available_protocols()


# In a config ----------------------------------------------------------------------------------------------


def named(tree: dict[str, Any]) -> Iterator[tuple[str, str, Use]]:
    """Every place in the tree of a config: key, text, and what it is for."""
    uses: dict[str, Use] = {
        "run.dir": "local", "run.cache_dir": "local", "data.path": "read", "tokenizer.path": "local", "archive.url": "write",
        "evaluation.core.bundle": "read",
    }  # fmt: skip
    for key, use in uses.items():
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield key, value, use
    data = tree.get("data")
    entries = data.get("mixture") if isinstance(data, dict) else None
    for number, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        if isinstance(entry, dict) and isinstance(entry.get("source"), str):
            yield f"data.mixture[{number}].source", entry["source"], "read"


def problems(tree: dict[str, Any]) -> list[Problem]:
    """What is wrong with the places in the tree of a config."""
    return [Problem(key, *found) for key, text, use in named(tree) if (found := flaw(text, use))]


def missing_packages(tree: dict[str, Any]) -> list[Problem]:
    """One problem for each place whose protocol needs a package that is not installed; for commands that go there."""
    return [Problem(key, *found) for key, text, _ in named(tree) if (found := missing_package(text))]


def overlap(url: str, run_dir: Path) -> str:
    """How a local archive and the run's own folder lie in one another, in words, "" where they do not. Links, mounts and a disk that
    takes large letters for small ones are seen through."""
    if is_url(url) and scheme_of(url) not in HERE:
        return ""
    there, here = (Path(os.path.realpath(os.path.expanduser(path))) for path in (url.partition("://")[2] or url, run_dir))
    if _same(there, here):
        return "is the run's own folder"
    if any(_same(parent, here) for parent in there.parents):
        return "is inside of the run's folder"
    return "has the run's folder inside of it" if any(_same(parent, there) for parent in here.parents) else ""


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False
