"""What can be told of an archive before a run is made: whether it may be this run's (`check`), and whether it works (`probe`)."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from picotrain.checkpoint.archive import mirror
from picotrain.checkpoint.archive.passes import owner_of, require_ours
from picotrain.checkpoint.archive.remote import CONFIG, OWNER, Remote, open_remote
from picotrain.checkpoint.folder import read_json
from picotrain.config.places import HERE, overlap, redacted, scheme_of
from picotrain.data.remote.errors import Cancelled, Transient
from picotrain.errors import DataError, RunError

CHECK_S = 5.0  # the start of the run asks again, and for longer


def check(url: str, run_dir: Path) -> None:
    """Look whether an archive may be that of the run in `run_dir`, which need not be there yet. Nothing is written, and a store that
    does not answer is no error.

    Raises RunError for what the user has to mend: protocol or package, no such bucket, no access, a folder that cannot be written,
    an archive of another run, or one inside of the run.
    """
    with suppress(Transient, Cancelled), _opened(url, run_dir, CHECK_S) as remote:
        _look(remote, run_dir)


def probe(url: str, run_dir: Path) -> str:
    """Write a small file into an archive, read it back and remove it: in words, what was found. Raises RunError for whatever fails."""
    try:
        with _opened(url, run_dir, mirror.START_S) as remote:
            there = _look(remote, run_dir)
            absent = _absent(remote)
            name, content = f".picotrain-doctor-{uuid.uuid4().hex[:8]}", os.urandom(64)
            remote.put(name, content)
            try:
                if remote.content(name) != content:
                    raise RunError(f"archive {remote.shown}: a small file came back as another one")
            finally:
                remote.delete(name)
                for folder in absent:
                    with suppress(OSError):
                        folder.rmdir()
            return f"{remote.shown} takes a small file, gives it back and removes it; it {there}"
    except Transient as error:
        raise RunError(f"archive {redacted(url)} does not answer: {error}; try again later") from error
    except Cancelled:
        raise RunError(f"archive {redacted(url)} has not answered within {mirror.START_S:g} s; check endpoint and network") from None


@contextmanager
def _opened(url: str, run_dir: Path, limit_s: float) -> Generator[Remote]:
    """The store, which is asked for so long at most. To import what speaks its protocol does not count: on a busy machine that alone
    takes seconds. DataError becomes RunError."""
    if how := overlap(url, run_dir):
        raise RunError(f"archive {redacted(url)} {how}, {run_dir}; a folder elsewhere would be right")
    stop = threading.Event()
    timer = threading.Timer(limit_s, stop.set)
    timer.daemon = True
    try:
        remote = open_remote(url, stop)
        timer.start()
        yield remote
    except DataError as error:
        raise RunError(f"archive {error}") from error
    finally:
        timer.cancel()


def _look(remote: Remote, run_dir: Path) -> str:
    """What the archive holds, in words. Raises RunError when that is not this run, or a local folder cannot be written."""
    if scheme_of(remote.url) in HERE:
        folder = _local(remote)
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise RunError(f"archive {remote.shown}: {there} {'cannot be written' if there.is_dir() else 'is no folder'}")
    here = run_dir / OWNER
    try:
        run_id = read_json(here).get("run_id") if here.is_file() else None
    except OSError as error:
        raise RunError(f"{here} cannot be read: {error.strerror or error}") from error
    owner, names = owner_of(remote), remote.sizes()
    require_ours(remote, owner, run_id)
    return "holds this run" if CONFIG in names else "holds no run yet"


def _local(remote: Remote) -> Path:
    return Path(remote.url.partition("://")[2])


def _absent(remote: Remote) -> list[Path]:
    """The folders that a file in a local archive would make, the innermost first."""
    if scheme_of(remote.url) not in HERE:
        return []
    return [path for path in (_local(remote), *_local(remote).parents) if not path.exists()]
