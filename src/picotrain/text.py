"""Numbers, times and foreign text, put so that people can read them. No state, no dependencies."""

from __future__ import annotations

# A model can emit any byte, so also an escape sequence that would repaint the terminal: control characters are shown as pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


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
    """`text` with every control character but newline and tab made visible (U+2400 and following)."""
    return text.replace("\r\n", "\n").translate(_PICTURES)


def encodable(text: str, encoding: str | None) -> str:
    """`text` with "?" for each character that `encoding` lacks, so that printing it cannot fail."""
    return text.encode(encoding or "utf-8", errors="replace").decode(encoding or "utf-8")
