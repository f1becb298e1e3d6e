"""Lines that tell how far long work is where no bar can be drawn: about every ten seconds. No dependencies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from picotrain.text import clock

EVERY_S = 10.0

Show = Callable[[str, int, int], None]  # what is done, how much of it, of how much; 0: not known


@contextmanager
def ticking(say: Callable[[str], None], status: Callable[[], str]) -> Generator[None]:
    """Say `status()` every EVERY_S while the body runs, from a thread; nothing where it is ""."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(EVERY_S):
            if line := status():
                say(line)

    thread = threading.Thread(target=tick, name="progress lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def lines(say: Callable[[str], None], amount: Callable[[int], str] = "{:,}".format) -> Generator[Show]:
    """What shows progress as lines: what is being done every EVERY_S, and when what took as long is done. Short work is not told."""
    what, done, total, started = "", 0, 0, 0.0

    def show(name: str, at: int, of: int) -> None:
        nonlocal what, done, total, started
        if name != what:
            started = time.monotonic()
        finished = (name, at, of) != (what, done, total) and at == of > 0
        what, done, total = name, at, of
        if finished and time.monotonic() - started >= EVERY_S:
            say(f"{name}: {amount(of)}/{amount(of)} in {clock(time.monotonic() - started)}")

    def status() -> str:
        if not what or (done == total > 0):
            return ""
        return f"{what}: {amount(done)}/{amount(total)}" if total else f"{what}: {clock(time.monotonic() - started)} so far"

    with ticking(say, status):
        yield show
