"""How far long work is, on standard error: bars on a terminal, each gone when it is full, and lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from picotrain.terminal import is_terminal, rich_console, say
from picotrain.text import printable, size
from picotrain.ticker import Show, lines

BAR_WIDTH = 40


@contextmanager
def bars(in_bytes: bool = False, quiet: bool = False) -> Generator[Show]:
    """What shows progress: a bar for each thing that is done. in_bytes: amounts are bytes. quiet: no lines where no bar can be drawn."""
    if not is_terminal(sys.stderr):
        with lines(say if not quiet else lambda line: None, size if in_bytes else "{:,}".format) as told:
            yield told
        return
    amounts = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}", markup=False), BarColumn(BAR_WIDTH), amounts, TimeRemainingColumn()
    with Progress(*columns, console=rich_console(sys.stderr), transient=True) as drawn:
        there: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in there:
                there[what] = drawn.add_task(printable(what))
            drawn.update(there[what], completed=done, total=total or None, visible=not total or done < total)  # a full one makes room

        yield show
