"""One rank of a run: `python -m picotrain.worker RUN`, started by `picotrain.launch` or by torchrun.

    torchrun --nproc_per_node 8 -m picotrain.worker runs/d20     # does what `picotrain resume runs/d20` does

Exit codes: 0 finished, 75 stopped by a signal and saved, a user error's own (its message on stderr), 1 with a traceback.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from picotrain import hardware, terminal
from picotrain.config import load
from picotrain.config.schema import Config, HardwareConfig
from picotrain.errors import OutOfMemory, PicotrainError, Stopped
from picotrain.lock import RunLock
from picotrain.plan import lighter_settings
from picotrain.run import read_plan
from picotrain.terminal import say
from picotrain.text import size

LAUNCHER_PID = "PICOTRAIN_LAUNCHER_PID"  # set by picotrain.launch
PARENT_POLL_S = 0.5

# Ranks that meet the same error would all print it. Rank 0 speaks first; by the end of this time the launcher has ended
# the others. A rank that only lost its peer leaves that peer more time to say why.
OTHERS_WAIT_S = 3.0
LOST_PEER_WAIT_S = 6.0


def main(arguments: list[str]) -> int:
    """The worker's process, from its arguments to its exit code."""
    if len(arguments) != 1:
        say("usage: python -m picotrain.worker RUN")
        return PicotrainError.exit_code
    hardware.wait_briefly()  # torchrun may have started us
    run_dir = Path(arguments[0])

    def work() -> int:
        load(run_dir / "config.yaml")  # a folder without a run is refused before a lock is put into it
        with _lock(run_dir):
            return run(run_dir)

    return as_rank(work)


def as_rank(work: Callable[[], int]) -> int:
    """The exit code of `work` done by this process as the rank that torchrun's environment names, or as the only one.

    Rank 0 prints, and an error that several ranks meet is told once. The process ends with its agent; one of several ranks ends here.
    """
    terminal.set_up()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until somebody listens: end without Python's traceback
    faulthandler.enable()  # a crash in native code shows where
    faulthandler.register(signal.SIGUSR2)  # a launcher or a user who wants to know where a rank is
    watch_parent()
    if os.environ.get("RANK", "0") != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 prints; of the others errors are shown
    try:
        code = work()
    except Exception as error:
        _let_others_speak(error)
        code = _fail(error)
    return _leave(code)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing looks for garbage until the loop, once warm, begins to: in what a start makes there is little, and looking took 0.8 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_without_collector()
def run(run_dir: Path) -> int:
    """Train the run in this process, as the rank that torchrun's environment names: 0 finished, 75 stopped.

    Raises PicotrainError for what a user can cause, OutOfMemory among it; then the memory is free again.
    """
    terminal.keep_going()
    config = load(run_dir / "config.yaml")
    set_up_process(config.hardware)
    from picotrain import parallel

    with parallel.StopSignal() as stop:
        ranks = parallel.build(config.parallel.kind, config.hardware.device)
        from picotrain import loop

        try:
            outcome = loop.train(run_dir, ranks, stop)
        except Exception as error:
            if not parallel.out_of_memory(error):
                raise
            problem = _too_little_memory(run_dir, config, error, parallel.memory_in_use(ranks.device))
        else:
            ranks.teardown()
            return 0 if outcome.status == "finished" else Stopped.exit_code
    parallel.free_memory()  # here, since the error's frames held the tensors until now
    raise problem


def _too_little_memory(run_dir: Path, config: Config, error: Exception, in_use: str) -> OutOfMemory:
    """What does not fit, what was predicted, and what would fit."""
    plan = read_plan(run_dir)
    settings = lighter_settings(plan, config) or ["a smaller model, or a machine with more memory"]
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    return OutOfMemory(
        f"{rank}out of memory with micro-batches of {plan.device_batch_size} rows of {plan.seq_len:,} tokens; the plan predicted "
        f"{size(plan.predicted_memory_bytes)}{in_use}\n  {str(error).splitlines()[0][:200]}\n"
        "What would fit by the same prediction (the steps stay the same but where it says a new run):\n"
        + "\n".join(f"  - {setting}" for setting in settings)
    )


def set_up_process(section: HardwareConfig) -> None:
    """Threads, allocator and first calls, before anything large is allocated or computed."""
    if section.device == "cpu":
        keep_freed_memory()
    import torch

    torch.set_num_threads(section.threads or max(1, hardware.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
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
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = int(launcher or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with whatever this worker has started
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _lock(run_dir: Path) -> AbstractContextManager[object]:
    """The run directory's lock: shared with our launcher; without one, rank 0 takes it for all."""
    if LAUNCHER_PID in os.environ:
        return RunLock(run_dir).share()
    return RunLock(run_dir) if os.environ.get("RANK", "0") == "0" else nullcontext()


def _let_others_speak(error: Exception) -> None:
    """Wait while another rank may have the better message; see OTHERS_WAIT_S. The launcher may end us meanwhile."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    parallel = sys.modules.get("picotrain.parallel")  # not imported just to say that importing it failed
    if parallel is not None and parallel.lost_a_peer(error):
        time.sleep(LOST_PEER_WAIT_S)
    elif os.environ.get("RANK") != "0":
        time.sleep(OTHERS_WAIT_S)


def _fail(error: Exception) -> int:
    """Say what is wrong: one message for a user's error, the traceback for a bug; the exit code."""
    if isinstance(error, PicotrainError):
        say(f"picotrain: {error}")
    else:
        say("".join(traceback.format_exception(error)).rstrip())
    return error.exit_code if isinstance(error, PicotrainError) else 1


def _leave(code: int) -> int:
    """The exit code; one of several ranks ends right here. Leaving the interpreter may wait for peers, which wait for this rank's
    end, and now and then one of torch's threads aborts in it (seen with gloo, torch 2.13): a finished run would look failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        terminal.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
