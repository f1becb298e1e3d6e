"""Panels drawn with matplotlib, and the PNG pictures of report.md. matplotlib is imported only when there is something to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from picotrain.disk import is_own_picture
from picotrain.report.curves import MAX_MARKERS, Panel, Series, course_panels, learned_panels, resumed_at
from picotrain.report.facts import Run, core_points
from picotrain.terminal import say
from picotrain.text import encodable, printable, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = {"train": "#2563a8", "val": "#c2410c", "quiet": "#6b7280", "grid": "#d5d9e0"}
MAX_TASKS = 40  # in the picture of CORE; the bundle has 22


def draw_pictures(run: Run, folder: Path) -> dict[str, str]:
    """Draw what report.md shows into `folder`: file names by kind of picture, without those of which nothing was measured.

    PNG on white, 1,200 pixels wide, readable on light and dark pages: "learned" (training loss and validation BPB over steps),
    "course" (learning rate, gradient norm, throughput, MFU, wait for data, CORE over steps), "core" (a bar for each task).
    """
    draw: list[tuple[str, str, Callable[[Run, Path], bool]]] = [
        ("learned", "loss.png", draw_loss),
        ("course", "course.png", _draw_course),
        ("core", "core.png", _draw_core),
    ]
    found = {}
    for kind, file, function in draw:
        if not is_own_picture(folder / file):
            say(f"{folder / file} was not drawn by picotrain and stays as it is; move it away to have it drawn")
        elif function(run, folder / file):
            found[kind] = file
    return found


def draw_loss(run: Run, path: Path) -> bool:
    """Draw training loss (raw and smoothed) and, below it, validation BPB over steps; False when nothing was measured."""
    return _draw_grid(run, learned_panels(run), 1, 2.9, path)


def draw_panel(ax: Axes, panel: Panel, resumed: Sequence[int], x_of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> None:
    """Draw the curves of `panel`, without scales; `x_of` turns steps into what the x axis shows."""
    if panel.logarithmic:
        ax.set_yscale("log")
    for step in resumed:
        ax.axvline(float(x_of(np.array(step, dtype=np.float64))), color=COLOURS["quiet"], linewidth=0.8, linestyle=":")
    for series in panel.series:
        _draw_series(ax, series, x_of, panel.logarithmic)
    if panel.best:
        step, value = panel.best
        ring: dict[str, Any] = {"color": COLOURS["val"], "marker": "o", "markersize": 9, "markerfacecolor": "none"}
        ax.plot([float(x_of(np.array(step)))], [value], **ring)


def x_locator(integer: bool) -> MaxNLocator:
    """Few and round ticks, at whole numbers only if `integer`."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10])


def y_locator(logarithmic: bool) -> LogLocator | MaxNLocator:
    """Few and round ticks; powers of ten on a logarithmic scale."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    return LogLocator(numticks=6) if logarithmic else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])


def tick_text(value: float, _: float = 0) -> str:
    """What stands at a tick: 0.005, 3.25, 20k. (The second argument is what matplotlib gives a formatter besides.)"""
    if abs(value) < 10_000:
        return f"{value:.6g}"
    text = short(float(value))  # 20.0k
    digits, unit = text[:-1], text[-1]
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def _set_scales(ax: Axes, logarithmic: bool) -> None:
    from matplotlib.ticker import NullLocator

    ax.xaxis.set_major_locator(x_locator(integer=True))
    ax.yaxis.set_major_locator(y_locator(logarithmic))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(tick_text)
    ax.yaxis.set_major_formatter(tick_text)
    ax.grid(axis="y", color=COLOURS["grid"], linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _draw_series(ax: Axes, series: Series, x_of: Callable[[np.ndarray], np.ndarray], positive: bool) -> None:
    found, colour = series.curve, COLOURS[series.colour]
    x = x_of(found.steps)
    mean, low, high = (np.where(v > 0, v, np.nan) if positive else v for v in (found.mean, found.low, found.high))
    alone = np.isfinite(mean).sum() == 1  # a line needs two
    if found.binned and series.style != "points":
        ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0, label=series.label if series.style == "raw" else None)
        if series.style == "raw":
            return
    marker = "o" if alone or (series.style == "points" and len(x) <= MAX_MARKERS) else ""
    faint = {"alpha": 0.35, "linewidth": 0.8} if series.style == "raw" else {"linewidth": 1.5}
    (line,) = ax.plot(x, mean, color=colour, marker=marker, markersize=4, label=series.label, **faint)  # pyright: ignore[reportArgumentType]
    if series.style == "points":
        line.set_gid("points")


def _draw_course(run: Run, path: Path) -> bool:
    return _draw_grid(run, course_panels(run), 2, 2.2, path)


def _draw_grid(run: Run, panels: Sequence[Panel], columns: int, height: float, path: Path) -> bool:
    if not panels:
        return False
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    tall = 1.2 + height * rows
    page = Figure(figsize=(8, tall), dpi=150)
    axes = page.subplots(rows, columns, squeeze=False).ravel()
    # In inches, as the margins do not grow with the picture; matplotlib's own layouts double the time.
    page.subplots_adjust(left=0.08, right=0.98, bottom=0.55 / tall, top=1 - 0.65 / tall, wspace=0.2, hspace=0.85 / height)
    resumed = resumed_at(run)
    for ax, panel in zip(axes, panels, strict=False):
        draw_panel(ax, panel, resumed)
        ax.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=10)
        _set_scales(ax, panel.logarithmic)
        if len(panel.series) > 1:
            ax.legend(frameon=False, loc="upper right")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("step")
    title = encodable(printable(str(run.plan.get("name") or run.dir.name)), "latin-1")  # what matplotlib's own font can show
    page.suptitle(title, fontsize=11, parse_math=False)
    page.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_core(run: Run, path: Path) -> bool:
    points = core_points(run)
    tasks: Mapping[str, Any] = points[-1].get("tasks") or {} if points else {}
    bars = [(label, task) for label, task in tasks.items() if task.get("centered") is not None][:MAX_TASKS]
    if not bars:
        return False
    from matplotlib.figure import Figure

    page = Figure(figsize=(8, 1.2 + 0.24 * len(bars)), dpi=150, layout="constrained")
    ax = page.subplots()
    labels = [encodable(printable(label), "latin-1")[:40] for label, _ in bars]
    ax.barh(range(len(bars)), [task["centered"] for _, task in bars], color=COLOURS["train"], height=0.7)
    ax.set_yticks(range(len(bars)), labels, parse_math=False)
    ax.invert_yaxis()
    ax.axvline(0, color=COLOURS["quiet"], linewidth=0.8)
    ax.grid(axis="x", color=COLOURS["grid"], linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel(f"centered accuracy at step {points[-1]['step']:,}")
    page.savefig(path, format="png", metadata={"Software": None})
    return True
