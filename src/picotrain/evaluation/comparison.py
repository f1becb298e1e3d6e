"""How models differ, each from the first, in figures with their noise: bits per byte of whole documents, and CORE.

Results are plain dicts, as `picotrain.report.compare` shows them. A figure with its interval is {"value", "low", "high"}. The ends
are None where there is too little to go by. A difference is that of a further model from the first. Below zero it has the better
bits per byte, above zero the better CORE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picotrain.evaluation.bundle import Task
from picotrain.evaluation.core import TaskResult
from picotrain.evaluation.documents import DocumentScores
from picotrain.evaluation.stats import CONFIDENCE, Interval, accuracy_difference, holm, mcnemar, normal_interval, ratio_interval

Results = dict[str, Any]


def confidence(models: int) -> float:
    """The confidence of each interval when models 2, 3, ... are compared with the first. All of them together hold at 95 % (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, models - 1)


def compare_documents(scores: Sequence[DocumentScores | None], origins: Sequence[str]) -> list[Results]:
    """Bits per byte of each model (None: not measured) on the same documents: on all of them, then by origin where there are several.

    Rows {origin, documents, bytes, bpb: one each, differences: one for each model but the first}; no document is empty. The
    interval of a difference is a paired bootstrap over documents.
    """
    of, level = np.array(origins), confidence(len(scores))
    names = sorted(set(origins))
    groups = [("", np.ones(len(of), dtype=bool)), *((name, of == name) for name in names if len(names) > 1)]
    return [{"origin": name, **_documents(scores, chosen, level)} for name, chosen in groups]


def _documents(scores: Sequence[DocumentScores | None], chosen: NDArray[np.bool_], level: float) -> Results:
    first, *others = scores
    sizes = next(score.bytes[chosen] for score in scores if score)
    return {
        "documents": int(chosen.sum()),
        "bytes": int(sizes.sum()),
        "bpb": [float(score.bits[chosen].sum() / sizes.sum()) if score else None for score in scores],
        "differences": [
            _figure(ratio_interval((other.bits - first.bits)[chosen], sizes, level)) if first and other else None for other in others
        ],
    }


def compare_core(tasks: Sequence[Task], results: Sequence[Sequence[TaskResult]]) -> Results:
    """CORE of each model from its results of the same tasks and examples.

    A task counts where every model finished it, on the examples that all of them answered. A model that finished none is left
    out. tasks: {label, problem, n, accuracy, centered, differences: [{accuracy, centered, only_first, only_other, p, p_holm}]};
    core_metric: the mean of the centred accuracies over the tasks that count, differences: of it. The p-values are McNemar's;
    Holm corrects them for the number of tasks and models.
    """
    able = [any(result.accuracy is not None for result in found) for found in results]
    level = confidence(len(results))
    rows = [_task(task, [found[i] for found in results], able, level) for i, task in enumerate(tasks)]
    tests = [difference for row in rows for difference in row["differences"] if difference]
    for difference, p in zip(tests, holm([difference["p"] for difference in tests]), strict=True):
        difference["p_holm"] = p
    counted = [row for row in rows if not row["problem"]]
    metric = [_mean([row["centered"][i] for row in counted]) if counted and able[i] else None for i in range(len(results))]
    differences = [_core_difference([row["differences"][i] for row in counted], level) for i in range(len(results) - 1)]
    for row in rows:
        for difference in row["differences"]:
            if difference:
                del difference["error"]
    return {"tasks": rows, "evaluated": len(counted), "core_metric": metric, "differences": differences}


def _task(task: Task, found: Sequence[TaskResult], able: Sequence[bool], level: float) -> Results:
    models = range(len(found))
    nothing = {"n": 0, "accuracy": [None for _ in models], "centered": [None for _ in models], "differences": [None for _ in models[1:]]}
    problems = [one.problem or "it was not evaluated" for one, counts in zip(found, able, strict=True) if counts and one.accuracy is None]
    if problems or not any(able):
        return {"label": task.label, "problem": (problems or [one.problem for one in found])[0], **nothing}
    answers = [{one.index: one.correct for one in result.predictions if one.prediction is not None} for result in found]
    common = sorted(set.intersection(*(set(answers[i]) for i in models if able[i])))
    if not common:
        return {"label": task.label, "problem": "no example was answered by all", **nothing}
    correct = [np.array([answers[i][at] for at in common], dtype=bool) if able[i] else None for i in models]
    accuracy = [None if right is None else float(right.mean()) for right in correct]
    return {
        "label": task.label,
        "problem": "",
        "n": len(common),
        "accuracy": accuracy,
        "centered": [None if value is None else (value - task.baseline) / (1 - task.baseline) for value in accuracy],
        "differences": [_task_difference(correct[0], other, task.baseline, level) for other in correct[1:]],
    }


def _task_difference(first: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None, baseline: float, level: float) -> Results | None:
    if first is None or other is None:
        return None
    interval, error = accuracy_difference(other, first, level)
    only_other, only_first = int((other & ~first).sum()), int((first & ~other).sum())
    return {
        "accuracy": _figure(interval),
        "centered": _figure(Interval(*(end / (1 - baseline) for end in interval))),
        "only_first": only_first,
        "only_other": only_other,
        "p": mcnemar(only_first, only_other),
        "error": error / (1 - baseline),  # of the centred accuracy
    }


def _core_difference(tasks: Sequence[Results | None], level: float) -> Results | None:
    """Of the mean over tasks. Their examples are taken as drawn independently, task by task."""
    known = [task for task in tasks if task]
    if not known:
        return None
    error = math.sqrt(math.fsum(task["error"] ** 2 for task in known)) / len(known)
    return _figure(normal_interval(_mean([task["centered"]["value"] for task in known]), error, level))


def verdict(*differences: Results | None) -> str:
    """ "larger" than the noise or "no larger", by the first of these differences that has an interval: does it leave out zero?
    "not known" where none has one. (Were each asked, one of two would say "larger" by accident twice as often.)"""
    for difference in differences:
        if difference and difference["low"] is not None:
            return "larger" if difference["low"] > 0 or difference["high"] < 0 else "no larger"
    return "not known"


def _figure(interval: Interval) -> Results:
    return {name: None if math.isnan(value) else value for name, value in interval._asdict().items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
