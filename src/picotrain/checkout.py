"""Which state of the source code runs: asked of git, where the package runs from a checkout. No dependencies."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 5.0


class State(NamedTuple):
    """commit: 40 hex digits. dirty: whether a tracked file was changed since."""

    commit: str
    dirty: bool

    def __str__(self) -> str:
        return f"commit {self.commit[:12]}{', changed since' if self.dirty else ''}"


def state() -> State | None:
    """Of the checkout that this code runs from; None for an installed package, without git, and where git does not answer in time."""
    here = Path(__file__).resolve()
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:  # a package installed into somebody's checkout is not of it
        return None
    found = _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return State(found.removesuffix("-dirty"), found.endswith("-dirty")) if found else None


def _git(here: Path, *words: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's name another repository
    command = ["git", "-C", str(here.parent), "--no-optional-locks", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=environment, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
