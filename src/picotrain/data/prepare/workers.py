"""Jobs in processes of their own when there is enough to do, else one after the other right here.

A worker does not see Ctrl-C, which its parent turns into its end, and ends by itself when the parent is gone, however that
ended: nothing is left that could write on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from picotrain.errors import DataError

POLL_S = 0.2

Job = TypeVar("Job")


class WorkerLost(DataError):
    """A worker that was killed: what the others have done stays good."""


_on_tick: Callable[[int], object] | None = None


def tick(amount: int) -> None:
    """Called by a job: so many more bytes of its work are done."""
    if _on_tick is not None:
        _on_tick(amount)


def run(function: Callable[[Job], None], jobs: Sequence[Job], workers: int, progress: Callable[[int], object]) -> None:
    """Call `function` for every job; `progress` is told the sum of all ticks so far. The first error ends everything."""
    if min(workers, len(jobs)) > 1:
        _run_in_processes(function, jobs, min(workers, len(jobs)), progress)
        return
    global _on_tick
    done, before = 0, _on_tick

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done)

    _on_tick = add
    try:
        for job in jobs:
            function(job)
    finally:
        _on_tick = before


def _run_in_processes(function: Callable[[Job], None], jobs: Sequence[Job], workers: int, progress: Callable[[int], object]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that it does not copy
    ticks = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start, (ticks,))
    try:
        # Workers start with the first submits. What a terminal sends is blocked in them for good: they end with us.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            left = {pool.submit(function, job) for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while left:
            done, left = wait(left, POLL_S, FIRST_COMPLETED)
            for future in done:
                future.result()
            progress(ticks.value)
        pool.shutdown()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            why = "a worker process was killed, perhaps for want of memory"
            raise WorkerLost(f"{why}; give the same command again with fewer --workers: it goes on") from error
        raise


def _start(ticks: Any) -> None:
    """What a worker does first."""
    global _on_tick
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def add(amount: int) -> None:
        with ticks.get_lock():
            ticks.value += amount

    _on_tick = add


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
