"""report.html: a page of Markdown as one file that needs no network, no script and no other file, with charts for its pictures.

Markdown decides what is text and what is markup; HTML within it, links and pictures from elsewhere stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markupsafe import Markup

from picotrain.report.charts import Chart, Charts
from picotrain.report.content import number, percent, render
from picotrain.report.facts import Run
from picotrain.text import clock, printable, short

HALF = ("Throughput", "Model and batch", "Data and tokenizer", "Config")  # stand side by side where there is room
FOLD = re.compile(r"<details><summary>[\w.]+</summary>|</details>")  # the one HTML that a page of Markdown may hold
LONG = 40  # characters of a cell that is wrapped
Tile = tuple[str, str | None, str, str]  # name, value, what is said below it, and what stands there where there is no value


def render_page(run: Run, summary: Mapping[str, Any], charts: Charts) -> str:
    """The whole page with these charts; those of a run of which nothing was measured are `Charts()`."""
    kinds = {"learned": charts.learned, "course": charts.course}
    return fill(
        render(run, summary, {kind: kind for kind, found in kinds.items() if found}),
        title=summary["name"],
        status=summary["status"].replace("_", " "),
        badge=summary["status"],
        tiles=list(_tiles(summary)),
        footer="Written by picotrain from the files of the run directory. Each step, unbinned: metrics.jsonl.",
        charts=charts,
    )


def fill(markdown: str, title: str, status: str, badge: str, tiles: Sequence[Tile], footer: str, charts: Charts | None = None) -> str:
    """A page of this Markdown, of which what comes before the first section stands above the tiles.

    badge: the style sheet's class of the status.
    """
    charts = charts or Charts()
    env = {"learned": _figures(charts.learned, "large"), "course": _figures(charts.course, "small")}
    parser = _parser()
    tokens = parser.parse(markdown, env)[3:]  # the title has its own place
    top = next((i for i, token in enumerate(tokens) if token.type == "section_open"), len(tokens))
    head, rest = (Markup(parser.renderer.render(part, parser.options, env)) for part in (tokens[:top], tokens[top:]))
    values = {"title": title, "status": status, "badge": badge, "tiles": tiles, "footer": footer, "charts": charts}
    return _templates().get_template("page.html.j2").render(values, top=head, sections=rest)


def _figures(charts: Sequence[Chart], kind: str) -> str:
    if not charts:
        return ""
    inside = _templates().get_template("charts.html.j2").render(charts=charts, large=kind == "large")
    return f'<div class="charts {kind}">\n{inside}</div>'


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
    )
    found.filters["px"] = "{:.1f}".format
    return found


def _tiles(s: Mapping[str, Any]) -> Iterator[Tile]:
    """The headline figures."""
    best = f"best {s['best_val_bpb']:.4f} at step {s['best_val_step']:,}" if s["best_val_bpb"] is not None else ""
    loss = "smoothed" + (f"; validation {s['final_val_loss']:.4f}" if s["final_val_loss"] is not None else "")
    mfu = percent(s["median_mfu"])
    core = number(s["core_metric"])
    speed = short(s["median_tok_per_sec"]) if s["median_tok_per_sec"] is not None else None
    hardware = "tokens per second" + (f", {s['world_size'] or '?'} x {s['hardware_name']}" if s["hardware_name"] else "")
    time = clock(s["total_training_time_s"]) if s["total_training_time_s"] else None
    yield "Bits per byte", number(s["final_val_bpb"]), best, "not measured"
    yield "Training loss", number(s["smooth_train_loss"]), loss, "not measured"
    yield "CORE", core, f"at step {s['core_step']:,}" if core else "", "not evaluated"
    yield "Steps", f"{s['steps_done']:,}", f"of {s['num_steps']:,} planned" if s["num_steps"] else "", ""
    yield "Tokens", short(s["tokens"]), f"{s['epochs']:.2f} epochs" if s["epochs"] is not None else "", ""
    yield "Throughput", speed, hardware, "not measured"
    yield "MFU", mfu, "median" if mfu else "the peak of this hardware is not known", "not known"
    yield "Training time", time, "without evaluation and saving", "not known"


@cache
def _parser() -> MarkdownIt:
    found = MarkdownIt().enable("table").disable(["link", "autolink", "reference"])
    found.core.ruler.push("sections", _sections)
    found.core.ruler.push("tables", _tables)
    for name, rule in RULES.items():
        found.add_render_rule(name, rule)
    return found


def _sections(state: StateCore) -> None:
    """Each heading but the title begins a section, which ends before the next one of its level or above."""
    found: list[Token] = []
    levels: list[str] = []

    def close(level: str) -> None:
        while levels and levels[-1] >= level:
            levels.pop()
            found.append(Token("section_close", "section", -1, block=True))

    for i, token in enumerate(state.tokens):
        if token.children and token.children[0].type == "image":  # a figure stands in no paragraph
            state.tokens[i - 1].hidden = state.tokens[i + 1].hidden = True
        if token.type == "heading_open" and token.tag > "h1":
            close(token.tag)
            levels.append(token.tag)
            half = " half" if state.tokens[i + 1].content in HALF else ""
            found.append(Token("section_open", "section", 1, {"class": f"{token.tag}-section{half}"}, block=True))
        found.append(token)
    close("h2")
    state.tokens = found


def _tables(state: StateCore) -> None:
    """Classes for columns of numbers and for long texts, names as heads of their rows, and bars where figures are centered at 0."""
    tokens = state.tokens
    opened, heads, column = tokens[0], [""], 0
    bars: list[tuple[Token, float]] = []
    for i, token in enumerate(tokens):
        text = tokens[i + 1].content if token.type in ("th_open", "td_open") else ""
        number_class: dict[str, str | int | float] = {"class": "num"} if token.attrs.get("style") else {}
        if token.type == "table_open":
            opened, heads = token, []
        elif token.type == "th_open":
            heads.append(text)
            token.attrs = {"scope": "col", **number_class}
        elif token.type == "thead_close" and heads[1:] == ["value"]:
            opened.attrs = {"class": "facts"}
        elif token.type == "tr_open":
            column = -1
        elif token.type == "td_open":
            column += 1
            token.attrs = number_class or ({"class": "text"} if len(text) > LONG else {})
            if opened.attrs and not column:
                token.tag = tokens[i + 2].tag = "th"
                token.attrs = {"scope": "row"}
            elif heads[column] == "centered" and text:
                bars.append((token, min(1.0, max(-1.0, float(text)))))
    low = min([0.0, *(share for _, share in bars)])
    for token, share in bars:  # on a scale from the lowest of all, at most 0, to 1
        start, end = (100 * (value - low) / (1 - low) for value in sorted((0.0, share)))
        token.attrs = {"class": "num bar", "style": f"--from:{start:.1f}%;--to:{end:.1f}%;--c:var(--{'train' if share >= 0 else 'val'})"}


def _table_open(self: RendererHTML, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    """One that is too wide for its place is scrolled, with the keyboard as well."""
    return f'<div class="scroll" tabindex="0"><table{self.renderAttrs(tokens[i])}>'


def _table_close(self: RendererHTML, *of: Any) -> str:
    return "</table></div>\n"


def _fence(self: RendererHTML, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    return f'<pre class="{escape(tokens[i].info)}" tabindex="0">{escape(tokens[i].content)}</pre>\n'


def _html(self: RendererHTML, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    return tokens[i].content if FOLD.fullmatch(tokens[i].content.strip()) else escape(tokens[i].content)


def _image(self: RendererHTML, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    return env.get(tokens[i].attrs["src"], "")


RULES = {
    "table_open": _table_open,
    "table_close": _table_close,
    "fence": _fence,
    "html_block": _html,
    "html_inline": _html,
    "image": _image,
}
