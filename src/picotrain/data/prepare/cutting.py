"""Long running text, cut into pieces of an even size at good places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

CUT_ABOVE, CUT_NEAR = 256 << 10, 64 << 10  # characters


def cut_plain_text(text: str | Iterable[str]) -> Iterator[str]:
    """Pieces of about 64 K characters, cut after a blank line where there is one, else after a line, else after a word.

    Joined they are the text again, which may come in chunks. Up to 256 K characters a text stays whole.
    """
    held, limit = "", CUT_ABOVE
    for chunk in [text] if isinstance(text, str) else text:
        held += chunk
        start = 0
        while len(held) - start > CUT_ABOVE:
            limit, end = CUT_NEAR * 3 // 2, _cut_at(held, start)
            yield held[start:end]
            start = end
        held = held[start:]
    while len(held) > limit:
        end = _cut_at(held, 0)
        yield held[:end]
        held = held[end:]
    if held or limit == CUT_ABOVE:
        yield held


def _cut_at(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: after the last good place in the second half of 64 K characters."""
    low, high = start + CUT_NEAR // 2, start + CUT_NEAR
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        if (found := text.rfind(mark, low, high)) >= 0:
            return found + len(mark)
    return high
