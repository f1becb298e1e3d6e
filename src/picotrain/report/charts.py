"""Panels as SVG for a page, which a template writes: what stands here are places and texts. The page's CSS sets sizes and colours.

matplotlib finds the ticks and draws nothing: its SVG has colours, fonts and ids of its own, which would have to be cut out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from picotrain.report.curves import Panel, course_panels, learned_panels, progress, resumed_at
from picotrain.report.facts import Run
from picotrain.report.picture import tick_text, x_locator, y_locator

LARGE, SMALL = (580, 300), (380, 210)  # width and height, about the pixels of a chart on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 44
DURATIONS = (("days", 86_400, 4), ("hours", 3_600, 3), ("minutes", 60, 3), ("seconds", 1, 0))  # name, seconds, from how many on
Place = tuple[float, float]


@dataclass(frozen=True)
class Plot:
    """The curves over one thing. name: the class that the page shows or hides."""

    name: str
    curves: list[tuple[str, str, str]]  # class, colour, and path
    points: list[tuple[str, Place, str]]  # colour, place, and what is said where the pointer rests on it
    resumed: list[float]  # x of dotted lines
    ring: Place | None


@dataclass(frozen=True)
class Scale:
    name: str
    label: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """One panel: curves over steps with scales in steps and tokens, and over time; the page shows one of the three."""

    panel: Panel
    width: int
    height: int
    grid: list[tuple[float, str]]
    scales: list[Scale]
    plots: list[Plot]
    top: int = TOP

    @property
    def span(self) -> tuple[int, int, int]:
        """Left and right end of the x axis, and its y."""
        return LEFT, self.width - RIGHT, self.height - BOTTOM


@dataclass(frozen=True)
class Charts:
    """The charts of a page, and over what they can be shown."""

    learned: Sequence[Chart] = ()
    course: Sequence[Chart] = ()
    over: Sequence[str] = ()
    resumed: bool = False  # somewhere a dotted line says so


def draw_charts(run: Run) -> Charts:
    """Draw everything of `run` that was measured."""
    learned, course = learned_panels(run), course_panels(run)
    if not learned and not course:
        return Charts()
    done, resumed = progress(run), resumed_at(run)
    per_step, unit, seconds = done.tokens_per_step, "", 1
    if done.seconds is not None:
        unit, seconds, _ = next((long for long in DURATIONS if done.seconds[-1] >= long[1] * long[2]), DURATIONS[-1])

    def chart(panel: Panel, extent: tuple[int, int]) -> Chart:
        axes = Axes(panel, extent, resumed)
        by_step, low, high = axes.plot("by-step", lambda steps: steps)
        scales, plots = [axes.scale("scale-steps", "steps", low, high, integer=True)], [by_step]
        if per_step:
            scales.append(axes.scale("scale-tokens", "tokens", low * per_step, high * per_step))
        if unit:
            by_time, low, high = axes.plot("by-time", lambda steps: done.seconds_at(steps) / seconds)
            scales.append(axes.scale("by-time", f"{unit} of training", low, high))
            plots.append(by_time)
        return Chart(panel, *extent, axes.grid(), scales, plots)

    return Charts(
        [chart(panel, LARGE) for panel in learned],
        [chart(panel, SMALL) for panel in course],
        ["steps", *(["tokens"] if per_step else []), *(["time"] if unit else [])],
        bool(resumed),
    )


class Axes:
    """Where the values of a panel stand in a picture of this width and height."""

    def __init__(self, panel: Panel, extent: tuple[int, int], resumed: Sequence[int]):
        self._panel, self._resumed = panel, np.array(resumed, dtype=np.float64)
        self._width, self._height = extent
        values = panel.shown(np.concatenate([values for series in panel.series for values in (series.curve.low, series.curve.high)]))
        self._of = np.log10 if panel.logarithmic else np.asarray
        low, high = _widened(self._of(values))
        self._low, self._high = (10**low, 10**high) if panel.logarithmic else (low, high)

    def grid(self) -> list[tuple[float, str]]:
        """y and text of the ticks."""
        ticks = y_locator(self._panel.logarithmic).tick_values(self._low, self._high)
        return [(float(self._y(tick)), tick_text(tick)) for tick in ticks if self._low <= tick <= self._high]

    def scale(self, name: str, label: str, low: float, high: float, integer: bool = False) -> Scale:
        """The x axis from `low` to `high`."""
        ticks = np.asarray(x_locator(integer).tick_values(low, high))
        places = LEFT + (self._width - LEFT - RIGHT) * (ticks - low) / (high - low)
        return Scale(name, label, [(x, tick_text(tick)) for x, tick in zip(places, ticks, strict=True) if low <= tick <= high])

    def plot(self, name: str, x_of: Callable[[np.ndarray], np.ndarray]) -> tuple[Plot, float, float]:
        """All curves, and from where to where the x axis goes, in what `x_of` makes of steps."""
        panel = self._panel
        low, high = _widened(x_of(np.concatenate([*(series.curve.steps for series in panel.series), self._resumed])))

        def place(steps: np.ndarray) -> np.ndarray:
            return LEFT + (self._width - LEFT - RIGHT) * (x_of(steps) - low) / (high - low)

        curves, points = [], []
        for series in panel.series:
            found = series.curve
            x, y, top, bottom = place(found.steps), *(self._y(panel.shown(v)) for v in (found.mean, found.high, found.low))
            if series.band:
                around = [_path([*x[s], *x[s][::-1]], [*top[s], *bottom[s][::-1]]) for s in _known(top)]
                curves.append(("band", series.colour, " ".join(around)))
            if series.line:
                kind = "faint" if series.style == "raw" else "line"
                curves.append((kind, series.colour, " ".join(_path(x[s], y[s]) for s in _known(y))))
            if series.marks:
                tips = [f"step {step:,.0f}: {value:.4f} {panel.unit}" for step, value in zip(found.steps, found.mean, strict=True)]
                points += [(series.colour, (a, b), tip) for a, b, tip in zip(x, y, tips, strict=True) if np.isfinite(b)]
        ring = (float(place(np.array(panel.best[0]))), float(self._y(panel.best[1]))) if panel.best else None
        return Plot(name, curves, points, list(place(self._resumed)), ring), low, high

    def _y(self, values: np.ndarray | float) -> np.ndarray:
        low, high = self._of(self._low), self._of(self._high)
        return TOP + (self._height - TOP - BOTTOM) * (1 - (self._of(values) - low) / (high - low))


def _widened(values: np.ndarray) -> tuple[float, float]:
    """From where to where an axis goes that shows these values: a twentieth more on both sides."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = (high - low) / 20 or abs(high) / 20 or 1.0
    return low - margin, high + margin


def _known(values: np.ndarray) -> list[slice]:
    """The stretches without NaN."""
    return np.ma.clump_unmasked(np.ma.masked_invalid(values))


def _path(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
