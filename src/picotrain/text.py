"""Numbers, times and foreign text, put so that people can read them. No state, no dependencies."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import textwrap

# A model can emit any byte, so also an escape sequence that would repaint the terminal: control characters are shown as pictures. What
# turns the writing direction would show other text than is there (CVE-2021-42574).
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029), 0xFFFD)

# What ASCII has for our own signs, each as wide: lines, bars, and what typography prefers.
_PLAIN = str.maketrans("─━╌╸╺╶╴│┃▏▌▎▍▋▊▉█•×µ−–—…‘’“”", "-------||||||####*xu---.''\"\"")
_PLAIN |= {ord("±"): "+/-", ord("→"): "->"}
LEAST_ROOM = 20  # columns that are left to a text beside its label on a very narrow terminal
_HELP_LINE = re.compile(r"(?P<head> *\S+(?: \S+)*)(?:  +(?P<what>\S.*))?")  # what is described, and behind two blanks what is said of it
_EXAMPLE = re.compile(r" +(picotrain|torchrun|python) ")
ERRORS = "picotrain"  # the name of `_degraded` among the codecs' error handlers


def short(number: float) -> str:
    """At most five characters: 4,745 / 47.5k / 3.28M / 1.20B."""
    return f"{number:,.0f}" if abs(number) < 9999.5 else _scaled(number, ("", "k", "M", "B", "T", "P", "E", "Z"))


def flops(number: float) -> str:
    """Floating-point operations, to be followed by "s" or "/s": 37.7 MFLOP, 989 TFLOP."""
    return _scaled(number, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP"))


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 512 B, 45.6 MB."""
    return f"{n_bytes:.0f} B" if abs(n_bytes) < 999.5 else _scaled(n_bytes, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three significant digits in the largest of `units`, a factor of 1,000 apart, that leaves at least one before the point."""
    power = 0
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{_three(number)}{units[power]}"


def _three(number: float) -> str:
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}"


def several(count: int, noun: str) -> str:
    """A number of things: 1 shard, 1,200 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """A duration as a clock shows it: 0:07, 2:31, 1:02:31, 3d 04:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}:{m:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def duration(seconds: float) -> str:
    """A long time as one says it, to two digits or so: 40 s, 12 min, 6 h 10 min, 40 h, 5 days."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    hours, minutes = divmod(round(seconds / 600) * 10, 60)
    if hours < 10:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(seconds / 3600)} h" if seconds < 72 * 3600 else f"{round(seconds / 86400):,} days"


def brief(seconds: float) -> str:
    """A short duration in at most five characters: 312ms, 1.23s, 12.3s, 123s."""
    return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{_three(seconds)}s"


def printable(text: str) -> str:
    """`text` as a terminal may have it: every control character but newline and tab made visible (U+2400 and following), and no
    character that turns the writing direction. All foreign text goes through here before a person sees it."""
    return text.replace("\r\n", "\n").translate(_PICTURES)


def first_line(error: BaseException) -> str:
    """What an error says, in one line that a terminal can show; the name of its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return printable(next(filter(None, lines), type(error).__name__))[:200]


def as_typed(text: str) -> str:
    """An argument as it was typed: one that the locale's encoding could not read is read as UTF-8, if it is that."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # os.fsdecode has put characters in the place of bytes
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def encodable(text: str, encoding: str | None) -> str:
    """`text` with a plainer sign or "?" for each character that `encoding` lacks, so that printing it cannot fail."""
    return text.encode(encoding or "utf-8", errors=ERRORS).decode(encoding or "utf-8")


def columns() -> int:
    """Columns of the terminal that standard output is, for help; 80 where it is none."""
    return max(shutil.get_terminal_size().columns, 2 * LEAST_ROOM)


def fitted(text: str, columns: int) -> str:
    """A help text with each line of more than so many columns wrapped: a description under its beginning, a command so that it can
    be copied."""
    return "\n".join(part for line in text.split("\n") for part in ([line] if len(line) <= columns else _fitted(line, columns)))


def _fitted(line: str, columns: int) -> list[str]:
    found = _HELP_LINE.fullmatch(line.rstrip())
    if not found:
        return [line]
    head, what = found["head"], found["what"]
    indent = " " * (len(head) - len(head.lstrip()))
    if what is None:
        end, further = (" \\", "    ") if _EXAMPLE.match(head) else ("", "")
        parts = _fill(head.strip(), columns - len(indent + further + end))
        return [f"{indent}{further * bool(i)}{part}{end * (i < len(parts) - 1)}" for i, part in enumerate(parts)]
    start = found.start("what")
    if columns - start >= LEAST_ROOM:
        return [f"{' ' * start if i else line[:start]}{part}" for i, part in enumerate(_fill(what, columns - start))]
    return [*_fitted(head, columns), *(f"{indent}    {part}" for part in _fill(what, columns - len(indent) - 4))]


def _fill(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, max(columns, LEAST_ROOM), break_long_words=False, break_on_hyphens=False)


def _degraded(error: UnicodeError) -> tuple[str, int]:
    """An error handler: our own signs in ASCII, bytes of a path that are no text as \\xff, "?" for the rest."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_sign(character) for character in wrong), error.end


def _sign(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # os.fsdecode puts such a character in the place of a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    plain = character.translate(_PLAIN)
    return plain if plain.isascii() else "?"


codecs.register_error(ERRORS, _degraded)
