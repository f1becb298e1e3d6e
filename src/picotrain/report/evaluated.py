"""What `picotrain eval` found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picotrain.report.markdown import cell, fence
from picotrain.text import printable


def render(title: str, results: Mapping[str, Any]) -> str:
    """results.md of an evaluation's results.json."""
    lines = [f"# {cell(title)}", "", "| split | bits per byte | loss (nats per token) | tokens |", "|---|---|---|---|"]
    for split, name in (("val", "validation"), ("train", "training")):
        if results["bpb"].get(split) is not None:
            bpb, loss, tokens = results["bpb"][split], results[f"{split}_loss"], results["tokens"][split]
            lines.append(f"| {name} | {bpb:.4f} | {loss:.4f} | {tokens:,} |")
    if only := results.get("only_tokens"):
        lines += ["", f"Only about the first {only:,} tokens of each text (--tokens); the whole of it has other figures."]
    if "window" in results:
        lines += ["", f"Whole documents, in windows of {results['window']:,} tokens."]
    if by_source := results["bpb"].get("by_source"):
        lines += ["", "| source | bits per byte |", "|---|---|", *(f"| {cell(name)} | {bpb:.4f} |" for name, bpb in by_source.items())]
    missing = results.get("missing") or {}
    lines += ["", *_core(results["core"])] if results["core"] or "CORE" not in missing else []
    if missing:
        lines += ["", "Not measured:", "", *(f"- {cell(name)}: {cell(why)}" for name, why in missing.items())]
    for sample in results["samples"]:
        what = f"prompt {cell(repr(sample['prompt']))}" if sample["prompt"] else "from nothing"
        lines += ["", f"Sample, {what}:", "", fence(sample["prompt"] + sample["text"])]
    return printable("\n".join(lines) + "\n")


def _core(core: Mapping[str, Any] | None) -> list[str]:
    if core is None:
        return ["CORE: not evaluated; `--bundle DIR` or evaluation.core.bundle names an evaluation bundle."]
    value = "not evaluated" if core["core_metric"] is None else f"**{core['core_metric']:.4f}**"
    cut = f"at most {core['max_per_task']} examples a task" if (core["max_per_task"] or 0) > 0 else "all examples"
    lines = [f"CORE: {value}, the mean over {core['evaluated']} of {core['of']} tasks; {cut}; baselines: {core['baseline_table']}.", ""]
    lines += ["| task | examples | accuracy | centered |", "|---|---|---|---|"]
    for label, task in core["tasks"].items():
        if task["centered"] is None:
            lines.append(f"| {cell(label)} | {task['n']:,} | not evaluated: {cell(core['problems'].get(label, ''))} | |")
        else:
            lines.append(f"| {cell(label)} | {task['n']:,} | {task['accuracy']:.3f} ± {task['stderr']:.3f} | {task['centered']:+.3f} |")
    return lines
