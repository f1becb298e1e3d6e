"""What is drawn of a run: panels of curves over steps, each of a bounded number of points however long the run was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from picotrain.report.facts import Record, Run, core_points
from picotrain.text import short

MAX_POINTS = 400  # of a curve: about two pixels each on a wide screen, and a report of some hundred kilobytes
MAX_MARKERS = 60  # of a panel; more would hide the curve
WIDE = 100  # a panel whose largest value is this many times its median gets a logarithmic scale


@dataclass(frozen=True)
class Curve:
    """Mean, lowest and highest value of neighbouring steps; NaN where nothing finite was measured."""

    steps: np.ndarray  # (N,) float64, as are the others
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    binned: bool  # False: every point is one value

    @property
    def last(self) -> str:
        return figure(float(self.mean[np.isfinite(self.mean)][-1]))


@dataclass(frozen=True)
class Series:
    """A curve and how it is drawn: as the range of its bins, as a line, with a mark at each point."""

    label: str
    curve: Curve
    style: Literal["raw", "line", "points"]
    colour: Literal["train", "val"] = "train"

    @property
    def band(self) -> bool:
        return self.curve.binned and self.style != "points"

    @property
    def line(self) -> bool:
        return not (self.band and self.style == "raw")

    @property
    def marks(self) -> bool:
        alone = np.isfinite(self.curve.mean).sum() == 1  # a line needs two
        return bool(alone) or (self.style == "points" and len(self.curve.steps) <= MAX_MARKERS)


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its curves, and in words what they came to."""

    key: str
    title: str
    unit: str
    series: list[Series]
    caption: str
    best: tuple[float, float] | None = None  # step and value to be ringed

    @property
    def logarithmic(self) -> bool:
        """Whether a few values are so large that a linear scale would hide the others."""
        values = np.concatenate([series.curve.high for series in self.series])
        values = values[values > 0]  # NaN is not
        return len(values) > 2 and float(values.max()) > WIDE * float(np.median(values))

    def shown(self, values: np.ndarray) -> np.ndarray:
        """What its scale has a place for, NaN for the rest."""
        return np.where(values > 0, values, np.nan) if self.logarithmic else values


@dataclass(frozen=True)
class Progress:
    """How many tokens and seconds of training a number of steps stands for; None where that is not known."""

    tokens_per_step: int | None
    steps: np.ndarray  # steps done ...
    seconds: np.ndarray | None  # ... and the seconds after them

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Seconds of training when these steps were done."""
        assert self.seconds is not None
        return np.interp(steps, self.steps, self.seconds)


def curve(lines: Sequence[Record], key: str, factor: float = 1.0, max_points: int = MAX_POINTS) -> Curve | None:
    """The values of `key` times `factor`, by bins of equally many lines where there are more than `max_points`; None without any value."""
    values = np.array([np.nan if (value := line.get(key)) is None else value for line in lines], dtype=np.float64) * factor
    if not np.isfinite(values).any():
        return None
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    if len(values) <= max_points:
        return Curve(steps, values, values, values, binned=False)
    starts = np.linspace(0, len(values), max_points, endpoint=False).astype(np.int64)
    count = np.add.reduceat(np.isfinite(values).astype(np.float64), starts)
    total = np.add.reduceat(np.nan_to_num(values), starts)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    sizes = np.diff([*starts, len(values)])
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)  # these pass over NaN
    return Curve(np.add.reduceat(steps, starts) / sizes, mean, low, high, binned=True)


def progress(run: Run) -> Progress:
    """Tokens and time of a run by steps done."""
    per_step = run.plan.get("total_batch_size") or (run.train[-1].get("tokens") if run.train else None)
    known = [(line["step"] + 1, line["total_training_time_s"]) for line in run.train if line.get("total_training_time_s") is not None]
    if not known:
        return Progress(per_step, np.zeros(1), None)
    # A line is written when its step is done. Before the first one no time has passed; the clock of a resumed run goes on.
    first = [(run.train[0]["step"], 0.0)] if run.train[0]["step"] == 0 else []
    steps, seconds = np.array(first + known, dtype=np.float64).T
    return Progress(per_step, steps, np.maximum.accumulate(seconds))


def resumed_at(run: Run) -> list[int]:
    """The steps from which the run went on after an interruption."""
    return sorted({event.get("step") or 0 for event in run.events if event.get("name") == "resumed"})[:MAX_MARKERS]


def learned_panels(run: Run) -> list[Panel]:
    """Loss and bits per byte, as far as they were measured."""
    each, smooth, val = curve(run.train, "loss"), curve(run.train, "smooth_loss"), curve(run.val, "val_loss")
    series = [
        *([Series("range of the steps" if each.binned else "each step", each, "raw")] if each else []),
        *([Series("smoothed", smooth, "line")] if smooth else []),
        *([Series("validation", val, "points", "val")] if val else []),
    ]
    words = [f"last {label} {found.last}" for label, found in (("smoothed", smooth), ("validation", val)) if found]
    panels = [Panel("loss", "Loss", "nats per token", series, ", ".join(words) or f"last {series[0].curve.last}")] if series else []
    if bpb := curve(run.val, "val_bpb"):
        at = int(np.nanargmin(bpb.low))
        best = (float(bpb.steps[at]), float(bpb.low[at]))
        caption = f"last {bpb.last}, best {best[1]:.4g} at step {best[0]:,.0f}"
        panels.append(Panel("val_bpb", "Validation BPB", "bits per byte", [Series("validation", bpb, "points", "val")], caption, best))
    return panels


def course_panels(run: Run) -> list[Panel]:
    """What went on during the training, as far as it was measured."""
    panels = []
    for key, title, unit, factor in (
        ("lr", "Learning rate", "of the matrices", 1),
        ("grad_norm", "Gradient norm", "before clipping", 1),
        ("tok_per_sec", "Throughput", "tokens per second", 1),
        ("mfu", "MFU", "% of the peak", 100),
        ("data_wait_ms", "Wait for data", "ms a step", 1),
    ):
        if found := curve(run.train, key, factor):
            low, high = float(np.nanmin(found.low)), float(np.nanmax(found.high))
            caption = f"last {found.last}" + (f", from {figure(low)} to {figure(high)}" if low < high else "")
            panels.append(Panel(key, title, unit, [Series(title, found, "line")], caption))
    core = curve(core_points(run), "core_metric")
    if core and np.isfinite(core.mean).sum() > 1:  # one value is no curve: it stands in words in its own section
        panels.append(Panel("core", "CORE", "mean centered accuracy", [Series("CORE", core, "points", "val")], f"last {core.last}"))
    return panels


def figure(value: float) -> str:
    """A value in few characters: 0.005, 3.971, 17.2k."""
    return short(value) if abs(value) >= 9999.5 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
