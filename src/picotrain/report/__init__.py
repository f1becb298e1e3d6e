"""What came of a run: report.html, report.md with its pictures, and summary.json for programs. Reads the run directory's files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from picotrain.disk import is_own_json, is_own_page, is_own_text, write_whole
from picotrain.errors import RunError
from picotrain.metrics import plain
from picotrain.report.charts import draw_charts
from picotrain.report.closing import console_summary, what_next
from picotrain.report.content import render
from picotrain.report.facts import Run, read_run, summarise
from picotrain.report.picture import draw_pictures
from picotrain.terminal import say

__all__ = ["Run", "console_summary", "read_run", "summarise", "what_next", "write_report"]


def write_report(run_dir: Path, running: bool = False) -> dict[str, Any]:
    """Write report.html, report.md, its pictures and summary.json into `run_dir`, and return the summary: flat facts by name.

    Works for runs in any state; `running` says whether one that has not ended is still at work or was interrupted.
    Raises RunError where the folder holds no run or cannot be written.
    """
    from picotrain.report.html import render_page  # its libraries would take a fifth of a second of every start

    run = read_run(run_dir)
    summary = plain(summarise(run, running))
    try:
        pictures = draw_pictures(run, run_dir)
        _replace(run_dir / "report.md", render(run, summary, pictures), is_own_text(run_dir / "report.md", "#", "", "This run "))
        _replace(run_dir / "report.html", render_page(run, summary, draw_charts(run)), is_own_page(run_dir / "report.html"))
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        _replace(run_dir / "summary.json", text, is_own_json(run_dir / "summary.json", "status", "steps_done"))
    except OSError as error:
        raise RunError(f"{run_dir}: the report cannot be written: {error.strerror or error}") from error
    return summary


def _replace(path: Path, text: str, own: bool) -> None:
    """Write a text under a temporary name, then rename it, so that a reader never sees half of it. What is not our own stays."""
    if not own:
        say(f"{path} was not written by picotrain and stays as it is; move it away, and `picotrain report` writes it")
        return
    write_whole(path, text.encode("utf-8", "replace"))  # a prompt may hold what is no Unicode
