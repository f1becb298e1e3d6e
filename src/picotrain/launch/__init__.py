"""From a run directory to its processes: in this one if one is enough, else one worker per rank under torch's agent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from picotrain.config import load
from picotrain.config.schema import LaunchConfig
from picotrain.errors import OutOfMemory
from picotrain.lock import RunLock as RunLock
from picotrain.plan import halved
from picotrain.run import read_plan
from picotrain.terminal import say


def launch(run_dir: Path, nproc: int, launch: LaunchConfig, in_process: Callable[[Path], int], module: str = "picotrain.worker") -> int:
    """Train the run in `run_dir` on nproc processes of each of launch.nnodes nodes; the exit code.

    0: finished. 75: stopped by a signal, saved, to be resumed. Another: that of a worker which has said what is wrong. Where memory
    ran out, workers are started again with smaller micro-batches if their size was left to us.
    Raises LaunchError when a worker fails otherwise, RunError when the directory is in use (see `picotrain.lock`).

    On several nodes the same command is started once per node, e.g. by `srun --ntasks-per-node=1`, each with its
    launch.node_rank; node 0 is at launch.rdzv_endpoint, has rank 0 and holds the run directory's lock.
    """
    with RunLock(run_dir) if launch.node_rank == 0 else nullcontext():
        while (code := _launch_once(run_dir, nproc, launch, in_process, module)) == OutOfMemory.exit_code:
            if launch.nnodes > 1 or not _halve_micro_batches(run_dir):
                break
        return code


def _launch_once(run_dir: Path, nproc: int, launch: LaunchConfig, in_process: Callable[[Path], int], module: str) -> int:
    if nproc * launch.nnodes == 1 and launch.max_restarts == 0:  # a restart wants somebody who outlives the worker
        try:
            return in_process(run_dir)
        except OutOfMemory as error:  # as a worker would say it
            say(f"picotrain: {error}")
            return error.exit_code
    from picotrain.launch.agent import run_workers  # torch

    # -P: the folder the user happens to be in must not shadow modules, as it does not for the picotrain command.
    return run_workers([sys.executable, "-P", "-m", module, str(run_dir)], nproc, launch, run_id=run_dir.name)


def _halve_micro_batches(run_dir: Path) -> bool:
    """Plan smaller micro-batches, as train.device_batch_size=auto allows; whether there are any."""
    smaller = halved(read_plan(run_dir), load(run_dir / "config.yaml"))
    if smaller is None:
        return False
    smaller.save(run_dir / "plan.json")
    say(
        f"picotrain: train.device_batch_size=auto: tried again with {smaller.device_batch_size} rows in {smaller.grad_accum_steps} "
        "accumulation steps, from the newest checkpoint; the steps are the same"
    )
    return True
