"""What came of a run: report.html, report.md with its pictures, and summary.json for programs. Reads the run directory's files only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from picotrain.config.saved import is_own_json, is_own_page, is_own_text
from picotrain.errors import RunError
from picotrain.metrics import plain
from picotrain.report.charts import draw_charts
from picotrain.report.facts import Run, read_run, summarise
from picotrain.report.html import render_page
from picotrain.report.markdown import render
from picotrain.report.picture import draw_pictures
from picotrain.text import clock, encodable, short

__all__ = ["Run", "console_summary", "read_run", "summarise", "write_report"]


def write_report(run_dir: Path, running: bool = False) -> dict[str, Any]:
    """Write report.html, report.md, its pictures and summary.json into `run_dir`, and return the summary: flat facts by name.

    Works for runs in any state; `running` says whether one that has not ended is still at work or was interrupted.
    Raises RunError where the folder holds no run or cannot be written.
    """
    run = read_run(run_dir)
    summary = plain(summarise(run, running))
    try:
        pictures = draw_pictures(run, run_dir)
        page = render(run, summary, pictures.get("learned"), pictures)
        _replace(run_dir / "report.md", page, is_own_text(run_dir / "report.md", page.split("\n", 1)[0]))
        _replace(run_dir / "report.html", render_page(run, summary, draw_charts(run)), is_own_page(run_dir / "report.html"))
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        _replace(run_dir / "summary.json", text, is_own_json(run_dir / "summary.json", "status", "steps_done"))
    except OSError as error:
        raise RunError(f"{run_dir}: the report cannot be written: {error.strerror or error}") from error
    return summary


def console_summary(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the few lines that end a training: what was reached, how fast, and where the rest stands."""
    from rich.console import Console
    from rich.text import Text

    out: TextIO = sys.stdout if stream is None else stream
    console = Console(file=out, force_terminal=out.isatty(), force_jupyter=False, highlight=False)
    for label, fact in _closing_lines(summary):
        line = Text.assemble((f"  {label:<12}", "dim"), encodable(fact, console.encoding))
        console.print(line, soft_wrap=True)


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
    if s["last_checkpoint"]:
        best = f", best {s['best_checkpoint']}" if s["best_checkpoint"] else ""
        lines.append(("checkpoint", f"{s['last_checkpoint']}{best}"))
    return [*lines, ("report", f"{s['report']} and report.html")]


def _replace(path: Path, text: str, own: bool) -> None:
    """Write a text under a temporary name, then rename it, so that a reader never sees half of it. What is not our own stays."""
    if not own:
        print(f"{path} was not written by picotrain and stays as it is; move it away, and `picotrain report` writes it", file=sys.stderr)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
