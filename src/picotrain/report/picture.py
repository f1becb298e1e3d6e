"""The loss curve as a picture. matplotlib is imported only when there is something to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain.report.facts import Run
from picotrain.text import encodable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VAL, QUIET = "#2563a8", "#c2410c", "#6b7280"


def draw_loss(run: Run, path: Path) -> bool:
    """Draw training loss (raw and smoothed) and, below it, validation BPB over steps; False when nothing was measured.

    The picture is a PNG on white, 1,200 pixels wide, readable on light and dark pages.
    """
    val = [line for line in run.val if line.get("val_bpb") is not None]
    panels: list[Any] = [(_draw_train, run.train)] * bool(run.train) + [(_draw_val, val)] * bool(val)
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 2.9 * len(panels)), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (draw, lines) in zip(axes, panels, strict=True):
        draw(ax, lines)
        for event in run.events:
            if event.get("name") == "resumed":
                ax.axvline(event.get("step", 0), color=QUIET, linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    title = encodable(str(run.plan.get("name") or run.dir.name), "latin-1")  # what matplotlib's own font can show
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_train(ax: Axes, lines: Sequence[dict[str, Any]]) -> None:
    ax.plot(*_curve(lines, "loss"), color=TRAIN, alpha=0.3, linewidth=0.8, label="each step")
    ax.plot(*_curve(lines, "smooth_loss"), color=TRAIN, linewidth=1.6, label="smoothed")
    ax.set_ylabel("training loss\n(nats per token)")
    ax.legend(frameon=False, loc="upper right")


def _draw_val(ax: Axes, lines: Sequence[dict[str, Any]]) -> None:
    ax.plot(*_curve(lines, "val_bpb"), color=VAL, linewidth=1.4, marker="o", markersize=4)
    best = min(lines, key=lambda line: line["val_bpb"])
    ax.plot([best["step"]], [best["val_bpb"]], color=VAL, marker="o", markersize=10, markerfacecolor="none")
    left = len(lines) > 1 and best["step"] > lines[-1]["step"] / 2
    ax.annotate(
        f"best {best['val_bpb']:.4f}\nat step {best['step']:,}",
        (best["step"], best["val_bpb"]),
        xytext=(-4 if left else 4, 12),
        textcoords="offset points",
        ha="right" if left else "left",
        color=VAL,
    )
    ax.set_ylabel("validation\n(bits per byte)")


def _curve(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; a value that was not finite leaves a gap."""
    values = [line.get(key) for line in lines]
    return [line["step"] for line in lines], [float("nan") if value is None else value for value in values]
