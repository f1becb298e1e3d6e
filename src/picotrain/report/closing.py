"""What ends a training on the console: what was reached, how fast, where the rest stands, and what to type next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from picotrain import invocation
from picotrain.terminal import Printer
from picotrain.text import clock, short

GOES_ON = ("stopped", "interrupted", "bad_data")  # states of a run that the same config goes on from
PROMPT_CHARS = 40  # of a prompt that is shown as an example
LABEL_WIDTH = 12


def console_summary(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the few lines that end a training, and what can be typed now."""
    out = Printer(stream)
    for label, fact in _closing_lines(summary):
        out.line(_label(label), fact)
    what_next(summary, stream)


def what_next(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the commands that look at a run, measure it and go on with it, as they work in the user's shell."""
    out, run_dir, status = Printer(stream), Path(summary["report"]).parent, summary["status"]
    picotrain, run = invocation.command(), invocation.typed(run_dir)
    out.line(_label("next"), "")
    if summary["last_checkpoint"]:
        out.command(_label("  sample"), f"{picotrain} sample {run}{_prompt(summary.get('prompt'))}")
    if opening := invocation.opening(run_dir / "report.html"):
        out.command(_label("  open"), opening)
    if summary["last_checkpoint"]:
        out.command(_label("  evaluate"), f"{picotrain} eval {run}")
    if status in GOES_ON and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        out.line(_label("  go on"), "the same command, on every node")
    elif status in GOES_ON:
        out.command(_label("  go on"), invocation.resume(run_dir))
    elif status == "finished" and summary["num_steps"] and summary["last_checkpoint"]:
        out.command(_label("  train on"), f"{picotrain} resume {run} train.max_steps={2 * summary['num_steps']}")


def _label(text: str) -> str:
    return f"  {text:<{LABEL_WIDTH}}"


def _prompt(text: Any) -> str:
    """One of the run's own prompts as an argument, if it is short and plain; an empty one starts a document."""
    plain = isinstance(text, str) and text.isprintable() and 0 < len(text) <= PROMPT_CHARS and not text.startswith("-")
    return f" {shlex.quote(text)}" if plain else ""


def _closing_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    s = summary
    lines = [("run", f"{s['name']}: {s['status']} at step {s['steps_done']:,} of {s['num_steps'] or 0:,}")]
    if s["final_val_bpb"] is not None:
        start = f" (step {s['initial_val_step']:,}: {s['initial_val_bpb']:.4f})" if s["initial_val_step"] != s["final_val_step"] else ""
        lines.append(
            ("validation", f"{s['final_val_bpb']:.4f} bits per byte{start}, best {s['best_val_bpb']:.4f} at step {s['best_val_step']:,}")
        )
    if s["smooth_train_loss"] is not None:
        lines.append(("train loss", f"{s['smooth_train_loss']:.4f} nats per token, smoothed"))
    if s["median_tok_per_sec"]:
        mfu = f", MFU {100 * s['median_mfu']:.1f} %" if s["median_mfu"] else ""
        lines.append(("throughput", f"{short(s['median_tok_per_sec'])} tokens/s{mfu}, {clock(s['total_training_time_s'])} of training"))
    if s["failed_evaluations"]:
        lines.append(("warning", f"{s['failed_evaluations']} evaluations failed and have no figures; the report's events say why"))
    if s["archive_trouble"]:
        lines.append(("warning", f"the archive is behind: {s['archive_trouble']}"))
    if s["last_checkpoint"]:
        best = f", best {s['best_checkpoint']}" if s["best_checkpoint"] else ""
        lines.append(("checkpoint", f"{s['last_checkpoint']}{best}"))
    return [*lines, ("report", f"{invocation.shown(Path(s['report']))} and report.html")]
