"""`picotrain bench`: a set of benchmarks, each in a process of its own; one table, or JSON."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from picotrain import bench as benchmarks
from picotrain import hardware
from picotrain import run as runs
from picotrain.bench.environment import environment
from picotrain.bench.processes import BenchmarkFailed, lines
from picotrain.bench.table import Row, rows
from picotrain.cli import say
from picotrain.config import compose
from picotrain.config.keys import nearest
from picotrain.disk import is_own_json, write_whole
from picotrain.errors import PicotrainError
from picotrain.hardware import Machine
from picotrain.planning import pace
from picotrain.terminal import Printer, is_terminal, rich_console
from picotrain.text import clock

INTERRUPTED = 130  # the shell's code for Ctrl-C
Task = tuple[str, list[str]]  # a benchmark and its options
GPU_STEP = ["--device", "cuda", "--seq-len", "2048", "--vocab", "32768", "--batch", "auto", "--steps", "20", "--warmup", "5"]


def bench(given: Sequence[str], full: bool, device: str, as_json: bool, out: Path | None) -> int:
    """Run the benchmarks named in `given`, whose options may follow a single name, or a set of them; the exit code.

    A benchmark that fails costs no other: the exit code is that of the first one that did.
    """
    names, own = split(given)
    if {"-h", "--help"} & {*own}:
        return benchmarks.script(names[0], ["--help"], prog=f"picotrain bench {names[0]}")
    machine = machine_for(device)
    chosen = full_set(machine) if full else quick_set(machine)
    tasks = [(name, [*options, *own]) for wanted in names or benchmarks.NAMES for name, options in chosen if name == wanted]
    where = environment(machine)
    record = Record(where, out, as_json)
    benchmarks.end_on_sigterm()
    codes = []
    try:
        for number, task in enumerate(tasks, 1):
            with progress(task, number, len(tasks)):
                codes.append(_measure(task, record))
    except KeyboardInterrupt:
        codes = [INTERRUPTED]
    if not as_json and any("said" not in line for line in record.results):
        show(where, record.results)
    return next((code for code in codes if code), 0)


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of benchmarks, and the options that follow a single one. Raises PicotrainError for names that are none."""
    first = next((index for index, word in enumerate(given) if word.startswith("-")), len(given))
    names, own = list(given[:first]), list(given[first:])
    if problems := [_unknown(name, own) for name in names if name not in benchmarks.NAMES]:
        raise PicotrainError("; ".join(problems))
    if own and len(names) != 1:
        raise PicotrainError(f"{own[0]} is no option of the set; those of one benchmark follow its name: `picotrain bench step --depth 6`")
    return names, own


def _unknown(name: str, own: list[str]) -> str:
    """What is wrong with a name, and what would be right."""
    if name in benchmarks.SCRIPTS:
        return f"{name} is measured by a script of a checkout: `{shlex.join(['python', f'benchmarks/{name}.py', *own])}`"
    meant = f"nearest: {', '.join(found)}; " if (found := nearest(name, (*benchmarks.NAMES, *benchmarks.SCRIPTS))) else ""
    return f"there is no benchmark {name!r} ({meant}all: {', '.join(benchmarks.NAMES)})"


def machine_for(device: str) -> Machine:
    """This machine as the benchmarks are to use it; auto: an NVIDIA GPU where there is one. Raises PicotrainError."""
    if device not in ("auto", "cpu", "cuda"):
        raise PicotrainError(f"--device {device}: benchmarks run on cpu or cuda; auto takes the GPU where there is one")
    found = hardware.detect()
    if device == "cuda" and found.device != "cuda":
        raise PicotrainError(f"--device cuda: no NVIDIA GPU was found here, this machine has {found.name}; --device cpu would be right")
    return found if found.device == "cuda" and device != "cpu" else hardware.cpu()


def quick_set(machine: Machine) -> list[Task]:
    """About two minutes on two cores."""
    depth = ["--depth", "12", *GPU_STEP] if machine.device == "cuda" else ["--depth", "4"]
    return [
        ("matmul", ["--device", machine.device]),
        ("step", [*depth, *best_mode(machine)]),
        ("loader", ["--seconds", "3"]),
        ("startup", ["--device", machine.device, "--modes", "help", "eager", "--repeats", "1"]),
    ]


def full_set(machine: Machine) -> list[Task]:
    """More settings of the same, with repeats."""
    best = [*best_mode(machine), "--repeats", "3"]
    if machine.device == "cuda":
        muon = ["--depth", "20", *GPU_STEP, "--optimizer", "muon", "--grad-accum", "4", *best]
        steps = [("step", ["--depth", "12", "20", *GPU_STEP, *best]), ("step", muon)]
    else:
        steps = [("step", []), ("step", ["--depth", "4", "6", *best])]
    return [
        ("matmul", ["--device", machine.device, "--repeats", "50"]),
        *steps,
        ("loader", []),
        ("startup", ["--device", machine.device]),
    ]


def best_mode(machine: Machine) -> list[str]:
    """How the training step is fastest there: bf16 where the device is fast at it, compiled where that can be done."""
    precision = ["--precision", "bf16"] if machine.fast_bf16 else []
    return [*precision, "--compile"] if machine.device == "cuda" or hardware.has_compiler() else precision


class Record:
    """The lines so far: on standard output as JSON lines, in a file as one object that is whole after every line."""

    def __init__(self, where: dict[str, Any], out: Path | None, as_json: bool):
        self.results: list[dict[str, Any]] = []
        self._where, self._out, self._as_json = where, out, as_json
        if out and not is_own_json(out, "environment", "results"):
            raise PicotrainError(f"{out} is there and holds no results of picotrain's, which alone may be written anew: name another file")
        self._say({"environment": where})

    def add(self, line: dict[str, Any]) -> None:
        self.results.append(line)
        self._say(line)

    def _say(self, line: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(line), flush=True)
        if not self._out:
            return
        try:
            write_whole(self._out, json.dumps({"environment": self._where, "results": self.results}, indent=1) + "\n")
        except OSError as error:
            raise PicotrainError(f"{self._out} cannot be written ({error.strerror}); name a file in a folder that is there") from error


def _measure(task: Task, record: Record) -> int:
    """Run one benchmark in a process of its own; its exit code. Of one that fails, what it said is shown and kept."""
    name, arguments = task
    try:
        for line in lines(name, arguments):
            record.add(line)
            if name == "step":
                _remember(line)
    except BenchmarkFailed as error:
        say(f"error: {error}")
        failure = {"not_measured": f"it ended with exit code {error.exit_code}", "said": str(error)}
        record.add({"benchmark": name, "arguments": arguments} | failure)
        return error.exit_code
    return 0


def _remember(line: dict[str, Any]) -> None:
    """Keep the figure in the cache folder, where `picotrain plan` finds it; without a folder it can write, say so."""
    cache = runs.cache_dir(compose([]))
    try:
        pace.remember(json.dumps(line), cache)
    except OSError as error:
        say(f"warning: {cache} cannot keep this figure for `picotrain plan` ({error.strerror}); set PICOTRAIN_CACHE to a folder that can")


@contextmanager
def progress(task: Task, number: int, count: int) -> Generator[None]:
    """What is being measured, on standard error: a spinner on a terminal, elsewhere a line when it is done."""
    drawn, started = is_terminal(sys.stderr), time.monotonic()
    text = f"{number} of {count}: {' '.join([task[0], *task[1]])}"
    columns = SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=rich_console(sys.stderr), transient=True, disable=not drawn) as bar:
        bar.add_task(text, total=None)
        yield
    if not drawn:
        say(f"{text}  {clock(time.monotonic() - started)}")


def show(where: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    hw, packages = where["hardware"], where["packages"]
    at = f" at {where['commit'][:9]}" if where["commit"] else ""
    machine = f"{hw['name']} ({hw['device']}), {hw['threads']} threads, torch {packages['torch']}, picotrain {where['picotrain']}{at}"
    out = Printer()
    out.line("", f"{machine}, {where['time'][:10]}", "bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in Row._fields:
        table.add_column(name, justify="right" if name == "figure" else "left", no_wrap=name in ("figure", "benchmark"))
    before = ""
    for line in results:
        for row in rows(line):
            table.add_row("" if row.benchmark == before else row.benchmark, *row[1:])
            before = row.benchmark
    out.table(table)
