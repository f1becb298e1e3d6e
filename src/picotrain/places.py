"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path

from picotrain.errors import PicotrainError


class NoHome(PicotrainError):
    """A path begins at a home folder that nobody knows."""


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` put out. Raises NoHome where that user has no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0][1:]
        if name:
            raise NoHome(f"{path}: there is no user {name!r} here; ./{path} would be a folder of that name") from None
        raise NoHome(
            f"{path}: there is no home folder, as HOME is not set and no user has the number {os.getuid()}; set HOME, or name a folder "
            "without ~ (run.cache_dir or PICOTRAIN_CACHE for the cache)"
        ) from None
