"""From a run directory to its processes: in this one if one is enough, else one worker per rank under torch's agent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from picotrain.config.schema import LaunchConfig
from picotrain.lock import RunLock as RunLock


def launch(run_dir: Path, nproc: int, launch: LaunchConfig, in_process: Callable[[Path], int], module: str = "picotrain.worker") -> int:
    """Train the run in `run_dir` on nproc processes of each of launch.nnodes nodes; the exit code.

    0: finished. 75: stopped by a signal, saved, to be resumed. Another: that of a worker which has said what is wrong.
    Raises LaunchError when a worker fails otherwise, RunError when the directory is in use (see `picotrain.lock`).

    On several nodes the same command is started once per node, e.g. by `srun --ntasks-per-node=1`, each with its
    launch.node_rank; node 0 is at launch.rdzv_endpoint, has rank 0 and holds the run directory's lock.
    """
    with RunLock(run_dir) if launch.node_rank == 0 else nullcontext():
        if nproc * launch.nnodes == 1 and launch.max_restarts == 0:  # a restart wants somebody who outlives the worker
            return in_process(run_dir)
        from picotrain.launch.agent import run_workers  # torch

        # -P: the folder the user happens to be in must not shadow modules, as it does not for the picotrain command.
        return run_workers([sys.executable, "-P", "-m", module, str(run_dir)], nproc, launch, run_id=run_dir.name)
