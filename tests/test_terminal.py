"""What a person reads: wrapped on a terminal, plain in a pipe, safe from foreign text, and never the reason for which something fails."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from conftest import lines

from picotrain import invocation
from picotrain.terminal import READER_GONE, Printer
from picotrain.text import encodable, printable

HOSTILE = ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\x9d0;t\x9c", "\u202eabc\u2066", "\x08\x7f"]
OBEYED = re.compile(r"\x1b\[2J|\x1b\]|[\x00-\x08\x0b\x0c\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COMMAND = [sys.executable, "-m", "picotrain"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def on_a_terminal(columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and what a terminal of so many columns got, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm"} | environment)
    os.close(theirs)
    got = b""
    try:
        while chunk := os.read(ours, 4096):
            got += chunk
    except OSError:  # Linux says so of a terminal that nobody has open any more
        pass
    os.close(ours)
    return process.wait(60), re.sub(r"\x1b\[[0-9;]*m", "", got.decode()).replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# -- lines


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_line_is_wrapped_between_words_under_where_it_began(columns: int, xterm: None) -> None:
    stream = Terminal()
    words = [f"word{i}" for i in range(60)]
    Printer(stream, columns).line("  label       ", " ".join(words))
    got = plain(stream.getvalue()).splitlines()
    assert got[0].startswith("  label       word0 ") and len(got) > 2
    assert all(len(line) <= columns for line in got)
    assert all(line.startswith(" " * 14) and line[14] != " " for line in got[1:])
    assert " ".join(got).replace("label", "").split() == words


def test_an_item_of_a_list_is_wrapped_under_itself_and_a_path_stays_whole(xterm: None) -> None:
    stream, path = Terminal(), "/a/very/long/path" * 6
    Printer(stream, 60).message(f"error: the config has 2 problems:\n  - one: {'word ' * 30}\n  - {path}")
    got = plain(stream.getvalue()).splitlines()
    assert got[1].startswith("  - one: word") and got[2].startswith("    word")
    assert any(path in line for line in got)


def test_a_command_that_is_wrapped_is_still_the_command(xterm: None) -> None:
    stream, text = Terminal(), "picotrain sample 'runs/a b/c' 'Once upon a time, in a land of words' train.max_steps=80"
    Printer(stream, 60).command("    sample    ", text)
    got = plain(stream.getvalue())
    assert len(got.splitlines()) > 1 and all(len(line) <= 60 for line in got.splitlines())
    typed = "printf '%s\\n' " + got.replace("sample", "", 1)  # without the label
    words = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == shlex.split(text)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_page_fits_its_terminal_and_no_cell_of_a_table_is_cut(columns: int, xterm: None) -> None:
    names = [f"library/folder/module_number_{i}.py" for i in range(3)]
    page = "# Title\n\n| source | documents | d2-pystdlib-753d8bba |\n|---|---|---|\n"
    page += "".join(f"| {name} | 12 | 1.2345 |\n" for name in names)
    stream = Terminal()
    Printer(stream, columns).page(page)
    got = plain(stream.getvalue()).splitlines()
    assert all(len(line) <= columns for line in got) and not any("…" in line for line in got)
    rows = "".join(line[1:].partition(" ")[0] for line in got)  # the first column
    assert all(name in rows for name in names)
    piped = io.StringIO()
    Printer(piped).page(page)
    assert piped.getvalue() == page


def test_lines_in_a_pipe_are_neither_padded_nor_broken() -> None:
    from rich.table import Table

    table = Table("one", "two", box=None, pad_edge=False)
    table.add_row("x", "y" * 300)
    table.add_row("z", "")
    stream = io.StringIO()
    out = Printer(stream)
    out.facts({"model": "fact " * 100, "empty": ""}, "title")
    out.table(table)
    got = stream.getvalue().splitlines()
    assert len(got) == 6 and not any(line != line.rstrip() for line in got)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_foreign_text_is_obeyed(hostile: str, xterm: None) -> None:
    assert not OBEYED.search(printable(hostile)) and "\r" not in printable(hostile)
    for stream in (Terminal(), io.StringIO()):
        out = Printer(stream, 80)
        out.line(hostile, hostile)
        out.message(hostile)
        out.facts({hostile: hostile}, hostile)
        out.command("x ", shlex.quote(hostile))
        assert not OBEYED.search(stream.getvalue()) and "\r" not in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_shown_plainer(encoding: str) -> None:
    got = encodable("━━ │ … 日 é \udcc3", encoding)
    assert got.startswith("-- | . ? ") and got.endswith("\\xc3")
    assert ("é" in got) == (encoding == "latin-1")


# -- commands


def test_a_mistake_is_told_in_the_width_of_the_terminal_and_shows_what_was_typed() -> None:
    code, got = on_a_terminal(60, "plan", "model=d5", "train.\x1b[2Jlen=3", "data.kind=\u202ex")
    assert code == 2 and not OBEYED.search(got)
    assert all(len(line) <= 60 for line in got.splitlines()), got
    assert "error: the config has 3 problems:" in got and "  - model=d5: no such choice" in got


def test_a_config_on_a_terminal_is_printable_and_in_ascii_the_same_config(tmp_path: Path) -> None:
    code, got = on_a_terminal(80, "config", "model=d2", "data=pystdlib", f"run.dir={tmp_path}/\u202eü")
    assert code == 0 and not OBEYED.search(got)
    options = {"capture_output": True, "timeout": 60, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    done = subprocess.run([*COMMAND, "config", "model=d2", "data=pystdlib", f"run.dir={tmp_path}/日ü"], **options)
    assert done.returncode == 0 and done.stdout.isascii()
    assert yaml.safe_load(done.stdout)["run"]["dir"] == f"{tmp_path}/日ü"


def test_errors_in_a_locale_without_the_path_s_characters_are_told(tmp_path: Path) -> None:
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["sample", f"{tmp_path}/naïve 日"], ["data", "inspect", f"{tmp_path}/naïve"], ["plan", "model=dé", "data=pystdlib"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60, env=env)
        assert done.returncode == 2 and b"error:" in done.stderr and b"Traceback" not in done.stderr
        assert done.stderr.isascii()


@pytest.mark.parametrize("arguments", [["--help"], ["config", "model=d2", "data=pystdlib"]])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode in (0, READER_GONE) and done.stderr == ""


def test_a_full_disk_below_the_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        arguments = [*COMMAND, "config", "model=d2", "data=pystdlib"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and "standard output cannot be written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("streams", ["gone", "closed"])
def test_a_training_outlasts_its_console(streams: str, tmp_path: Path, tiny) -> None:
    run_dir = tmp_path / "run"
    arguments = [*COMMAND, "train", *tiny(run_dir, "train.max_steps=3", "train.eval_every=0")]
    if streams == "closed":
        line = f"exec {shlex.join(arguments)} <&- >&- 2>&-"
        code = subprocess.run(["sh", "-c", line], timeout=120).returncode
    else:
        reader, writer = os.pipe()
        os.close(reader)
        code = subprocess.run(arguments, stdout=writer, stderr=writer, timeout=120).returncode
        os.close(writer)
    assert code == 0
    assert [record["step"] for record in lines(run_dir, "train")] == [0, 1, 2]
    assert (run_dir / "report.md").is_file()
    assert all(isinstance(record, dict) for record in lines(run_dir))  # nothing else was written into the file


# -- what to type next


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that was not activated: its script is not on the PATH, nor is its interpreter."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("picotrain", "python"):
        (tmp_path / ".venv" / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv(invocation.COMMAND, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    return tmp_path


def test_the_command_is_the_one_that_works_in_this_shell(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = here / ".venv" / "bin" / "picotrain"
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    assert invocation.command() == ".venv/bin/picotrain"
    monkeypatch.setenv("PATH", f"{script.parent}:/bin")
    assert invocation.command() == "picotrain"
    other = here / "other"
    other.mkdir()
    (other / "picotrain").write_text("#!/bin/sh\n")
    (other / "picotrain").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/bin")
    assert invocation.command() == ".venv/bin/picotrain"  # the one on the PATH is another one's
    monkeypatch.setattr(sys, "argv", [str(here / "src" / "picotrain" / "__main__.py"), "train"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "picotrain", "train"])
    assert invocation.command() == ".venv/bin/python -m picotrain"
    monkeypatch.setenv(invocation.COMMAND, "picotrain")  # a worker says what its launcher was started as
    assert invocation.command() == "picotrain"


def test_paths_are_short_and_quoted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invocation.typed(here / "runs" / "a b") == "'runs/a b'"
    assert invocation.typed(Path("/elsewhere/x")) == "/elsewhere/x"
    assert invocation.typed(here / "-x") == "./-x"


def test_a_run_of_torchrun_goes_on_by_torchrun(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(here / ".venv" / "bin" / "picotrain")])
    assert invocation.resume(here / "runs" / "a") == ".venv/bin/picotrain resume runs/a"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-u", "-m", "picotrain.worker", "runs/a"])
    assert invocation.resume(here / "runs" / "a") == (
        ".venv/bin/python -m torch.distributed.run --nproc_per_node=2 -m picotrain.worker runs/a"
    )


def test_a_desktop_opens_the_report_and_ssh_does_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "open" if sys.platform == "darwin" else "xdg-open"
    (here / program).write_text("#!/bin/sh\n")
    (here / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.setenv("DISPLAY", ":0")
    for key in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY"):
        monkeypatch.delenv(key, raising=False)
    assert invocation.opening(here / "report.html") == f"{program} report.html"
    monkeypatch.setenv("SSH_CONNECTION", "1")
    assert invocation.opening(here / "report.html") == ""


# -- other programs

IMPORTED = """
import logging, sys
from pathlib import Path
{setting}
from picotrain import run as runs, worker
from picotrain.config import compose
from picotrain.terminal import say
say("WARNING: mind the step")
config = runs.resolve(compose(sys.argv[2:]), say)
run_dir = Path(config.run.dir)
worker.run(run_dir, runs.open_run(config, [], say))
"""


@pytest.mark.parametrize(
    "setting", ["", "logging.basicConfig(filename=sys.argv[1], level='INFO', format='%(levelname)s %(name)s|%(message)s')"]
)
def test_a_program_that_imports_picotrain_gets_its_lines_from_logging(setting: str, tmp_path: Path, tiny) -> None:
    words = tiny(tmp_path / "run", "train.max_steps=2", "train.eval_every=0", f"run.cache_dir={tmp_path / 'cache'}")
    command = [sys.executable, "-c", IMPORTED.format(setting=setting), str(tmp_path / "log"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and len(lines(tmp_path / "run", "train")) == 2
    if not setting:
        assert done.stderr == "WARNING: mind the step\n"  # Python's own: warnings, plain
        return
    assert done.stderr == ""
    logged = (tmp_path / "log").read_text()
    assert "WARNING picotrain|WARNING: mind the step" in logged and "INFO picotrain|training a tokenizer" in logged
    assert "INFO picotrain.run|2/2  loss " in logged and "picotrain sample " in logged and "\x1b" not in logged
