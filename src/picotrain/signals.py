"""Signals that ask a process to stop: where there is something to save, and where there is nothing yet. Without torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from picotrain import ranks
from picotrain.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PRESSING = (signal.SIGTERM, signal.SIGINT)  # whoever sends one of these after another signal means it
PATIENCE_S = 1.0  # what the main thread gets to leave what it does when it was asked to end

# A signal to a whole process group reaches a worker twice: directly, and forwarded by its launcher (or by `timeout`).
# What follows the first within this time is the same request.
REPEAT_S = 0.3

_patient = threading.Lock()  # held while somebody is `ending`: one at a time, the outermost


def exit_at_once(signum: int) -> None:
    """End this process without saving, with the exit code a shell gives to death by this signal."""
    os._exit(128 + signum)


class StopSignal:
    """Turns a stop signal into a flag while it is entered. A second one that is a SIGTERM or SIGINT ends at once.

    SIGHUP is a stop signal unless this process has inherited it as ignored: by `nohup` it was to outlast its terminal. A terminal that
    closes sends it more than once, and what cleans up behind it a SIGTERM; so it never makes another one the second.
    Python lets only the main thread install handlers; in any other one nothing is installed and nothing requested.
    `on_first` and `on_second` run inside the handler, with the signal's number.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None, on_second: Callable[[int], None] = exit_at_once):
        self.signum: int | None = None  # the first one
        self.requested_s: float | None = None  # when, by time.monotonic
        self.sent = threading.Event()  # set a moment earlier than `requested`, also while the main thread is in native code
        self._counts_s: float | None = None  # when the first came that makes a later one the second
        self._on_first, self._on_second = on_first, on_second
        self._interrupts = False
        self._insist: Callable[[], None] | None = None
        self._stack = ExitStack()

    @property
    def requested(self) -> bool:
        """Whether the main thread has met a stop signal."""
        return self.requested_s is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                before = signal.getsignal(signum)
                if signum == signal.SIGHUP and before == signal.SIG_IGN:
                    continue
                signal.signal(signum, self._handle)
                self._stack.callback(signal.signal, signum, signal.SIG_DFL if before is None else before)
            self._stack.enter_context(noticed(self._notice))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _notice(self, signum: int) -> None:
        if signum in STOP_SIGNALS:
            self.sent.set()
            if self._insist is not None:
                self._insist()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum in PRESSING and self._counts_s is not None and now - self._counts_s > REPEAT_S:
            self._on_second(signum)
        if signum != signal.SIGHUP and self._counts_s is None:
            self._counts_s = now
        if self.requested:
            return
        self.signum, self.requested_s = signum, now
        self.sent.set()
        if self._on_first is not None:
            self._on_first(signum)
        if self._interrupts:
            raise KeyboardInterrupt

    @contextmanager
    def ending(self, what: str, cleanup: Callable[[], None] = lambda: None) -> Generator[None]:
        """Around what may take long and has nothing to save: a stop signal ends it, with Stopped, whose message says `what` was stopped.

        The main thread gets a KeyboardInterrupt. Where it does not leave within PATIENCE_S, since it is in native code or waits for
        threads, `cleanup` is called and the process ends here; rank 0 says so. Inside another `ending` that one is in charge.
        """
        if threading.current_thread() is not threading.main_thread() or not _patient.acquire(blocking=False):
            yield
            return
        message = f"stopped while {what}; the same command goes on from here"
        left = threading.Event()

        def insist() -> None:
            if left.wait(PATIENCE_S):
                return
            with suppress(Exception):
                cleanup()
            if ranks.here().rank == 0:
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"picotrain: {message}\n".encode())
            os._exit(Stopped.exit_code)

        try:
            self._insist, self._interrupts = insist, True
            if self.requested:  # since it was entered
                raise KeyboardInterrupt
            yield
        except BaseException as error:  # native code, an import in it, may turn a KeyboardInterrupt into what it likes
            if not (isinstance(error, KeyboardInterrupt) or self.requested):
                raise
            raise Stopped(message) from None
        finally:
            self._insist, self._interrupts = None, False
            left.set()
            _patient.release()


@contextmanager
def ending(what: str, cleanup: Callable[[], None] = lambda: None) -> Generator[None]:
    """`StopSignal.ending` where nobody listens to signals yet."""
    if _patient.locked():  # within another one
        yield
        return
    with StopSignal() as stop, stop.ending(what, cleanup):
        yield
    if stop.signum is not None:  # it had left the one and not yet the other: whoever listens now is to hear of it
        signal.raise_signal(stop.signum)


@contextmanager
def noticed(on_signal: Callable[[int], None]) -> Generator[None]:
    """Call `on_signal` in a thread, with its number, for every signal that has a Python handler.

    Python runs the handlers themselves in the main thread, and only between two of its instructions: while it waits in native code
    (for another rank, in a download or a tokenizer's training) they wait, too. Only the main thread can enter; elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                on_signal(number)
        os.close(reader)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread
