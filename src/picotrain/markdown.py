"""Markdown that holds any text: cells, code blocks and tables. Every page and table that picotrain writes is made with these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from picotrain.text import printable

NUMBER = re.compile(r"[+-]?[\d,.]+( ?(%|s|ms|[kMGT]?B))?")
MAX_WIDTH = 100  # to which shorter cells of a column are padded


class Markdown(str):
    """Text that is Markdown already and is escaped no more."""


def cell(value: Any) -> Markdown:
    """A value as one line in which Markdown and HTML see no markup; nothing for None."""
    if isinstance(value, Markdown):
        return value
    text = " ".join(printable("" if value is None else str(value)).split())
    return Markdown(re.sub(r"[\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text))  # max_steps may stay, __main__ would be bold


def fence(text: str, language: str = "") -> Markdown:
    """`text` as a code block that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markdown(f"{ticks}{language}\n{printable(text)}\n{ticks}")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    """A table that also reads well as it is; nothing without a row. Columns of numbers stand to the right."""
    if not rows:
        return Markdown()
    right = [is_numeric([row[i] for row in rows]) for i in range(len(head))]
    lines = [[cell(value) for value in row] for row in (head, *rows)]
    widths = [max(3, *(width for line in lines if (width := len(line[i])) <= MAX_WIDTH)) for i in range(len(head))]
    padded = [[text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)] for line in lines]
    rule = ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]]))


def is_numeric(column: Sequence[Any]) -> bool:
    """Whether a column holds numbers, some with a unit, and nothing else."""
    texts = [str(value) for value in column if value not in (None, "")]
    return bool(texts) and all(NUMBER.fullmatch(text) for text in texts)
