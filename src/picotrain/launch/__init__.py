"""From a config to its processes: this one if one is enough, else one worker per rank under torch's agent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from picotrain import ranks, worker
from picotrain.config import Config, load
from picotrain.errors import OutOfMemory
from picotrain.launch.nodes import preparing
from picotrain.lock import RunLock as RunLock
from picotrain.meeting import Meeting
from picotrain.planning import halved
from picotrain.run import read_plan
from picotrain.terminal import say
from picotrain.worker import Opened


@dataclass(frozen=True)
class Start:
    """A run to be trained, by its config. opened: its directory, created or opened again, under its lock (`picotrain.lock`); None where
    there is nothing to do. It gets where torchrun's ranks have met, or None."""

    config: Config
    opened: Callable[[Meeting | None], AbstractContextManager[Opened | None]]


def launch(resolve: Callable[[], Start], module: str = "picotrain.worker") -> int:
    """Train what `resolve` gives, in hardware.nproc_per_node processes of each of launch.nnodes nodes, or in the ranks that torchrun has
    started; the exit code.

    0: finished. 75: stopped by a signal, saved, to be resumed. Another: that of a worker which has said what is wrong. Where memory
    ran out, workers are started again with smaller micro-batches if their size was left to us.
    Raises LaunchError when a worker fails otherwise, and what `resolve` and `opened` raise.

    On several nodes the same command is started once per node, e.g. by `srun --ntasks-per-node=1`, each with its
    launch.node_rank; node 0 is at launch.rdzv_endpoint, has rank 0, prepares the run and holds its lock.
    """
    if ranks.here().under_torchrun:
        return worker.together(lambda meeting: resolve().opened(meeting))
    start = resolve()
    section, nproc = start.config.launch, int(start.config.hardware.nproc_per_node)
    with ExitStack() as stack:
        found: Opened | None = Opened(Path(start.config.run.dir or ""))
        if section.node_rank == 0:
            with preparing(section):
                found = stack.enter_context(start.opened(None))
        while found:
            if nproc * section.nnodes == 1 and section.max_restarts == 0:  # a restart wants somebody who outlives the worker
                try:
                    return worker.run(*found)
                except OutOfMemory as error:  # as a worker would say it
                    say(f"picotrain: {error}")
                    code = error.exit_code
            else:
                from picotrain.launch.agent import run_workers  # torch

                # -P: the folder the user happens to be in must not shadow modules, as it does not for the picotrain command.
                code = run_workers([sys.executable, "-P", "-m", module, str(found.dir)], nproc, section, run_id=found.dir.name)
            if code != OutOfMemory.exit_code or section.nnodes > 1 or not (smaller := _with_smaller_micro_batches(found)):
                return code
            found = smaller
        return 0


def _with_smaller_micro_batches(run: Opened) -> Opened | None:
    """The run, planned with smaller micro-batches, as train.device_batch_size=auto allows; None where there are none."""
    smaller = halved(read_plan(run.dir), run.material.config if run.material else load(run.dir / "config.yaml"))
    if smaller is None:
        return None
    smaller.save(run.dir / "plan.json")
    say(
        f"picotrain: train.device_batch_size=auto: tried again with {smaller.device_batch_size} rows in {smaller.grad_accum_steps} "
        "accumulation steps, from the newest checkpoint; the steps are the same"
    )
    return run._replace(material=run.material and run.material._replace(plan=smaller))
