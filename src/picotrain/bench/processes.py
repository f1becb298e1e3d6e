"""Benchmarks in processes of their own: none inherits another's memory, threads or compiled code, and one that fails costs no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from picotrain.errors import PicotrainError
from picotrain.ranks import LAUNCHER_PID


class BenchmarkFailed(PicotrainError):
    """A benchmark's process did not end well; its exit code, and as the message what it said."""

    def __init__(self, name: str, code: int, said: str):
        super().__init__(_why(f"the benchmark {Path(name).stem}", code, said))
        self.exit_code = code if code > 0 else 1  # below 0: by a signal


def lines(name: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a benchmark (a name, or a script's path) as they come; variables: of its environment, beside ours.

    Its process, and what that has started, are ended when the iterator is. Raises BenchmarkFailed.
    """
    command = [sys.executable, "-m", "picotrain.bench", name, *arguments]
    launcher = {LAUNCHER_PID: str(os.getpid())}  # it ends without us, too: a signal may come before it is known here
    environment = {**os.environ, **(variables or {}), **launcher}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, process_group=0, env=environment) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                yield json.loads(line)
            process.wait()
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGTERM)
        if process.returncode:
            said.seek(0)
            raise BenchmarkFailed(name, process.returncode, said.read())


def words(options: Mapping[str, Any]) -> list[str]:
    """Options of a benchmark as the words of a command line that give them back."""
    found: list[str] = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return found


def command(words: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """The command line `picotrain words...`, started; variables: of its environment, beside ours."""
    started = [sys.executable, "-m", "picotrain", *words]
    return subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | variables)


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for a `command`. Raises PicotrainError with what it said where it failed."""
    _, said = process.communicate()
    if process.returncode:
        raise PicotrainError(_why(f"`{' '.join(process.args[2:])}`", process.returncode, said))  # type: ignore[index]


def _why(what: str, code: int, said: str) -> str:
    """Why a process failed: the user's mistake, which already is one message, or all that it said."""
    mistake = code == PicotrainError.exit_code and said.startswith("error: ")
    return said.removeprefix("error: ").strip() if mistake else f"{what} ended with exit code {code}:\n{said}"
