"""Trackers: optional places, besides metrics.jsonl, that every record goes to. Each comes with an extra of its own name."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from picotrain.errors import ConfigError, Problem


class Sink(Protocol):
    """Takes the records of a run: plain dicts with `step` and `kind`, as in metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under tracker names: {"kind": "val", "val_bpb": 1.2} -> {"val/val_bpb": 1.2}."""
    numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}
    return {f"{record['kind']}/{key}": float(value) for key, value in numbers.items()}


class TensorBoardSink:
    """Event files under `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        for i, sample in enumerate(record.get("samples", ())):
            self._writer.add_text(f"sample/{i}", sample["prompt"] + sample["text"], step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run per picotrain run: its id is kept in `<run>/wandb_id.txt`, so that a resume goes on in the same one."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        name = (config.get("run") or {}).get("name") or run_dir.name
        self._run = wandb.init(
            project="picotrain", name=name, id=id_file.read_text().strip(), resume="allow", dir=str(run_dir), config=dict(config)
        )
        # Our own step is the axis: wandb's may not go back, which a resume does.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        values = scalars(record)
        if values:
            self._run.log({"step": record["step"], **values})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def missing_trackers(names: Sequence[str]) -> list[Problem]:
    """One problem for each tracker that is unknown or whose package is not installed; imports nothing."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(Problem("logger.trackers", f"no tracker is called {name!r}", f"one of {', '.join(sorted(TRACKERS))}"))
        elif find_spec(name) is None:
            problems.append(Problem("logger.trackers", f"the package {name} is not installed", f"pip install 'picotrain[{name}]'"))
    return problems


def build_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The trackers of a run. Raises ConfigError for an unknown name, a missing package, or a tracker that does not start."""
    if problems := missing_trackers(names):
        raise ConfigError(problems)
    with ExitStack() as stack:  # where one does not start, those before it end
        sinks = [_start(name, run_dir, config, stack) for name in names]
        stack.pop_all()
    return sinks


def _start(name: str, run_dir: Path, config: Mapping[str, Any], stack: ExitStack) -> Sink:
    try:
        sink = TRACKERS[name](run_dir, config)
        stack.callback(sink.close)
        return sink
    except Exception as error:  # third-party code: not logged in, no network, ...
        problem = Problem("logger.trackers", f"{name} does not start: {error}", "set it up, or leave it out")
        raise ConfigError([problem]) from error
