"""Standard output and standard error as they are: a terminal of some width, a pipe whose reader may leave, a stream that is closed or
knows ASCII only. Lines for people are written here; rich is imported where there is something to draw.

What a program that imports picotrain may want elsewhere goes through Python's `logging`: notes, warnings and errors to the logger
"picotrain", the lines of a run to "picotrain.run". Commands and workers print both (`print_log`), other programs choose."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from picotrain.text import ERRORS, LEAST_ROOM, encodable, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

READER_GONE = 141  # exit code of a command whose reader has left, as of a program that SIGPIPE ends
LABEL_WIDTH = 18  # columns of the labels beside facts
CALM = {f"bar.{part}": "cyan" for part in ("complete", "finished", "pulse")}  # rich's own red looks like an alarm
_HEAD = re.compile(r" *(?:- |(?:error|note|warning|WARNING|picotrain): )?")  # what the lines that follow are indented by

_log = logging.getLogger("picotrain")
_lasting = {2}  # streams that nobody has to read


class _Stream(io.FileIO):
    """A standard stream. Once it cannot be written, what is written goes nowhere; and unless the process is to outlast its reader
    (`keep_going`), it ends."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() in _lasting:
                return len(data)
            if error.errno in (errno.EPIPE, errno.EIO):  # the reader or the terminal is gone
                raise SystemExit(READER_GONE) from None
            say(f"error: standard output cannot be written: {error.strerror}")
            raise SystemExit(1) from None


def set_up() -> None:
    """Make this process' standard streams safe to print to, whoever reads them in whatever encoding; first of all a command calls this.

    A closed one leads nowhere, and its number is taken: no file that is opened later gets it. Characters that an encoding lacks are
    shown as plainer ones (`picotrain.text.encodable`). A command whose reader has left ends quietly with READER_GONE. What is logged is
    printed from here on.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: opening takes the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    _lasting.discard(1)
    sys.stdout = _safe(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _safe(sys.stderr, sys.__stderr__, 2)
    print_log()


def _safe(stream: TextIO | None, original: TextIO | None, fd: int) -> TextIO:
    if stream is None:  # it was closed when Python started
        return io.TextIOWrapper(io.BufferedWriter(_Stream(fd, "wb", closefd=False)), "utf-8", ERRORS, line_buffering=True)
    if stream is original and isinstance(stream, io.TextIOWrapper):
        raw = _Stream(fd, "wb", closefd=False)
        buffer = raw if stream.write_through else io.BufferedWriter(raw)  # write_through: python -u
        options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        return io.TextIOWrapper(buffer, stream.encoding, ERRORS, **options)  # pyright: ignore[reportArgumentType]
    if isinstance(stream, io.TextIOWrapper):  # somebody's own
        stream.reconfigure(errors=ERRORS)
    return stream


def keep_going() -> None:
    """From here on nobody has to read standard output: a training must not end because a console is gone."""
    _lasting.add(1)


def flush() -> None:
    """Write what is still held back. A command that has come so far keeps its exit code where its reader has left."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except SystemExit as ended:
        if ended.code != READER_GONE:
            raise


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can be drawn on; a dumb one counts as a pipe."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def rich_console(stream: TextIO, width: int | None = None) -> Console:
    """rich's console for a stream, with our colours."""
    from rich.console import Console
    from rich.theme import Theme

    return Console(file=stream, width=width, highlight=False, markup=False, force_jupyter=False, theme=Theme(CALM))


def say(message: str) -> None:
    """Log progress, a note or an error. Printed, it goes to standard error: standard output belongs to results. It never fails and never
    ends a process."""
    _log.log(_level(message), message)


def tell(message: str, draw: Callable[[], object]) -> None:
    """Log a line of a run. Where picotrain's log is printed, `draw` does that, in its own style."""
    _log.getChild("run").log(_level(message), message, extra={"draw": draw})


def plain(draw: Callable[[TextIO], object]) -> str:
    """What is drawn on a stream that is no terminal."""
    draw(stream := io.StringIO())
    return stream.getvalue().rstrip("\n")


def _level(message: str) -> int:
    """By how a message begins."""
    if message.startswith(("error:", "Traceback ")):
        return logging.ERROR
    return logging.WARNING if message.lower().startswith("warning:") else logging.INFO


class _Printing(logging.Handler):
    """Prints records as lines for people. It is none of rich's: that one would write above a progress bar on another stream than the bar's
    into it, and wrap lines in the middle of a path, where no terminal is, too."""

    def emit(self, record: logging.LogRecord) -> None:
        draw = getattr(record, "draw", None)
        draw() if draw else _print(record.getMessage())


def print_log() -> None:
    """Print what picotrain logs, once, from here on."""
    if not is_printed():
        _log.addHandler(_Printing())
        _log.setLevel(logging.INFO)
        _log.propagate = False


def is_printed() -> bool:
    """Whether this process prints what picotrain logs."""
    return any(isinstance(handler, _Printing) for handler in _log.handlers)


def _print(message: str) -> None:
    stream = sys.stderr
    if stream is None:
        return
    with suppress(OSError, ValueError):
        text = printable(message)
        if is_terminal(stream):
            columns = rich_console(stream).width
            text = "\n".join(_hanging(_text(head), _text(body), columns).plain for head, body in _parts(text))
        stream.write(encodable(text, stream.encoding) + "\n")  # not by rich: above a progress bar it would write into the bar
        stream.flush()


class Printer:
    """Lines for people on one stream. On a terminal they are styled and wrapped at its width, what goes on standing under what began;
    elsewhere they are plain, unbroken and without trailing blanks. Text may be foreign."""

    def __init__(self, stream: TextIO | None = None, width: int | None = None):
        self.stream: TextIO = sys.stdout if stream is None else stream
        self.rich = rich_console(self.stream, width) if is_terminal(self.stream) else None

    def line(self, head: str | Text, body: str | Text = "", style: str = "") -> None:
        """A line: `head`, and beside it `body`, whose own lines and wrapped ones stand under its beginning."""
        head, body = _text(head, style), _text(body, style)
        if self.rich is None:
            plain = head.plain + body.plain.replace("\n", "\n" + " " * head.cell_len)
            self._write("\n".join(line.rstrip() for line in plain.split("\n")) + "\n")
            return
        whole = _hanging(head, body, self.rich.width)
        whole.plain = encodable(whole.plain, self.rich.encoding)
        self.rich.print(whole, soft_wrap=True)

    def message(self, message: str, style: str = "") -> None:
        """A text of several lines, each wrapped under its own beginning: an error's, or an item's of a list."""
        for head, body in _parts(printable(message)):
            self.line(head, body, style)

    def command(self, head: str | Text, command: str) -> None:
        """A line with a shell command. Where it is wrapped, it still works as it is copied."""
        head = _text(head)
        room = max(self.rich.width - head.cell_len, LEAST_ROOM) - 2 if self.rich else sys.maxsize
        lines = [""]
        for word in map(shlex.quote, shlex.split(command)):
            if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
                lines.append("")
            lines[-1] += f" {word}" if lines[-1] else word
        text = (" \\\n" + " " * head.cell_len).join(lines)
        if self.rich:
            text = encodable(printable(text), self.rich.encoding)
            self.rich.print(type(head).assemble(head, text), soft_wrap=True)
        else:
            self._write(f"{head.plain}{printable(text)}\n")

    def facts(self, rows: Mapping[str, str], title: str = "") -> None:
        """A title, and a line for each label and its fact."""
        if title:
            self.line("", title, "bold")
        for label, fact in rows.items():
            self.line(_text(f"{label:<{LABEL_WIDTH}} ", "dim"), fact)

    def table(self, table: Table, title: str = "") -> None:
        """A table, as wide as it has to be where there is no terminal."""
        if title:
            self.line("", title, "bold")
        if self.rich is not None:
            self.rich.print(table)
            return
        from rich.console import Console

        drawn = io.StringIO()
        Console(file=drawn, width=10_000, force_terminal=False, color_system=None, legacy_windows=False).print(table)
        self._write("".join(line.rstrip() + "\n" for line in drawn.getvalue().splitlines()))

    def page(self, markdown: str) -> None:
        """A page of Markdown: laid out on a terminal, elsewhere as it is."""
        if self.rich is None:
            return self._write(markdown)
        from rich.markdown import Markdown, TableElement

        class Whole(TableElement):
            """A table whose long words go on in the next line; rich would cut them, so that rows look alike."""

            def __rich_console__(self, console: Any, options: Any) -> Any:
                for table in super().__rich_console__(console, options):
                    for column in getattr(table, "columns", ()):
                        column.overflow = "fold"
                    yield table

        class Page(Markdown):
            elements = {**Markdown.elements, "table_open": Whole}  # noqa: RUF012  (rich's own, which it only reads)

        self.rich.print(Page(encodable(markdown, self.rich.encoding)))

    def _write(self, plain: str) -> None:
        self.stream.write(encodable(plain, self.stream.encoding))
        self.stream.flush()


def _text(text: str | Text, style: str = "") -> Text:
    """`text` for rich, with nothing in it that a terminal would obey."""
    from rich.text import Text

    if isinstance(text, str):
        return Text(printable(text), style)
    text = text.copy()
    text.plain = printable(text.plain)
    return text


def _parts(message: str) -> Iterator[tuple[str, str]]:
    """Each line of a message as what its wrapped lines are indented by, and the rest."""
    for line in message.split("\n"):
        found = _HEAD.match(line)
        end = found.end() if found else 0
        yield line[:end], line[end:]


def _hanging(head: Text, body: Text, columns: int) -> Text:
    """`head` and `body` in lines of at most so many columns, those of `body` one below the other."""
    room = max(columns - head.cell_len, LEAST_ROOM)
    lines = [part for line in body.split("\n", allow_blank=True) for part in _wrapped(line, room)]
    return type(body).assemble(head, _text("\n" + " " * head.cell_len).join(lines))


def _wrapped(line: Text, columns: int) -> Iterator[Text]:
    """A line in parts of at most so many columns. A word is never cut: a longer one, such as a path, stays whole to be copied."""
    from rich.cells import cell_len

    line.expand_tabs(8)
    offsets, used = [], 0
    for word in re.finditer(r"(?:^\s+)?\S+\s*", line.plain):
        if used and used + cell_len(word.group().rstrip()) > columns:
            offsets.append(word.start())
            used = 0
        used += cell_len(word.group())
    for part in line.divide(offsets):
        part.rstrip()
        yield part
