"""A run directory read back: everything that is there, nothing that has to be. What cannot be read is said, not raised."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ValidationError

from picotrain.config.saved import MAX_CONFIG_BYTES, parse_yaml
from picotrain.data.mixture import Mixture
from picotrain.disk import MAX_BYTES, parse_json, read_plain
from picotrain.errors import DataError, RunError
from picotrain.metrics import METRICS, read_metrics
from picotrain.report.shapes import ANY, CONFIG, DATA, EVAL, LINE, MANIFEST, PLAN, SCORE
from picotrain.text import first_line

Record = dict[str, Any]
STEP_FOLDER = "step_[0-9]{1,18}"
ARCHIVE = ("archive_failed", "archive_works")
ASIDE = ("profiled", "profile_failed", *ARCHIVE)  # events that say nothing about where a run stands
ENDS = ("finished", "stopped", "diverged", "bad_data")  # events after which a run does not go on by itself


@dataclass(frozen=True)
class Checkpoint:
    """One folder under checkpoints/; it is whole when its manifest, which is written last, is there and the sizes in it are right."""

    name: str
    step: int
    bytes: int
    whole: bool
    problem: str  # why it is not whole
    val_bpb: float | None
    seconds: float | None  # that saving took


@dataclass(frozen=True)
class Run:
    """The files of a run. Lines of metrics.jsonl are ordered by step, one a step and kind; events by time."""

    dir: Path
    config_text: str
    config: Record
    plan: Record
    data: Record
    mixture: Mixture | None  # what data.json says of the corpus
    environment: Record
    overrides: list[str]
    train: list[Record]
    val: list[Record]
    core: list[Record]
    samples: list[Record]
    events: list[Record]
    last_event: str | None  # of those that metrics.jsonl itself holds
    attempts: list[tuple[str, str]]  # every start: its number, and what was given on its command line
    evals: list[Record]  # eval/step_*/results.json by step
    checkpoints: list[Checkpoint]
    best: str | None
    latest: str | None
    problems: list[str]


def read_run(run_dir: Path) -> Run:
    """Everything a report needs. Raises RunError only where the folder holds no run."""
    if not (run_dir / "config.yaml").is_file():
        what = "has no config.yaml, so it holds no run" if run_dir.is_dir() else "does not exist"
        raise RunError(f"{run_dir} {what}; a run directory is what `picotrain train` writes, runs/<name> by default")
    problems: list[str] = []
    config_text = _read_text(run_dir / "config.yaml", problems)
    lines = _read_lines(run_dir / METRICS, problems)
    # A resume moves the lines after its checkpoint into a file beside; what happened there happened all the same.
    cut = [line for path in sorted(run_dir.glob("metrics.cut*.jsonl")) for line in _read_lines(path, problems)]
    own_events = _of_kind(lines, "event")
    seconds = {line.get("path"): line.get("seconds") for line in _of_kind(cut + lines, "checkpoint")}
    checkpoints = _read_checkpoints(run_dir / "checkpoints", seconds, problems)
    whole = [checkpoint.name for checkpoint in checkpoints if checkpoint.whole]
    data = _read_json(run_dir / "data.json", problems, DATA)
    return Run(
        dir=run_dir,
        config_text=config_text,
        config=_parsed(run_dir / "config.yaml", parse_yaml, config_text or "{}", problems, CONFIG),
        plan=_read_json(run_dir / "plan.json", problems, PLAN),
        data=data,
        mixture=_mixture(data.get("corpus"), problems),
        environment=_read_json(run_dir / "environment.json", problems),
        overrides=_read_text(run_dir / "overrides.txt", problems).splitlines(),
        train=_by_step(lines, "train"),
        val=_by_step(lines, "val"),
        core=_by_step(lines, "core"),
        samples=_by_step(lines, "sample"),
        events=sorted(_of_kind(cut, "event") + own_events, key=lambda event: str(event.get("time", ""))),
        last_event=next((event.get("name") for event in reversed(own_events) if event.get("name") not in ASIDE), None),
        attempts=[(path.name, _read_text(path / "overrides.txt", problems)) for path in _folders(run_dir / "attempts", "[0-9]{1,9}")],
        evals=_read_evals(run_dir / "eval", problems),
        checkpoints=checkpoints,
        best=_named(run_dir / "checkpoints/best", whole) or _lowest(checkpoints),
        latest=_named(run_dir / "checkpoints/latest", whole) or next(reversed(whole), None),
        problems=problems,
    )


def summarise(run: Run, running: bool = False) -> dict[str, Any]:
    """The facts of a run, flat; None where something was not measured or is not known."""
    plan, last = run.plan, run.train[-1] if run.train else {}
    steps_done = last["step"] + 1 if last else 0
    whole = [checkpoint for checkpoint in run.checkpoints if checkpoint.whole]
    core = core_points(run)[-1:]
    return {
        "name": plan.get("name") or (run.config.get("run") or {}).get("name") or run.dir.name,
        "status": _status(run, steps_done, running),
        "num_steps": plan.get("num_steps"),
        "steps_done": steps_done,
        "tokens": steps_done * (plan.get("total_batch_size") or last.get("tokens") or 0),
        "epochs": last.get("epoch"),
        "source_tokens": _source_tokens(run.train),
        "source_epochs": last.get("source_epochs"),
        **_validation(run.val),
        "train_loss": last.get("loss"),
        "smooth_train_loss": last.get("smooth_loss"),
        "core_metric": core[0].get("core_metric") if core else None,
        "core_step": core[0]["step"] if core else None,
        **_throughput(run.train),
        "parameters": (plan.get("parameters") or {}).get("total"),
        **{key: plan.get(key) for key in ("flops_per_token", "seq_len", "total_batch_size")},
        "vocab_size": plan.get("vocab_size"),
        "data": (run.config.get("data") or {}).get("name"),
        **{key: plan.get(key) for key in ("hardware_name", "device", "precision", "world_size")},
        "best_checkpoint": run.best,
        "last_checkpoint": whole[-1].name if whole else None,
        "checkpoints": len(whole),
        "resumes": sum(event.get("name") == "resumed" for event in run.events),
        "failed_evaluations": sum(event.get("name") == "evaluation_failed" for event in run.events),
        "archive_trouble": _archive_trouble(run.events),
        "prompt": next(iter((run.config.get("sampling") or {}).get("prompts") or ()), None),  # the first that samples begin with
        "report": str(run.dir / "report.md"),
    }


def core_points(run: Run) -> list[Record]:
    """CORE by step, as {step, core_metric, tasks}; `picotrain eval`, which may take more examples, over the loop at the same step."""
    found = {line["step"]: line for line in run.core}
    found |= {results["step"]: {**core, "step": results["step"]} for results in run.evals if (core := results.get("core"))}
    return [found[step] for step in sorted(found) if found[step].get("core_metric") is not None or found[step].get("tasks")]


def _status(run: Run, steps_done: int, running: bool) -> str:
    """finished, stopped, diverged, running or interrupted. A run is finished when it says so, or, silent, when no step is left."""
    all_done = steps_done >= (run.plan.get("num_steps") or float("inf"))
    if run.last_event == "finished" or run.last_event is None:
        return "finished" if all_done else "running" if running else "interrupted"
    if run.last_event in ENDS:
        return run.last_event
    return "running" if running else "interrupted"


def _archive_trouble(events: Sequence[Record]) -> str | None:
    """What is wrong with the run's archive, as far as its events tell; None: nothing."""
    last = next((event for event in reversed(events) if event.get("name") in ARCHIVE), {})
    return str(last.get("message", "")) if last.get("name") == ARCHIVE[0] else None


def _source_tokens(train: Sequence[Record]) -> dict[str, int] | None:
    """Tokens trained on by source of a mixture."""
    total: Counter[str] = Counter()
    for line in train:
        total.update({name: int(tokens) for name, tokens in (line.get("source_tokens") or {}).items()})
    return dict(total) or None


def _validation(val: Sequence[Record]) -> dict[str, Any]:
    """First, lowest and last validation BPB with their steps; `val_bpb_ratio` is the last over the first."""
    measured = [line for line in val if line.get("val_bpb") is not None]
    first, last = (measured[0], measured[-1]) if measured else ({}, {})
    best = min(measured, key=lambda line: line["val_bpb"], default={})
    named = {"initial": first, "best": best, "final": last}
    return {
        "validations": len(measured),
        **{f"{which}_val_{of}": line.get(key) for which, line in named.items() for of, key in (("bpb", "val_bpb"), ("step", "step"))},
        "final_val_loss": last.get("val_loss"),
        "val_bpb_ratio": last["val_bpb"] / first["val_bpb"] if first.get("val_bpb") else None,
        "improved": best["val_bpb"] < first["val_bpb"] if len(measured) > 1 else None,
    }


def _throughput(train: Sequence[Record]) -> dict[str, Any]:
    """Medians over the steps but the first, which compiles and warms up, and those that the profiler slowed, and how much of the
    time waited for data."""
    steady = [line for line in train[1:] if not line.get("profiled")] or train
    dt_ms, waits = sum(line.get("dt_ms") or 0 for line in steady), [line.get("data_wait_ms") or 0.0 for line in steady]
    total_s = train[-1].get("total_training_time_s") if train else 0.0
    return {
        "total_training_time_s": sum(line.get("dt_ms") or 0 for line in train) / 1000 if total_s is None else total_s,
        "median_tok_per_sec": _median(line.get("tok_per_sec") for line in steady),
        "median_mfu": _median(line.get("mfu") for line in steady),
        "median_dt_ms": _median(line.get("dt_ms") for line in steady),
        "data_wait_share": sum(waits) / dt_ms if dt_ms else None,
        "data_wait_p99_ms": float(np.percentile(waits, 99, method="inverted_cdf")) if waits else None,
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _read_lines(path: Path, problems: list[str]) -> list[Record]:
    """The lines up to the first damage."""
    lines: list[Record] = []
    odd: list[str] = []
    try:
        for number, line in enumerate(read_metrics(path), start=1):
            lines.append(_known(line, LINE, f"{path.name}, line {number}", odd))
    except RunError as error:
        missing = f"there is no {path.name}: nothing was recorded yet"
        problems.append(f"{error}; what follows it is not in this report" if path.is_file() else missing)
    if odd:
        problems.append(odd[0] + (f"; {len(odd) - 1:,} more lines are like it" if len(odd) > 1 else ""))
    return lines


def _of_kind(lines: Sequence[Record], kind: str) -> list[Record]:
    return [line for line in lines if line.get("kind") == kind]


def _by_step(lines: Sequence[Record], kind: str) -> list[Record]:
    """One line a step, the later one where there are two."""
    found = {line["step"]: line for line in _of_kind(lines, kind) if line.get("step") is not None}
    return [found[step] for step in sorted(found)]


def _known(record: Record, shape: type[BaseModel], where: str, problems: list[str]) -> Record:
    """The record without the keys whose values are not of the kind that `shape` wants."""
    try:
        shape.model_validate(record)
    except ValidationError as error:
        wrong = {str(found["loc"][0]): found["msg"] for found in reversed(error.errors(include_url=False))}
        problems.append(f"{where}: {', '.join(f'{key} ({reason})' for key, reason in wrong.items())}: left out")
        return {key: value for key, value in record.items() if key not in wrong}
    return record


def _read_json(path: Path, problems: list[str], shape: type[BaseModel] = ANY) -> Record:
    data = _read(path, problems, MAX_BYTES)
    return _parsed(path, parse_json, data, problems, shape) if data is not None else {}


def _parsed(path: Path, parse: Callable[[Any], Any], data: str | bytes, problems: list[str], shape: type[BaseModel]) -> Record:
    try:
        value = parse(data)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {first_line(error)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no mapping of keys to values")
        return {}
    return _known(value, shape, path.name, problems)


def _read(path: Path, problems: list[str], max_bytes: int) -> bytes | None:
    try:
        return read_plain(path, max_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return None


def _read_text(path: Path, problems: list[str]) -> str:
    return (_read(path, problems, MAX_CONFIG_BYTES) or b"").decode("utf-8", errors="replace")


def _mixture(corpus: Record | None, problems: list[str]) -> Mixture | None:
    try:
        found = Mixture.from_json(corpus) if corpus else None
        if found and not all(math.isfinite(share) for share in found.shares):
            raise ValueError("weights that are no numbers")
        return found
    except (DataError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        problems.append(f"data.json: {f'it has no {error}' if isinstance(error, KeyError) else error}: left out")
        return None


def _folders(root: Path, name: str) -> list[Path]:
    """The folders in `root` whose names match; no links, which may lead out of the run."""
    found = [path for path in root.glob("*") if re.fullmatch(name, path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.name)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _read_checkpoints(root: Path, seconds: Mapping[Any, Any], problems: list[str]) -> list[Checkpoint]:
    found = []
    for path in _folders(root, STEP_FOLDER):
        n_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        val_bpb = _read_json(path / "metrics.json", problems, SCORE).get("val_bpb")
        flaw = _flaw(path, problems)
        found.append(Checkpoint(path.name, _step_of(path), n_bytes, not flaw, flaw, val_bpb, seconds.get(f"checkpoints/{path.name}")))
    return found


def _flaw(checkpoint: Path, problems: list[str]) -> str:
    """Why a checkpoint cannot be whole. Sizes only: a report is written often, and hashing a large checkpoint takes minutes."""
    if not (checkpoint / "manifest.json").is_file():
        return "not whole: no manifest"
    for name, listed in (_read_json(checkpoint / "manifest.json", problems, MANIFEST).get("files") or {}).items():
        file = checkpoint / Path(name).name
        if not file.is_file() or file.stat().st_size != listed.get("bytes"):
            return f"not whole: {file.name} is missing or has another size than its manifest says"
    return ""


def _read_evals(root: Path, problems: list[str]) -> list[Record]:
    """results.json of each step, by step."""
    found = [(_step_of(path), _read_json(path / "results.json", problems, EVAL)) for path in _folders(root, STEP_FOLDER)]
    return [{**results, "step": step} for step, results in sorted(found, key=lambda pair: pair[0]) if results]


def _named(pointer: Path, whole: Sequence[str]) -> str | None:
    """What checkpoints/latest or best names, if that is there and whole."""
    name = _read_text(pointer, []).strip()
    return name if name in whole else None


def _lowest(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The whole checkpoint with the lowest val_bpb."""
    return min(((c.val_bpb, c.name) for c in checkpoints if c.whole and c.val_bpb is not None), default=(None, None))[1]
