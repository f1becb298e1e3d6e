"""One rank of a run: `python -m picotrain.worker RUN`, started by `picotrain.launch` or by torchrun.

    torchrun --nproc_per_node 8 -m picotrain.worker runs/d20     # goes on with the run as its files say

Exit codes: 0 finished, 75 stopped by a signal and saved, 5 either of them while the archive lacks the end, a user error's
own (its message on stderr), 1 with a traceback.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from picotrain import hardware, ranks, terminal
from picotrain.config import load
from picotrain.config.schema import Config, HardwareConfig
from picotrain.errors import LaunchError, OutOfMemory, PicotrainError, Stopped
from picotrain.lock import RunLock
from picotrain.meeting import Meeting
from picotrain.planning import lighter_settings
from picotrain.run import Material, read_plan, require_run
from picotrain.signals import StopSignal, ending
from picotrain.terminal import say
from picotrain.text import size

if TYPE_CHECKING:
    from picotrain.model import LanguageModel

PARENT_POLL_S = 0.5

# Ranks that meet the same error would all print it. Rank 0 speaks first; by the end of this time the launcher has ended
# the others. A rank that only lost its peer leaves that peer more time to say why.
OTHERS_WAIT_S = 3.0
LOST_PEER_WAIT_S = 6.0
STOPPED_WAIT_S = 0.5  # who is there hears of it by then, and a signal wants an end


def main(arguments: list[str]) -> int:
    """The worker's process, from its arguments to its exit code."""
    terminal.set_up()
    if len(arguments) != 1:
        say("usage: python -m picotrain.worker RUN")
        return PicotrainError.exit_code
    hardware.wait_briefly()  # torchrun may have started us
    run_dir = Path(arguments[0])
    try:
        here = ranks.settle()
    except PicotrainError as error:
        return _fail(error)

    @contextmanager
    def opened(meeting: Meeting | None = None) -> Generator[Opened]:
        require_run(run_dir)  # a folder without a run is refused before a lock is put into it
        with RunLock(run_dir).share() if here.ours else RunLock(run_dir):
            yield Opened(run_dir)

    def work() -> int:
        with opened():
            return run(run_dir)

    return together(opened) if here.under_torchrun else as_rank(work)


class Opened(NamedTuple):
    """A run that this process may train: its directory, and what stands in it where this process has just written that."""

    dir: Path
    material: Material | None = None


def together(opened: Callable[[Meeting], AbstractContextManager[Opened | None]]) -> int:
    """Train in the processes that torchrun has started: rank 0 opens a run, under its lock, while the others wait; the exit code.

    `opened` yields it, or None where there is nothing to do. What goes wrong in it is said by rank 0 alone, and all end with its code.
    """
    here = ranks.here()

    def first() -> int:
        with ExitStack() as stack:
            with ending("starting"):
                meeting = Meeting(here)
            try:
                found = stack.enter_context(opened(meeting))
                with ending("waiting for the other ranks"):
                    meeting.tell({"run": str(found.dir)} if found else {"code": 0})
            except Exception as error:
                code = _fail(error)
                with suppress(LaunchError):
                    meeting.tell({"code": code}, within_s=STOPPED_WAIT_S if isinstance(error, Stopped) else OTHERS_WAIT_S)
                return code
            return run(*found, meeting) if found else 0

    def other() -> int:
        if here.local_rank == (1 if here.rank < here.local_world_size else 0):  # one of each node
            say(f"picotrain: rank {here.rank} waits for rank 0, which prepares the run")
        with ending("waiting for rank 0"):
            meeting = Meeting(here)
            told = meeting.hear()
        if "run" in told:
            return run(Path(told["run"]), meeting=meeting)
        time.sleep(OTHERS_WAIT_S if told["code"] else 0)  # the agent names the first that fails: rank 0
        return told["code"]

    return as_rank(first if here.rank == 0 else other)


def as_rank(work: Callable[[], int]) -> int:
    """The exit code of `work` done by this process as the rank that torchrun's environment names, or as the only one.

    Rank 0 prints, and an error that several ranks meet is told once. The process ends with its agent; one of several ranks ends here.
    `terminal.set_up` comes before.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until somebody listens: end without Python's traceback
    faulthandler.enable()  # a crash in native code shows where
    faulthandler.register(signal.SIGUSR2)  # a launcher or a user who wants to know where a rank is
    watch_parent()
    if ranks.here().rank != 0:
        sys.stderr = sys.__stderr__
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 prints; of the others errors are shown
    try:
        code = work()
    except Stopped as error:
        return ranks.leave(_fail(error) if ranks.here().rank == 0 else error.exit_code, at_once=True)
    except Exception as error:
        _let_others_speak(error)
        code = _fail(error)
    return ranks.leave(code)


@contextmanager
def _without_collector() -> Generator[None]:
    """Nothing looks for garbage until the loop, once warm, begins to: in what a start makes there is little, and looking took 0.8 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_without_collector()
def run(run_dir: Path, material: Material | None = None, meeting: Meeting | None = None, model: LanguageModel | None = None) -> int:
    """Train the run in this process, as the rank that torchrun's environment names: 0 finished, 75 stopped.

    material: what stands in the run's files; None: it is read. meeting: where the ranks have met already. model: as in `loop.train`.
    Raises PicotrainError for what a user can cause, OutOfMemory among it; then the memory is free again.
    """
    terminal.keep_going()
    config = material.config if material else load(run_dir / "config.yaml")
    with StopSignal() as stop:
        with stop.ending("starting"):
            set_up_process(config.hardware)
            from picotrain import loop, parallel

            group = config.parallel.build(config.hardware.device, meeting)
        try:
            with group.passing_on(stop):
                outcome = loop.train(run_dir, group, stop, material, model)
        except Exception as error:
            if not (said := parallel.out_of_memory(error)):
                raise
            problem = _too_little_memory(run_dir, config, said, parallel.memory_in_use(group.device))
        else:
            group.teardown()
            if outcome.behind:
                raise outcome.behind
            return 0 if outcome.status == "finished" else Stopped.exit_code
    parallel.free_memory()  # here, since the error's frames held the tensors until now
    raise problem


def _too_little_memory(run_dir: Path, config: Config, said: str, in_use: str) -> OutOfMemory:
    """What does not fit, what was predicted, and what would fit."""
    plan = read_plan(run_dir)
    settings = lighter_settings(plan, config) or ["a smaller model, or a machine with more memory"]
    rank = f"rank {here.rank}: " if (here := ranks.here()).launched else ""
    return OutOfMemory(
        f"{rank}out of memory with micro-batches of {plan.device_batch_size} rows of {plan.seq_len:,} tokens; the plan predicted "
        f"{size(plan.predicted_memory_bytes)}{in_use}\n  {said[:200]}\n"
        "What would fit by the same prediction (the steps stay the same but where it says a new run):\n"
        + "\n".join(f"  - {setting}" for setting in settings)
    )


def set_up_process(section: HardwareConfig) -> None:
    """Threads, allocator and first calls, before anything large is allocated or computed."""
    os.environ.setdefault("PATH", os.defpath)  # env -i: a C++ compiler is found without it, but does not find its own parts
    if section.device == "cpu":
        keep_freed_memory()
    import torch

    torch.set_num_threads(section.threads or max(1, hardware.cores() // ranks.here().local_world_size))
    if torch.get_num_interop_threads() != 1:  # the loop runs one operator at a time
        with suppress(RuntimeError):  # torch refuses once something has run in parallel
            torch.set_num_interop_threads(1)
    from picotrain import first_calls

    first_calls.settle()


def keep_freed_memory() -> None:
    """Make glibc keep what is freed, so that a training step does not fault in the same gigabyte again at every step.

    Measured on a depth-4 step on two cores: 1.05 to 2 times as many tokens per second, for up to 1.3 GiB of RSS. Other
    C libraries are left alone. Parameters and values: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)  # large blocks come from the heap, too
    libc.mallopt(trim_threshold, -1)  # and the heap never shrinks


def watch_parent() -> None:
    """End this process within a second of its agent's death, even by SIGKILL, which nothing can pass on.

    Torch starts workers in sessions of their own, so that no signal reaches them when their agent or terminal is gone.
    A process that no agent has started may outlive its parent (nohup).
    """
    launcher = os.environ.get(ranks.LAUNCHER_PID)
    if launcher is None and not ranks.here().launched:
        return
    parent = int(launcher or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with whatever this worker has started
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _let_others_speak(error: Exception) -> None:
    """Wait while another rank may have the better message; see OTHERS_WAIT_S. The launcher may end us meanwhile."""
    here = ranks.here()
    if here.world_size == 1:
        return
    parallel = sys.modules.get("picotrain.parallel")  # not imported just to say that importing it failed
    if parallel is not None and parallel.lost_a_peer(error):
        time.sleep(LOST_PEER_WAIT_S)
    elif here.rank != 0:
        time.sleep(OTHERS_WAIT_S)


def _fail(error: Exception) -> int:
    """Say what is wrong: one message for a user's error, the traceback for a bug; the exit code."""
    if isinstance(error, PicotrainError):
        say(f"picotrain: {error}")
    else:
        say("".join(traceback.format_exception(error)).rstrip())
    return error.exit_code if isinstance(error, PicotrainError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
