"""What `picotrain eval` found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picotrain.markdown import Markdown, table
from picotrain.report.content import fill


def render(title: str, results: Mapping[str, Any]) -> str:
    """results.md of an evaluation's results.json."""
    known = {"missing": {}, "only_tokens": None, **results}
    return fill("results.md.j2", title=title, r=known, splits=_splits(results), sources=_sources(results), tasks=_tasks(results["core"]))


def _splits(results: Mapping[str, Any]) -> Markdown:
    rows = [
        (name, f"{results['bpb'][split]:.4f}", f"{results[f'{split}_loss']:.4f}", f"{results['tokens'][split]:,}")
        for split, name in (("val", "validation"), ("train", "training"))
        if results["bpb"].get(split) is not None
    ]
    return table(("split", "bits per byte", "loss (nats per token)", "tokens"), rows)


def _sources(results: Mapping[str, Any]) -> Markdown:
    by_source = results["bpb"].get("by_source") or {}
    return table(("source", "bits per byte"), [(name, f"{bpb:.4f}") for name, bpb in by_source.items()])


def _tasks(core: Mapping[str, Any] | None) -> Markdown:
    rows = []
    for label, task in (core or {"tasks": {}})["tasks"].items():
        measured = task["centered"] is not None
        problem = core and core["problems"].get(label, "")
        accuracy = f"{task['accuracy']:.3f} ± {task['stderr']:.3f}" if measured else f"not evaluated: {problem}"
        rows.append((label, f"{task['n']:,}", accuracy, f"{task['centered']:+.3f}" if measured else ""))
    return table(("task", "examples", "accuracy", "centered"), rows)
