"""The PNG pictures of report.md, drawn with matplotlib, which is imported only when there is something to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from picotrain.disk import is_own_picture
from picotrain.report.curves import Panel, course_panels, learned_panels, resumed_at
from picotrain.report.facts import Run, core_points
from picotrain.terminal import say
from picotrain.text import encodable, printable, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = {"train": "#2563a8", "val": "#c2410c", "quiet": "#6b7280", "grid": "#d5d9e0"}
MAX_TASKS = 40  # in the picture of CORE; the bundle has 22


def draw_pictures(run: Run, folder: Path) -> dict[str, str]:
    """Draw what report.md shows into `folder`: file names by kind of picture, without those of which nothing was measured.

    PNG on white, 1,200 pixels wide, readable on light and dark pages: "learned" (training loss and validation BPB over steps),
    "course" (learning rate, gradient norm, throughput, MFU, wait for data, CORE over steps), "core" (a bar for each task).
    """
    draw: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "learned": ("loss.png", partial(_grid, run, learned_panels(run), columns=1, height=2.9)),
        "course": ("course.png", partial(_grid, run, course_panels(run), columns=2, height=2.2)),
        "core": ("core.png", partial(_core, run)),
    }
    found = {}
    for kind, (file, drawn) in draw.items():
        if not is_own_picture(folder / file):
            say(f"{folder / file} was not drawn by picotrain and stays as it is; move it away to have it drawn")
        elif page := drawn():
            page.savefig(folder / file, format="png", metadata={"Software": None})
            found[kind] = file
    return found


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


def _figure(height: float, **more: Any) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, height), dpi=150, **more)


def _plain(ax: Axes, across: Literal["x", "y"]) -> None:
    """Thin lines across, and no box around."""
    ax.grid(axis=across, color=COLOURS["grid"], linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _grid(run: Run, panels: Sequence[Panel], columns: int, height: float) -> Figure | None:
    if not panels:
        return None
    rows = -(-len(panels) // columns)
    tall = 1.2 + height * rows
    page = _figure(tall)
    axes = page.subplots(rows, columns, squeeze=False).ravel()
    # In inches, as the margins do not grow with the picture; matplotlib's own layouts double the time.
    page.subplots_adjust(left=0.08, right=0.98, bottom=0.55 / tall, top=1 - 0.65 / tall, wspace=0.2, hspace=0.85 / height)
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, resumed_at(run))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("step")
    title = encodable(printable(str(run.plan.get("name") or run.dir.name)), "latin-1")  # what matplotlib's own font can show
    page.suptitle(title, fontsize=11, parse_math=False)
    return page


def _draw(ax: Axes, panel: Panel, resumed: Sequence[int]) -> None:
    if panel.logarithmic:
        ax.set_yscale("log")
    for step in resumed:
        ax.axvline(step, color=COLOURS["quiet"], linewidth=0.8, linestyle=":")
    for series in panel.series:
        found = series.curve
        mean, low, high = (panel.shown(values) for values in (found.mean, found.low, found.high))
        if series.band:
            label = None if series.line else series.label
            ax.fill_between(found.steps, low, high, color=COLOURS[series.colour], alpha=0.22, linewidth=0, label=label)
        if series.line:
            faint: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8} if series.style == "raw" else {"linewidth": 1.5}
            marker = "o" if series.marks else ""
            ax.plot(found.steps, mean, color=COLOURS[series.colour], label=series.label, marker=marker, markersize=4, **faint)
    if panel.best:
        ax.plot(*([value] for value in panel.best), color=COLOURS["val"], marker="o", markersize=9, markerfacecolor="none")
    ax.minorticks_off()
    for axis, locator in ((ax.xaxis, x_locator(integer=True)), (ax.yaxis, y_locator(panel.logarithmic))):
        axis.set_major_locator(locator)
        axis.set_major_formatter(tick_text)
    ax.tick_params(axis="y", length=0)
    _plain(ax, "y")
    ax.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=10)
    if len(panel.series) > 1:
        ax.legend(frameon=False, loc="upper right")


def _core(run: Run) -> Figure | None:
    last = next(reversed(core_points(run)), {})
    bars = {label: task["centered"] for label, task in (last.get("tasks") or {}).items() if task.get("centered") is not None}
    if not bars:
        return None
    labels = list(bars)[:MAX_TASKS]
    page = _figure(1.2 + 0.24 * len(labels), layout="constrained")
    ax = page.subplots()
    ax.barh(range(len(labels)), [bars[label] for label in labels], color=COLOURS["train"], height=0.7)
    ax.set_yticks(range(len(labels)), [encodable(printable(label), "latin-1")[:40] for label in labels], parse_math=False)
    ax.invert_yaxis()
    ax.axvline(0, color=COLOURS["quiet"], linewidth=0.8)
    _plain(ax, "x")
    ax.set_xlabel(f"centered accuracy at step {last['step']:,}")
    return page
