"""Signals that ask a process to stop, where nothing is running yet that could be saved. Without torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from picotrain.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE_S = 1.0  # what the main thread gets to leave what it does when it was asked to end


@contextmanager
def noticed(on_signal: Callable[[int], None]) -> Iterator[None]:
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


@contextmanager
def ending(what: str, cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around what may take long and has nothing to save: a stop signal ends it, with Stopped, whose message says `what` was stopped.

    The main thread gets a KeyboardInterrupt. Where it does not leave within PATIENCE_S, since it is in native code or waits for threads,
    `cleanup` is called and the process ends here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    message = f"stopped while {what}; the same command goes on from here"
    left, interrupted = threading.Event(), threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def insist(signum: int) -> None:
        if signum in STOP_SIGNALS and not left.wait(PATIENCE_S):
            with suppress(Exception):
                cleanup()
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"picotrain: {message}\n".encode())
            os._exit(Stopped.exit_code)

    previous: dict[int, Any] = {signum: signal.signal(signum, interrupt) for signum in STOP_SIGNALS}
    try:
        with noticed(insist):
            yield
    except BaseException:  # native code, an import in it, may turn a KeyboardInterrupt into what it likes
        if not interrupted.is_set():
            raise
    finally:
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # a second one must not break into the cleaning up
        left.set()
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    if interrupted.is_set():
        raise Stopped(message)
