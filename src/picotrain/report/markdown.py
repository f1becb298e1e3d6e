"""report.md: the facts of a run as one readable page. Text from models, configs and files is fenced or escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from picotrain.report.content import Block, Bullets, Code, Columns, Facts, Note, Picture, Prose, Section, Table, sections
from picotrain.report.facts import Run
from picotrain.text import printable

Summary = Mapping[str, Any]
CAPTIONS = {
    "learned": "training loss and validation bits per byte over steps",
    "course": "learning rate, gradient norm, throughput and wait for data over steps",
    "core": "centered accuracy of each task of CORE",
}


def render(run: Run, summary: Summary, picture: str | None, others: Mapping[str, str] | None = None) -> str:
    """The whole page; `picture` is the file name of the loss curve, None where there is none; `others` those of the other pictures."""
    return write(summary["name"], sections(run, summary), {"learned": picture, **(others or {})})


def write(name: str, found: Iterable[Section], pictures: Mapping[str, str | None]) -> str:
    """A page of these sections, of which the one without a title stands below `name`; pictures: file names by their kind."""
    parts = []
    for section in found:
        blocks = [text for block in section.blocks if (text := _block(block, pictures))]
        if blocks:
            parts += [f"## {cell(section.title)}" if section.title else f"# {cell(name)}", *blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, pictures: Mapping[str, str | None]) -> str:
    match block:
        case Prose():
            return f"**{cell(block.lead)}** {cell(block.text)}" if block.lead else cell(block.text)
        case Note():
            return f"> **Note:** {cell(block.text)}"
        case Bullets():
            return "\n".join(f"* {cell(item)}" for item in block.items)
        case Facts() | Table():
            return _table(block.head, block.rows)
        case Code(title=""):
            return fence(block.text, block.language)
        case Code():
            return f"<details><summary>{cell(block.title)}</summary>\n\n{fence(block.text, block.language)}\n\n</details>"
        case Columns():
            return "\n\n".join(f"**{cell(name)}**\n\n{fence(text, 'text')}" for name, text in block.texts)
        case Picture():
            file = pictures.get(block.kind)
            return f"![{CAPTIONS[block.kind]}]({file})" if file else ""


def fence(text: str, language: str = "") -> str:
    """`text` as a code block that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{printable(text)}\n{ticks}"


def cell(value: Any) -> str:
    """A value as one line in which Markdown and HTML see no markup."""
    text = " ".join(printable("" if value is None else str(value)).split())
    return re.sub(r"[\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)  # max_steps may stay, __main__ would be bold


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
