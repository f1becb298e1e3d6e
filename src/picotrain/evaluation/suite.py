"""All tasks of a bundle, one after the other: inside a training, and with results kept so that what was interrupted goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from picotrain.disk import is_own_json, parse_json, read_plain, write_whole
from picotrain.evaluation.bundle import Bundle, Task
from picotrain.evaluation.core import Core, TaskResult, evaluate_task, summary
from picotrain.evaluation.scorer import Scorer, scorer_of
from picotrain.evaluation.together import together, undisturbed
from picotrain.model import LanguageModel
from picotrain.parallel import Parallel
from picotrain.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # task, examples done, examples in all, of this rank


def core_of_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    open_bundle: Callable[[], Bundle],
    max_per_task: int,
    parallel: Parallel,
    should_stop: Callable[[], bool],
    progress: Progress,
) -> Core | None:
    """CORE of a model in training. The model stays as it is. None when any rank gave up. Raises EvaluationFailed on every rank where some
    rank cannot open the bundle. A broken task costs that task alone."""
    bundles: list[Bundle] = []
    together(parallel, lambda: bundles.append(open_bundle()))
    scorer, results = scorer_of(model, tokenizer), []
    with undisturbed(model):
        for task in bundles[0].tasks:
            results.append(evaluate_task(scorer, task, max_per_task, parallel, should_stop, progress))
            if results[-1].given_up:
                return None
    return summary(bundles[0], results, max_per_task)


def core_results(
    scorer: Scorer,
    bundle: Bundle,
    max_per_task: int,
    parallel: Parallel,
    store: Path | None,
    key: dict[str, Any],
    progress: Progress,
) -> list[TaskResult]:
    """The results of all tasks of a bundle.

    store: a folder that keeps each task's result; None: nothing is kept. A later call reads a result back where `key` and the task are the
    same. key: JSON that identifies the weights and how they are used."""
    results = []
    for task in bundle.tasks:
        file = store and store / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', task.label)}.json"
        identity = {**key, "task": _identity(task), "max_per_task": max_per_task}
        kept = parallel.gather(_kept(file, identity) if file and parallel.is_main else None)[0]
        result = TaskResult.from_dict(kept) if kept else evaluate_task(scorer, task, max_per_task, parallel, progress=progress)
        results.append(result)
        if file and parallel.is_main and not kept and result.accuracy is not None:  # what failed is tried again
            file.parent.mkdir(parents=True, exist_ok=True)
            if is_own_json(file, "key", "result"):
                write_whole(file, json.dumps({"key": identity, "result": result.as_dict()}) + "\n")
    return results


def _identity(task: Task) -> dict[str, Any]:
    """What a task's result depends on, its examples by their file's size and time."""
    facts = {name: str(value) for name, value in asdict(task).items()}
    with_stat = task.path.stat() if task.path and task.path.is_file() else None
    return facts | {"bytes": with_stat and with_stat.st_size, "modified_ns": with_stat and with_stat.st_mtime_ns}


def _kept(file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = parse_json(read_plain(file))
        return found["result"] if found["key"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
