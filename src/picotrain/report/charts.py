"""Panels as SVG for a page. matplotlib draws the curves; scales are written here, so that the page's CSS sets their size and colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from picotrain.report.curves import Panel, Progress, course_panels, learned_panels, progress, resumed_at
from picotrain.report.facts import Run
from picotrain.report.picture import COLOURS, draw_panel, tick_text, x_locator, y_locator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGE, SMALL = (580, 300), (380, 210)  # width and height, about the pixels of a chart on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 44
DURATIONS = (("days", 86_400, 4), ("hours", 3_600, 3), ("minutes", 60, 3), ("seconds", 1, 0))  # name, seconds, from how many on


@dataclass(frozen=True)
class Chart:
    """One panel as an SVG element: curves over steps with scales in steps and tokens, and over time; the page shows one of the three."""

    panel: Panel
    large: bool
    svg: str


@dataclass(frozen=True)
class Charts:
    """The charts of a page, and over what they can be shown besides steps."""

    learned: Sequence[Chart] = ()
    course: Sequence[Chart] = ()
    tokens: bool = False
    time: bool = False
    resumed: bool = False  # somewhere a dotted line says so


def draw_charts(run: Run) -> Charts:
    """Draw everything of `run` that was measured."""
    learned, course = learned_panels(run), course_panels(run)
    if not learned and not course:
        return Charts()
    done, resumed = progress(run), resumed_at(run)
    return Charts(
        [Chart(panel, True, _svg(panel, done, resumed, LARGE)) for panel in learned],
        [Chart(panel, False, _svg(panel, done, resumed, SMALL)) for panel in course],
        tokens=bool(done.tokens_per_step),
        time=done.seconds is not None,
        resumed=bool(resumed),
    )


def _svg(panel: Panel, done: Progress, resumed: Sequence[int], extent: tuple[int, int]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    width, height = extent
    picture = Figure(figsize=(width / 72, height / 72), dpi=72)
    picture.patch.set_visible(False)
    place = (LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (BOTTOM + TOP) / height)

    def curves(name: str, x_of: Callable[[np.ndarray], np.ndarray]) -> Axes:
        ax = picture.add_axes(place, label=name)
        ax.set_axis_off()
        ax.set_gid(name)
        draw_panel(ax, panel, resumed, x_of)
        return ax

    by_step = curves("by-step", np.asarray)
    scales = [_scale(by_step, "scale-steps", "steps", height, integer=True)]
    if done.tokens_per_step:
        scales.append(_scale(by_step, "scale-tokens", "tokens", height, factor=done.tokens_per_step))
    if done.seconds is not None:
        unit, seconds, _ = next(duration for duration in DURATIONS if done.seconds[-1] >= duration[1] * duration[2])
        by_time = curves("by-time", lambda steps: done.seconds_at(steps) / seconds)
        scales.append(_scale(by_time, "by-time", f"{unit} of training", height))
    out = io.StringIO()
    with rc_context({"svg.hashsalt": panel.key}):
        picture.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    grid = "\n".join(_grid(by_step, extent))
    label = escape(f"{panel.title} ({panel.unit}): {panel.caption}")
    inside = "\n".join([grid, *scales, _for_page(out.getvalue(), panel)])
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n{inside}</svg>'


def _grid(ax: Axes, extent: tuple[int, int]) -> Iterator[str]:
    """The y scale: a line and a figure for each tick, and the line at the bottom."""
    width, height = extent
    low, high = ax.get_ylim()
    for tick in y_locator(ax.get_yscale() == "log").tick_values(low, high):
        if low <= tick <= high:
            y = height - ax.transData.transform((ax.get_xlim()[0], tick))[1]
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>'
            yield f'<text class="y" x="{LEFT - 6}" y="{y:.1f}" dy="0.35em">{escape(tick_text(tick))}</text>'
    yield f'<path class="axis" d="M{LEFT} {height - BOTTOM}H{width - RIGHT}"/>'


def _scale(ax: Axes, name: str, label: str, height: int, factor: float = 1, integer: bool = False) -> str:
    """An x scale, in what `ax` shows times `factor`."""
    low, high = ax.get_xlim()
    parts = []
    for tick in x_locator(integer).tick_values(low * factor, high * factor):
        if low <= tick / factor <= high:
            x = ax.transData.transform((tick / factor, ax.get_ylim()[0]))[0]
            parts.append(f'<path class="axis" d="M{x:.1f} {height - BOTTOM}v4"/>')
            parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 5}" dy="0.95em">{escape(tick_text(tick))}</text>')
    middle = (ax.bbox.x0 + ax.bbox.x1) / 2
    return f'<g class="{name}">{"".join(parts)}<text x="{middle:.1f}" y="{height - 6}">{escape(label)}</text></g>'


def _for_page(svg: str, panel: Panel) -> str:
    """What matplotlib drew, as a part of an HTML page."""
    body = svg[svg.index("<svg") : svg.rindex("</svg>")]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->|\n\s*", " ", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    # Coordinates to a tenth of a pixel: a third of the size.
    body = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), body)
    for colour, value in COLOURS.items():
        body = body.replace(value, f"var(--{colour})")
    body = _with_tips(body, panel.tips)
    body = re.sub(r'id="(by-\w+|points)"', r'class="\1"', body)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.key}-", body)  # no two elements of a page may have one name


def _with_tips(body: str, tips: Sequence[str]) -> str:
    """Each marker of the measured points with its figures, to be seen where the pointer rests on it."""

    def marked(group: re.Match[str]) -> str:
        if len(tips) != group[0].count("<use"):
            return group[0]
        words = iter(tips)
        return re.sub(r"(<use[^>]*?)/>", lambda use: f"{use[1]}><title>{escape(next(words))}</title></use>", group[0])

    return re.sub(r'<g id="points">.*?</g>\s*</g>', marked, body)
