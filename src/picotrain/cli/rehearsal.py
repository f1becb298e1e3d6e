"""The first two steps of a run as the run itself would do them: its launcher, its ranks, its compiled code, a save. Nothing stays."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from picotrain import ranks
from picotrain import run as runs
from picotrain.config.schema import HORIZONS
from picotrain.config.validate import with_values
from picotrain.errors import LaunchError, RunError
from picotrain.lock import is_locked
from picotrain.metrics import METRICS, read_metrics
from picotrain.signals import ending
from picotrain.text import duration, size

STEPS = 2
FOLDER = ".picotrain-doctor-"
STOP_S = 30.0  # what the steps get to end in when the doctor is stopped
TOLD_LINES = 30  # of what a failed start has said
# What a run has beside its steps, and two of them do without: other nodes, evaluations, and what leaves this folder.
ALONE = {
    "launch.nnodes": 1, "launch.node_rank": 0, "launch.rdzv_endpoint": None, "launch.max_restarts": 0, "archive.url": None,
    "train.eval_every": 0, "train.core_metric_every": 0, "train.sample_every": 0, "train.save_every": -1, "logger.trackers": [],
    "profiler.enabled": False, "run.resume": "auto",
}  # fmt: skip


def two_steps(material: runs.Material) -> tuple[str, None]:
    """Train two steps in a temporary folder beside the run's, on as many processes as a run would have here, and save.

    What they took, in words. Raises LaunchError with what a run would have said, RunError where the loss is not finite.
    """
    plan = material.plan
    with _folder(Path(material.config.run.dir or "")) as folder:
        rehearsed = _rehearsed(material, folder)
        runs.create(folder, rehearsed, [])
        said = _train(folder)
        records = list(read_metrics(folder / METRICS))
    steps = [record for record in records if record["kind"] == "train"]
    losses = [math.nan if step["loss"] is None else step["loss"] for step in steps]
    if len(steps) < STEPS or steps[-1]["skipped"] or not all(map(math.isfinite, losses)):
        calmer = "lower rates (optimizer.matrix_lr, ...)" + ("" if plan.precision == "fp32" else " or train.precision=fp32")
        raise RunError(f"the loss is not finite: {losses}; try {calmer}")
    step_s = steps[-1]["dt_ms"] / 1000
    told = [f"loss {losses[0]:.2f}, {losses[-1]:.2f}", f"{step_s:.2f} s a step"]
    told += [f"{found[-1]} of memory a rank" for found in [re.findall(r"\bmem +([\d.]+ ?[kMGT]?i?B)", said)] if found]
    told += [f"{event['name']} {event['message']}" for event in records if event["kind"] == "event" and event["name"] == "compiled"]
    told += [f"attention {event['message']}" for event in records if event["kind"] == "event" and event["name"] == "attention"]
    told += [f"a save of {size(save['bytes'])} in {save['seconds']:.1f} s" for save in records if save["kind"] == "checkpoint"][-1:]
    nproc = rehearsed.plan.world_size
    where = f"{nproc} processes" if nproc > 1 else "1 process"
    return f"{where}; {'; '.join(told)}; so about {duration(step_s * plan.num_steps)} of training here", None


def _rehearsed(material: runs.Material, folder: Path) -> runs.Material:
    """The same material with two steps and one node, whose ranks have as much to do as among all nodes."""
    config, plan = material.config, material.plan
    nodes = config.launch.nnodes
    batch = plan.total_batch_size // nodes
    horizon = dict.fromkeys((f"train.{key}" for key in HORIZONS), None) | {"train.max_steps": STEPS}
    place = {"run.dir": str(folder), "run.name": folder.name, "train.total_batch_size": batch}
    config = with_values(config, ALONE | horizon | place)
    share = {"world_size": plan.world_size // nodes, "dp_size": plan.dp_size // nodes, "total_batch_size": batch}
    return material._replace(config=config, plan=plan.model_copy(update=share | {"name": folder.name, "num_steps": STEPS}))


@contextmanager
def _folder(run_dir: Path) -> Generator[Path]:
    """A folder on the run's own disk, which is removed in any case; one that a killed doctor has left there goes, too."""
    place = next(path for path in run_dir.parents if path.is_dir())
    for left in place.glob(f"{FOLDER}*"):
        if not is_locked(left):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=place))
    except OSError as error:
        raise RunError(f"{place} cannot be written ({error.strerror}); name another run.dir") from error

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    try:
        with ending("trying two steps", remove):
            yield folder
    finally:
        remove()


def _train(folder: Path) -> str:
    """Train the run in `folder` by a command of its own; all that it printed. Raises LaunchError when it does not end well."""
    environment = {name: value for name, value in os.environ.items() if name not in (*ranks.NEEDED, *ranks.BESIDE, ranks.LAUNCHER_PID)}
    command = [sys.executable, "-P", "-m", "picotrain", "resume", str(folder)]
    started = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        said, _ = started.communicate()
    finally:
        if started.poll() is None:
            started.terminate()
            try:
                started.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                started.kill()
                started.communicate()
    if started.returncode:
        lines = said.strip().splitlines()
        first = next((at for at, line in enumerate(lines) if line.startswith(("picotrain: ", "Traceback"))), 0)
        told = "\n".join(lines[first:][-TOLD_LINES:])
        raise LaunchError(f"they ended with exit code {started.returncode}:\n{told}")
    return said
