"""`Archive`: the thread that mirrors the run directory to its archive. The start raises a user's mistake. What fails later is said,
noted and tried again, and the training never waits for it."""

from __future__ import annotations

import os
import queue
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.checkpoint.archive.passes import Mirror
from picotrain.checkpoint.archive.remote import OWNER, open_remote
from picotrain.checkpoint.folder import read_json, write_json
from picotrain.config.places import overlap
from picotrain.data.remote.errors import Cancelled, reason_of
from picotrain.errors import DataError, RunError
from picotrain.text import duration

START_S = 10.0  # how long the start of a run waits to hear whether the archive is its own
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  # between attempts that fail
ABANDON_S = 2.0  # within which a transfer that was given up is gone
POLL_S = 0.1  # how often a wait for the last pass looks whether it is to be shorter
SILENT_S = 1.0  # a wait that takes longer is told
FAILED, WORKS = "archive_failed", "archive_works"  # events of a run


class Note(NamedTuple):
    """What happened to an archive, for the run's events."""

    name: str
    message: str


class Archive:
    """Mirrors `run_dir` to `url`: every `interval_s` seconds, and when woken. One per run, in one process.

    Files younger than `min_age_s` wait for a later pass, since they may be half-written. Two kinds do not wait: checkpoints, which are
    sent whole or not at all, and metrics.jsonl, which is sent up to its last whole line. The archive keeps its newest `keep_last`
    checkpoints (None: all) and the best. It keeps a rolling one only while that is the newest. `files` and `bytes` sent, `last_success`
    (Unix time) and `last_error` tell how it goes.

    Raises RunError when the protocol is unknown or cannot be written, its package is missing, or run and archive lie in one another.
    """

    def __init__(self, url: str, run_dir: Path, *, interval_s: float, min_age_s: float, keep_last: int | None, say: Callable[[str], None]):
        self._stop, self._final, self._wake, self._begun, self._ended = (threading.Event() for _ in range(5))
        self._remote = open_remote(url, self._stop)
        self.shown = self._remote.shown
        if how := overlap(url, run_dir):
            raise RunError(f"archive {self.shown} {how}, {run_dir}; a folder elsewhere would be right")
        self._run_dir, self._say, self._interval_s = run_dir, say, interval_s
        self._options: dict[str, Any] = {"min_age_s": min_age_s, "keep_last": keep_last, "say": say, "stop": self._stop}
        self.last_success: float | None = None
        self.last_error: str | None = None
        self._thread: threading.Thread | None = None
        self._mirror: Mirror | None = None
        self._done = False  # everything is there, as of the end of the run
        self._refused: RunError | None = None
        self._trouble: type[Exception] | None = None
        self._notes: queue.SimpleQueue[Note] = queue.SimpleQueue()

    @property
    def files(self) -> int:
        return self._mirror.files if self._mirror else 0

    @property
    def bytes(self) -> int:
        return self._mirror.bytes if self._mirror else 0

    def start(self) -> None:
        """Begin to mirror. Returns as soon as the archive is known to be ours. After START_S seconds it returns in any case, and tries on.

        Raises RunError when no later attempt would mend what is wrong: the archive is another run's, there is no such bucket, access
        is refused, a folder cannot be written, the run directory neither.
        """
        here = self._run_dir / OWNER
        try:
            run_id = read_json(here).get("run_id") if here.is_file() else None
            me = {
                "run_id": run_id or uuid.uuid4().hex,
                "name": self._run_dir.absolute().name,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": datetime.now(UTC).isoformat(),
            }
            write_json(here, me)
        except OSError as error:
            raise RunError(f"{here} cannot be written: {error.strerror or error}") from error
        self._mirror = Mirror(self._remote, self._run_dir, me, **self._options)
        self._thread = threading.Thread(target=self._work, args=(self._mirror,), name="picotrain-archive", daemon=True)
        self._thread.start()
        if not self._begun.wait(START_S):
            self._begun.set()
            if self._trouble is None:
                self._failed(TimeoutError(f"it has not answered within {START_S:g} s"))
        if self._refused is not None:
            raise self._refused

    def wake(self) -> None:
        """Mirror soon: a checkpoint has become whole."""
        self._wake.set()

    def poll(self) -> list[Note]:
        """What has happened since the last call."""
        found = []
        while not self._notes.empty():
            found.append(self._notes.get())
        return found

    def flush(self, timeout_s: float, hurry: Callable[[], float | None] | None = None) -> bool:
        """Mirror everything, whatever its age. False, and a message, when that was not done in timeout_s seconds.

        `hurry` is asked all the time: as soon as it names seconds, the wait ends after so many more at most.
        """
        if self._thread is None:
            return True
        self._done = False
        self._ended.clear()
        self._final.set()
        self._wake.set()
        began = time.monotonic()
        deadline, told, hurried = began + timeout_s, False, False
        while self._thread.is_alive() and not self._ended.wait(max(0.0, min(POLL_S, deadline - time.monotonic()))):
            now = time.monotonic()
            if now >= deadline:
                break
            if not told and now - began > SILENT_S:
                told = True
                shorter = "; a signal makes it shorter" if hurry else ""
                self._say(f"waiting for archive {self.shown}, at most {duration(deadline - now)}{shorter}")
            if hurry and not hurried and (left_s := hurry()) is not None:
                hurried, deadline = True, min(deadline, now + left_s)
                self._say(f"asked to end: waiting for archive {self.shown} {duration(deadline - now)} more at most")
        if self._done:
            if told:
                self._say(f"archive {self.shown} has everything")
        else:
            self._lacks_the_end(time.monotonic() - began)
        return self._done

    def close(self, timeout_s: float) -> bool:
        """`flush`, then `stop`; nothing after a stop."""
        done = self._done if self._stop.is_set() else self.flush(timeout_s)
        self.stop()
        return done

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        self._stop.set()
        self._final.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(ABANDON_S)

    def _lacks_the_end(self, waited_s: float) -> None:
        if self._refused is not None:
            return  # said
        why = f" ({self.last_error})" if self.last_error else ""
        self._note(FAILED, f"lacks the end of the run: not done within {waited_s:.1f} s{why}")
        self._say(
            f"WARNING: archive {self.shown} lacks the end of the run: not done within {waited_s:.1f} s{why}; {self._run_dir} has "
            "everything, and `picotrain resume` on it mirrors the rest"
        )

    def _work(self, mirror: Mirror) -> None:
        failures = 0
        while not self._stop.is_set():
            self._wake.clear()
            final = self._final.is_set()
            try:
                mirror.begin()
                self._begun.set()
                mirror.everything(final)
            except Cancelled:
                break
            except RunError as error:
                self._refuse(error)
                break
            except Exception as error:  # whatever it is: a mirror that fails must not cost the run
                if isinstance(error, DataError) and not self._begun.is_set():  # what no later attempt mends
                    self._refuse(RunError(f"archive {error}"))
                    break
                failures += 1
                self._failed(error)
            else:
                failures = 0
                self._succeeded()
                if final:
                    self._final.clear()
                    self._done = True
                    self._ended.set()
            if not failures:
                self._wake.wait(self._interval_s)
                continue
            # A wake does not end this pause: checkpoints must not hammer a store in trouble. The end does, once.
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
            if (self._stop if final else self._final).wait(pause_s):
                failures = 0
        self._begun.set()
        self._ended.set()

    def _note(self, name: str, message: str) -> None:
        self._notes.put(Note(name, f"{self.shown}: {message}"))

    def _refuse(self, error: RunError) -> None:
        self._refused, self.last_error = error, str(error)
        if self._begun.is_set():  # else `start` raises it
            self._notes.put(Note(FAILED, str(error)))
            self._say(f"WARNING: {error}")

    def _failed(self, error: Exception) -> None:
        """Said when the trouble begins or becomes another, not at every attempt."""
        self.last_error = reason_of(error, self._remote.url)
        if self._trouble not in (type(error), TimeoutError):  # no answer, and why there was none, are one trouble
            self._note(FAILED, self.last_error)
            self._say(f"WARNING: archive {self.shown}: {self.last_error}; the run goes on, and this is tried again")
        self._trouble = type(error)

    def _succeeded(self) -> None:
        if self._trouble is not None:
            self._say(f"archive {self.shown} works again; it has everything")
        if self._trouble is not None or self.last_success is None:
            self._note(WORKS, "it has everything")
        self.last_success, self.last_error, self._trouble = time.time(), None, None
