"""`Mirror`: one pass that makes an archive what the run directory is, and whose archive it is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.checkpoint.archive.remote import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    METRICS,
    OWNER,
    Remote,
    by_step,
    is_mirrored,
    manifest_sizes,
    mirrored_files,
    steps_in,
)
from picotrain.checkpoint.folder import complete, is_whole, read_metrics
from picotrain.checkpoint.retain import is_rolling
from picotrain.data.remote.errors import Cancelled, Missing, Transient
from picotrain.disk import parse_json
from picotrain.errors import CheckpointError, DataError, RunError

COMPARED_BYTES = 1 << 20  # up to this a file that an earlier process has mirrored is compared by content, else by size


class _Sent(NamedTuple):
    """A file as it was here when it was sent, and its size there."""

    bytes: int
    mtime_ns: int
    there: int | None


def owner_of(remote: Remote) -> dict[str, Any] | None:
    """What an archive's archive.json says; None where there is none. Raises what a store raises."""
    try:
        owner = parse_json(remote.content(OWNER))
    except Missing:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def require_ours(remote: Remote, owner: dict[str, Any] | None, run_id: str | None) -> None:
    """Raise RunError where an archive is that of another run than `run_id` (None: of a new one)."""
    shown = remote.shown
    if owner is None:
        if there := sorted(name for name in remote.sizes() if is_mirrored(name)):
            what = "a run" if CONFIG in there else f"{there[0]!r}"
            raise RunError(f"archive {shown} holds {what} without {OWNER}, so it may be anybody's; another archive.url would be right")
    elif run_id is None or owner.get("run_id") != run_id:
        raise RunError(
            f"archive {shown} is that of another run ({owner.get('name')}: {_who(owner)}); another archive.url would be right, "
            f"or `picotrain resume {shown}` to go on with that run"
        )


def _who(owner: dict[str, Any]) -> str:
    return f"pid {owner.get('pid')} on {owner.get('host')} since {owner.get('time')}"


class Mirror:
    """What is known of an archive between passes. me: what its archive.json is to say."""

    def __init__(
        self,
        remote: Remote,
        run_dir: Path,
        me: dict[str, Any],
        *,
        min_age_s: float,
        keep_last: int | None,
        say: Callable[[str], None],
        stop: threading.Event,
    ):
        self._remote, self._me, self._say, self._stop = remote, me, say, stop
        self._run_dir, self._checkpoints = run_dir, run_dir / CHECKPOINTS
        self._min_age_s, self._keep_last = min_age_s, keep_last
        self.files, self.bytes = 0, 0
        self._claimed = self._compared = False
        self._there: dict[str, int] = {}  # bytes of the archive's files: listed at each pass, kept up to date in it
        self._newest = ""  # of the run's own whole checkpoints
        self._sent: dict[str, _Sent] = {}  # what the archive is known to have of this run's files
        self._manifests: dict[str, bytes] = {}  # of the archive's checkpoints, by file name; read once
        self._pointers: dict[str, str] = {}  # `latest` and `best` as they stand there

    def begin(self) -> None:
        """See whose archive it is, claim it, and list it. A user's mistake shows here. Raises RunError when it is not ours, else what a
        store raises."""
        self._own()
        self._there = self._remote.sizes()

    def everything(self, final: bool) -> None:
        """Make the archive what the run directory is, after `begin`. final: whatever the age of a file."""
        # Looked up before metrics.jsonl is read, which then has all the lines that these count on.
        local = {path.name: path for path in complete(self._checkpoints) if _is_plain(path)}
        self._newest = by_step(local)[-1] if local else ""
        for name, path in mirrored_files(self._run_dir):
            self._mirror(name, path, 0.0 if final or name == METRICS else self._min_age_s)
        there = self._whole_there()
        self._say_if_ahead(there - local.keys())
        for step in reversed(by_step(self._kept({*local, *there}) & local.keys())):
            self._mirror_checkpoint(local[step])
        self._point_and_retain()

    def _own(self) -> None:
        """Let archive.json name this process. Of the processes of one run, the one that started last has the archive."""
        owner = owner_of(self._remote)
        if owner == self._me:
            self._claimed = True
            return
        if owner is not None or not self._claimed:
            require_ours(self._remote, owner, self._me["run_id"])
        if owner is not None and self._claimed:
            raise RunError(
                f"archive {self._remote.shown}: the run was started elsewhere too, by {_who(owner)}, which mirrors it now; this one no "
                "longer does"
            )
        self._remote.put(OWNER, (json.dumps(self._me, indent=1) + "\n").encode())
        self._claimed = True

    def _say_if_ahead(self, foreign: set[str]) -> None:
        """Say once that a restore would not give this run: it began anew, or without its newest checkpoints."""
        newest = by_step(foreign | {self._newest} - {""})[-1:]
        said, self._compared = self._compared, True
        if not said and newest and newest[0] != self._newest:
            self._say(
                f"WARNING: archive {self._remote.shown} has {newest[0]}, which is newer than what {self._run_dir} has; a restore "
                "would go on from there"
            )

    def _mirror(self, name: str, path: Path, min_age_s: float = 0.0) -> None:
        """Send one file unless the archive has it."""
        try:
            stat = path.stat()
            sent, there = self._sent.get(name), self._there.get(name)
            if sent == _Sent(stat.st_size, stat.st_mtime_ns, there) or 0 <= time.time() - stat.st_mtime < min_age_s:
                return
            source: Path | bytes = path
            if name == METRICS:  # it is growing
                data = path.read_bytes()
                source = data[: data.rfind(b"\n") + 1]
            count = len(source) if isinstance(source, bytes) else stat.st_size
            seen_before = sent is None and there == count and name != METRICS
            if not seen_before or (count <= COMPARED_BYTES and self._remote.content(name) != path.read_bytes()):
                self._send(name, source, count)
        except (OSError, DataError):
            if path.exists():
                raise
            return  # removed meanwhile
        self._sent[name] = _Sent(stat.st_size, stat.st_mtime_ns, count)

    def _send(self, name: str, source: Path | bytes, count: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        self._remote.put(name, source)
        self._there[name] = count
        self.files, self.bytes = self.files + 1, self.bytes + count

    def _mirror_checkpoint(self, path: Path) -> None:
        """Send a whole checkpoint unless the archive has it, the manifest last. One that is deleted or replaced meanwhile is
        no error: what has arrived of it is removed again."""
        step, folder = path.name, f"{CHECKPOINTS}/{path.name}"
        try:
            manifest = (path / MANIFEST).read_bytes()
            names = manifest_sizes(step, manifest)
        except (OSError, CheckpointError):
            return
        if not (self._is_whole_there(step) and self._manifest_there(step) == manifest):
            self._delete(f"{folder}/{MANIFEST}")  # of a damaged one, or of another one of this step
            try:
                for name in names:
                    self._send_new(f"{folder}/{name}", path / name)
            except (OSError, DataError, Transient):
                if _is_still(path, manifest):
                    raise
            if not _is_still(path, manifest):
                return self._remove(step)
            self._send(f"{folder}/{MANIFEST}", manifest, len(manifest))
            self._manifests[f"{folder}/{MANIFEST}"] = manifest
        self._mirror(f"{folder}/metrics.json", path / "metrics.json")

    def _send_new(self, name: str, path: Path) -> None:
        """Send a checkpoint's file unless this process has sent it. The size of a half checkpoint does not tell whose it is."""
        stat = path.stat()
        sent = _Sent(stat.st_size, stat.st_mtime_ns, stat.st_size)
        if self._sent.get(name) != sent or self._there.get(name) != sent.there:
            self._send(name, path, stat.st_size)
            self._sent[name] = sent

    def _whole_there(self) -> set[str]:
        return {step for step in steps_in(self._there) if self._is_whole_there(step)}

    def _is_whole_there(self, step: str) -> bool:
        try:
            sizes = manifest_sizes(step, self._manifest_there(step))
        except (CheckpointError, Missing):
            return False
        return all(self._there.get(f"{CHECKPOINTS}/{step}/{name}") == count for name, count in sizes.items())

    def _manifest_there(self, step: str) -> bytes:
        name = f"{CHECKPOINTS}/{step}/{MANIFEST}"
        count = self._there.get(name)
        if count is None or count > MAX_MANIFEST_BYTES:
            raise Missing(f"{step} has no {MANIFEST}")
        if len(self._manifests.get(name, b"")) != count:
            self._manifests[name] = self._remote.content(name)
        return self._manifests[name]

    def _kept(self, whole: set[str]) -> set[str]:
        """Of these checkpoints the ones that the archive keeps; always the newest, and the run's own newest."""
        lasting = [step for step in by_step(whole) if not self._is_rolling(step)]
        if self._keep_last is not None:
            lasting = lasting[-max(1, self._keep_last) :]
        return {*lasting, *by_step(whole)[-1:], self._newest, self._best(whole)} & whole

    def _is_rolling(self, step: str) -> bool:
        """Whether a checkpoint, here or there, is only kept until the next one."""
        with suppress(CheckpointError, Missing, ValueError, AttributeError):
            here = self._checkpoints / step
            return is_rolling(here) if is_whole(here) else parse_json(self._manifest_there(step)).get("rolling") is True
        return False

    def _best(self, whole: set[str]) -> str:
        """The better one of the run's best and the archive's best ("": none). A restored run does not know all checkpoints."""
        here = self._checkpoints / "best"
        ours = here.read_text().strip() if here.is_file() else ""
        return min({ours, self._pointer_there("best")} & whole, key=lambda step: (self._val_bpb(step), step), default="")

    def _pointer_there(self, pointer: str) -> str:
        name = f"{CHECKPOINTS}/{pointer}"
        if name not in self._there:
            return ""
        if pointer not in self._pointers:
            self._pointers[pointer] = self._remote.content(name).decode(errors="replace").strip()
        return self._pointers[pointer]

    def _val_bpb(self, step: str) -> float:
        name = f"{CHECKPOINTS}/{step}/metrics.json"
        try:
            here = read_metrics(self._checkpoints / step)
            return float((here or parse_json(self._remote.content(name)))["val_bpb"])
        except (CheckpointError, Missing, ValueError, KeyError, TypeError):
            return float("inf")

    def _point_and_retain(self) -> None:
        """Point at what is there now; then remove what is not kept, and what is left of a transfer that was cut off."""
        whole = self._whole_there()
        if not whole:
            return
        for pointer, step in (("latest", by_step(whole)[-1]), ("best", self._best(whole))):
            if step and self._pointer_there(pointer) != step:
                self._send(f"{CHECKPOINTS}/{pointer}", f"{step}\n".encode(), len(step) + 1)
                self._pointers[pointer] = step
        for step in steps_in(self._there) - self._kept(whole):
            if self._keep_last is not None or step in whole or f"{CHECKPOINTS}/{step}/{MANIFEST}" not in self._there:
                self._remove(step)

    def _remove(self, step: str) -> None:
        """Delete a checkpoint from the archive; a crash at any moment leaves nothing that looks whole."""
        folder = f"{CHECKPOINTS}/{step}"
        self._delete(f"{folder}/{MANIFEST}")
        for name in [name for name in self._there if name.startswith(f"{folder}/")]:
            self._delete(name)
        self._remote.delete_folder(folder)

    def _delete(self, name: str) -> None:
        if name in self._there:
            self._manifests.pop(name, None)
            self._sent.pop(name, None)
            self._remote.delete(name)
            del self._there[name]


def _is_plain(path: Path) -> bool:
    """Whether neither a checkpoint nor a file of it is a link, which could lead out of the run directory."""
    try:
        return not any(part.is_symlink() for part in (path, *path.iterdir()))
    except OSError:
        return False  # removed meanwhile


def _is_still(path: Path, manifest: bytes) -> bool:
    """Whether the checkpoint is there, whole, and the one of this manifest."""
    try:
        return (path / MANIFEST).read_bytes() == manifest and is_whole(path)
    except OSError:
        return False
