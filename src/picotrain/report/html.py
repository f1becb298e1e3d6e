"""report.html: the facts of a run as one file that needs no network, no script and no other file. All text in it is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from picotrain.report.charts import Chart, Charts
from picotrain.report.content import Block, Bullets, Code, Columns, Facts, Note, Picture, Prose, Section, Table, number, sections
from picotrain.report.facts import Run
from picotrain.text import clock, printable, short

Summary = Mapping[str, Any]
# Should any text of a model or a config get past the escaping, the browser still runs and loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")
NUMERIC = re.compile(r"-?[\d,.]+( ?(%|s|ms|[kMGT]?B))?")
FOLDED = ("Environment",)  # long, and seldom looked at
HALF = ("Throughput", "Model and batch", "Data and tokenizer", "Config")  # stand side by side where there is room

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="picotrain">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{name}</h1> <span class="status {badge}">{status}</span>
{top}
<dl class="tiles">
{tiles}
</dl>
</header>
<main>
{choice}
{sections}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def render_page(run: Run, summary: Summary, charts: Charts) -> str:
    """The whole page with these charts; those of a run of which nothing was measured are `Charts()`."""
    return fill(
        title=f"{summary['name']}: {summary['status']}",
        name=summary["name"],
        status=summary["status"].replace("_", " "),
        badge=summary["status"],
        found=sections(run, summary),
        tiles=_tiles(summary),
        footer="Written by picotrain from the files of the run directory. Each step, unbinned: metrics.jsonl.",
        charts=charts,
    )


def fill(
    title: str, name: str, status: str, badge: str, found: Sequence[Section], tiles: Iterable[str], footer: str, charts: Charts
) -> str:
    """A page of these sections, of which the first stands above the tiles (see `tile`). Every text is escaped here.

    badge: the style sheet's class of the status.
    """
    top, *rest = found
    return PAGE.format(
        policy=POLICY,
        title=_text(title),
        style=STYLE.read_text(encoding="utf-8"),
        name=_text(name),
        status=_text(status),
        badge=_text(badge),
        top="\n".join(_block(block, charts) for block in top.blocks),
        tiles="\n".join(tiles),
        choice=_choice(charts),
        sections="\n".join(_section(section, charts) for section in rest),
        footer=_text(footer),
    )


def _text(value: Any) -> str:
    """A value as text in which HTML sees no markup, also within an attribute."""
    return escape(printable("" if value is None else str(value)), quote=True)


def _tiles(s: Summary) -> Iterator[str]:
    """The headline figures."""
    steps = f"of {s['num_steps']:,} planned" if s["num_steps"] else ""
    best = f"best {s['best_val_bpb']:.4f} at step {s['best_val_step']:,}" if s["best_val_bpb"] is not None else ""
    loss = "smoothed" + (f"; validation {s['final_val_loss']:.4f}" if s["final_val_loss"] is not None else "")
    mfu = f"{100 * s['median_mfu']:.1f} %" if s["median_mfu"] is not None else None
    core = f"{s['core_metric']:.4f}" if s["core_metric"] is not None else None
    speed = short(s["median_tok_per_sec"]) if s["median_tok_per_sec"] is not None else None
    hardware = "tokens per second" + (f", {s['world_size'] or '?'} x {s['hardware_name']}" if s["hardware_name"] else "")
    time = clock(s["total_training_time_s"]) if s["total_training_time_s"] else None
    yield tile("Bits per byte", number(s["final_val_bpb"]), best, "not measured")
    yield tile("Training loss", number(s["smooth_train_loss"]), loss, "not measured")
    yield tile("CORE", core, f"at step {s['core_step']:,}" if core else "", "not evaluated")
    yield tile("Steps", f"{s['steps_done']:,}", steps)
    yield tile("Tokens", short(s["tokens"]), f"{s['epochs']:.2f} epochs" if s["epochs"] is not None else "")
    yield tile("Throughput", speed, hardware, "not measured")
    yield tile("MFU", mfu, "median" if mfu else "the peak of this hardware is not known", "not known")
    yield tile("Training time", time, "without evaluation and saving", "not known")


def tile(name: str, value: str | None, more: str, without: str = "") -> str:
    """A headline figure; `without`: what stands there where there is none."""
    shown = f'<div class="value">{_text(value)}</div>' if value else f'<div class="value none">{_text(without)}</div>'
    return f'<div class="tile"><dt>{_text(name)}</dt><dd>{shown}<div class="more">{_text(more)}</div></dd></div>'


def _choice(charts: Charts) -> str:
    """What the curves can be drawn over, as radio buttons; the style sheet does the rest."""
    if not charts.learned and not charts.course:
        return ""
    names = ["steps", *(["tokens"] if charts.tokens else []), *(["time"] if charts.time else [])]
    if len(names) == 1:
        return ""
    buttons = [
        f'<input class="choice" type="radio" name="over" id="over-{name}" aria-label="curves over {name}"{" checked" * (name == "steps")}>'
        for name in names
    ]
    labels = [f'<label for="over-{name}">{name}</label>' for name in names]
    dotted = "<span>Dotted: the run was resumed there.</span>" if charts.resumed else ""
    return "\n".join([*buttons, f'<div class="over">Curves over {"".join(labels)}{dotted}</div>'])


def _section(section: Section, charts: Charts) -> str:
    blocks = "\n".join(text for block in section.blocks if (text := _block(block, charts)))
    if section.title in FOLDED:
        blocks = f"<details><summary>Show</summary>\n{blocks}\n</details>"
    half = ' class="half"' if section.title in HALF else ""
    return f"<section{half}>\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>" if blocks else ""


def _block(block: Block, charts: Charts) -> str:
    match block:
        case Prose():
            return f"<p><strong>{_text(block.lead)}</strong> {_text(block.text)}</p>" if block.lead else f"<p>{_text(block.text)}</p>"
        case Note():
            return f'<p class="note"><strong>Note:</strong> {_text(block.text)}</p>'
        case Bullets():
            return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in block.items)}</ul>"
        case Facts():
            rows = "\n".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in block.rows)
            return _scrolled(f'<table class="facts"><tbody>\n{rows}\n</tbody></table>')
        case Table():
            return _table(block)
        case Code(title=""):
            return f'<pre class="{_text(block.language)}" tabindex="0">{_text(block.text)}</pre>'
        case Code():
            return f'<details><summary>{_text(block.title)}</summary>\n<pre tabindex="0">{_text(block.text)}</pre>\n</details>'
        case Columns():
            texts = "".join(f"<div><h3>{_text(name)}</h3>{_block(Code(text, 'text'), charts)}</div>" for name, text in block.texts)
            return f'<div class="columns">{texts}</div>'
        case Picture():
            return _charts(charts.learned if block.kind == "learned" else charts.course if block.kind == "course" else ())


def _scrolled(table: str) -> str:
    """A table that is too wide for its place is scrolled, with the keyboard as well."""
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _table(table: Table) -> str:
    """Columns of numbers stand to the right; a column of bars, if there is one, comes second."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.head))]
    kinds = [_kind(column) for column in columns]
    head = [f'<th{kind} scope="col">{_text(name)}</th>' if name else "<td></td>" for name, kind in zip(table.head, kinds, strict=True)]
    lines = []
    for i, row in enumerate(table.rows):
        cells = [f"<td{kind}>{_text(value)}</td>" for value, kind in zip(row, kinds, strict=True)]
        if table.bars:
            cells.insert(1, f'<td class="bars">{_bar(table.bars[i], table.bars)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if table.bars:
        head.insert(1, '<td class="bars"></td>')
    body = "\n".join(lines)
    return _scrolled(f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>\n{body}\n</tbody></table>")


def _kind(column: Sequence[Any]) -> str:
    texts = ["" if value is None else str(value) for value in column]
    if any(texts) and all(NUMERIC.fullmatch(text) for text in texts if text):
        return ' class="num"'
    return ' class="text"' if max(map(len, texts), default=0) > 40 else ""


def _bar(share: float | None, shares: Sequence[float | None]) -> str:
    """A bar from 0 to `share`, on a scale from the lowest of all (at most 0) to 1."""
    if share is None:
        return ""
    low = max(-1.0, min(0.0, *(other for other in shares if other is not None), 0.0))
    zero, end = (100 * (min(1.0, max(low, value)) - low) / (1 - low) for value in (0.0, share))
    left, width = min(zero, end), abs(end - zero)
    mark = f'<b style="left:{zero:.1f}%"></b>' if low < 0 else ""
    below = ' class="below"' if share < 0 else ""
    return f'<div class="bar" aria-hidden="true"><i{below} style="left:{left:.1f}%;width:{width:.1f}%"></i>{mark}</div>'


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    kind = "large" if charts[0].large else "small"
    alone = ' class="alone"' if kind == "large" and len(charts) == 1 else ""
    return f'<div class="charts {kind}">\n' + "\n".join(_chart(chart, alone) for chart in charts) + "\n</div>"


def _chart(chart: Chart, alone: str) -> str:
    panel = chart.panel
    keys = [f'<li class="{s.style}" style="--c:var(--{s.colour})">{_text(s.label)}</li>' for s in panel.series]
    legend = f'<ul class="keys">{"".join(keys)}</ul>' if len(keys) > 1 else ""
    unit = panel.unit + (", logarithmic" if panel.logarithmic else "")
    words = f"<figcaption><strong>{_text(panel.title)}</strong> {_text(unit)}<div>{_text(panel.caption)}</div>{legend}</figcaption>"
    return f"<figure{alone}>{words}{chart.svg}</figure>"
