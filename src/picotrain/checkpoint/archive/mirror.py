"""`Archive`: the thread that keeps an archive what the run directory is. What fails is said and tried again; the training
never waits for it."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.checkpoint.archive.remote import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    METRICS,
    OWNER,
    by_step,
    is_mirrored,
    manifest_sizes,
    mirrored_files,
    open_remote,
    steps_in,
)
from picotrain.checkpoint.folder import complete, is_whole, read_json, read_metrics, write_json
from picotrain.checkpoint.retain import is_rolling
from picotrain.config.saved import parse_json
from picotrain.data.remote.errors import Cancelled, Missing, Transient, reason_of
from picotrain.errors import CheckpointError, DataError, RunError

COMPARED_BYTES = 1 << 20  # up to this a file that an earlier process has mirrored is compared by content, else by size
START_S = 10.0  # how long the start of a run waits to hear whether the archive is its own
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  # between attempts that fail
ABANDON_S = 2.0  # within which a transfer that was given up is gone


class _Sent(NamedTuple):
    """A file as it was here when it was sent, and its size there."""

    bytes: int
    mtime_ns: int
    there: int | None


class Archive:
    """Mirrors `run_dir` to `url`: every `interval_s` seconds, and when woken. One per run, in one process.

    Files younger than `min_age_s` wait for a later pass, since they may be half-written; checkpoints (whole or not taken) and
    metrics.jsonl (taken up to its last whole line) do not. Of the archive's checkpoints the newest `keep_last` and the best
    are kept (None: all), and a rolling one only while it is the newest. `files` and `bytes` sent, `last_success` (Unix time) and
    `last_error` tell how it goes.

    Raises RunError when the protocol is unknown or cannot be written, or its package is missing.
    """

    def __init__(self, url: str, run_dir: Path, *, interval_s: float, min_age_s: float, keep_last: int | None, say: Callable[[str], None]):
        self._stop, self._closing, self._wake, self._begun = (threading.Event() for _ in range(4))
        self._remote = open_remote(url, self._stop)
        self._run_dir, self._checkpoints, self._say = run_dir, run_dir / CHECKPOINTS, say
        self._interval_s, self._min_age_s, self._keep_last = interval_s, min_age_s, keep_last
        self.files, self.bytes = 0, 0
        self.last_success: float | None = None
        self.last_error: str | None = None
        self._thread: threading.Thread | None = None
        self._me: dict[str, Any] = {}
        self._claimed, self._done = False, False
        self._refused: RunError | None = None
        self._trouble: type[Exception] | None = None
        self._there: dict[str, int] = {}  # bytes of the archive's files: listed at each pass, kept up to date in it
        self._newest = ""  # of the run's own whole checkpoints
        self._sent: dict[str, _Sent] = {}  # what the archive is known to have of this run's files
        self._manifests: dict[str, bytes] = {}  # of the archive's checkpoints, by file name; read once
        self._pointers: dict[str, str] = {}  # `latest` and `best` as they stand there

    def start(self) -> None:
        """Begin to mirror; returns as soon as the archive is known to be ours, or START_S seconds later (it is tried on).

        Raises RunError when the archive is another run's, or the run directory cannot be written.
        """
        here = self._run_dir / OWNER
        try:
            run_id = read_json(here).get("run_id") if here.is_file() else None
            self._me = {
                "run_id": run_id or uuid.uuid4().hex,
                "name": self._run_dir.absolute().name,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": datetime.now(UTC).isoformat(),
            }
            write_json(here, self._me)
        except OSError as error:
            raise RunError(f"{here} cannot be written: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._work, name="picotrain-archive", daemon=True)
        self._thread.start()
        self._begun.wait(START_S)
        self._begun.set()
        if self._refused is not None:
            raise self._refused

    def wake(self) -> None:
        """Mirror soon: a checkpoint has become whole."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Mirror everything, whatever its age, then stop. False, and a message, when that was not done in timeout_s seconds."""
        if self._thread is None:
            return True
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if not self._stop.is_set():
            self._stop.set()  # ends whatever the thread is waiting for
            self._thread.join(ABANDON_S)
            if not self._done and self._refused is None:
                why = f" ({self.last_error})" if self.last_error else ""
                self._say(
                    f"WARNING: archive {self._remote.shown} lacks the end of the run: not done within {timeout_s:g} s{why}; "
                    f"{self._run_dir} has everything, and `picotrain resume` on it mirrors the rest"
                )
        return self._done

    def _work(self) -> None:
        failures = 0
        while not self._stop.is_set():
            final = self._closing.is_set()
            self._wake.clear()
            try:
                self._pass(final)
            except Cancelled:
                break
            except RunError as error:
                self._refuse(error)
                break
            except Exception as error:  # whatever it is: a mirror that fails must not cost the run
                failures += 1
                self._failed(error)
            else:
                failures = 0
                self._succeeded()
                if final:
                    self._done = True
                    break
            self._begun.set()
            if not failures:
                self._wake.wait(self._interval_s)
                continue
            # A wake does not end this pause: checkpoints must not hammer a store in trouble. Closing does, once.
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
            if (self._stop if final else self._closing).wait(pause_s):
                failures = 0
        self._begun.set()

    def _refuse(self, error: RunError) -> None:
        self._refused, self.last_error = error, str(error)
        if self._begun.is_set():  # else `start` raises it
            self._say(f"WARNING: {error}")

    def _failed(self, error: Exception) -> None:
        """Said when the trouble begins or becomes another, not at every attempt."""
        self.last_error = reason_of(error, self._remote.url)
        if self._trouble is not type(error):
            self._say(f"WARNING: archive {self._remote.shown}: {self.last_error}; the run goes on, and this is tried again")
        self._trouble = type(error)

    def _succeeded(self) -> None:
        if self._trouble is not None:
            self._say(f"archive {self._remote.shown} works again; it has everything")
        self.last_success, self.last_error, self._trouble = time.time(), None, None

    def _pass(self, final: bool) -> None:
        """Make the archive what the run directory is. Raises RunError when it is not ours, else what a store raises."""
        self._own()
        self._begun.set()
        self._there = self._remote.sizes()
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

    def _say_if_ahead(self, foreign: set[str]) -> None:
        """A run that began anew, or without its newest checkpoints, is not what a restore would give: said once."""
        newest = by_step(foreign | {self._newest} - {""})[-1:]
        if self.last_success is None and self._trouble is None and newest and newest[0] != self._newest:
            self._say(
                f"WARNING: archive {self._remote.shown} has {newest[0]}, which is newer than what {self._run_dir} has; a restore "
                "would go on from there"
            )

    def _own(self) -> None:
        """See to it that archive.json names this process: of the processes of one run, the one that started last has it."""
        try:
            owner = parse_json(self._remote.content(OWNER))
            owner = owner if isinstance(owner, dict) else {}
        except Missing:
            owner = None
        except ValueError:
            owner = {}
        shown = self._remote.shown
        if owner == self._me:
            self._claimed = True
            return
        if owner is not None:
            who = f"pid {owner.get('pid')} on {owner.get('host')} since {owner.get('time')}"
            if owner.get("run_id") != self._me["run_id"]:
                raise RunError(
                    f"archive {shown} is that of another run ({owner.get('name')}: {who}); another archive.url would be right, "
                    f"or `picotrain resume {shown}` to go on with that run"
                )
            if self._claimed:
                raise RunError(
                    f"archive {shown}: the run was started elsewhere too, by {who}, which mirrors it now; this one no longer does"
                )
        elif not self._claimed and (there := sorted(name for name in self._remote.sizes() if is_mirrored(name))):
            what = "a run" if CONFIG in there else f"{there[0]!r}"
            raise RunError(f"archive {shown} holds {what} without {OWNER}, so it may be anybody's; another archive.url would be right")
        self._remote.put(OWNER, (json.dumps(self._me, indent=1) + "\n").encode())
        self._claimed = True

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
        """Send a checkpoint's file unless this process has: its size does not tell whose a half checkpoint is."""
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
        """The better one of what the run and what the archive call best ("": none): a restored run does not know them all."""
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
