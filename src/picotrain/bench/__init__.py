"""Benchmarks of this machine, run by `picotrain bench` as a set, or one by one. What holds picotrain against others, and what takes
long, are scripts of the same kind in a checkout's benchmarks/.

A benchmark is a module of this package named in NAMES, or a script, with

    __doc__              what it measures and what its figures mean: the help of its script
    arguments(parser)    its options, for its script and for `picotrain bench NAME` alike
    run(options)         an iterator of one dict per setting, each to be printed as one JSON line

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol, cast

from picotrain import hardware, ranks, terminal
from picotrain.errors import PicotrainError
from picotrain.text import columns, fitted

NAMES = ("matmul", "step", "loader", "startup")
SCRIPTS = ("busy", "checkpoint", "core", "corpus", "memory", "peers", "sampling", "time_to_bpb", "variants")  # each benchmarks/NAME.py


class Benchmark(Protocol):
    """What a module of a benchmark holds."""

    __doc__: str | None

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, options: argparse.Namespace) -> Iterator[dict[str, Any]]: ...


def load(name: str) -> Benchmark:
    """The benchmark of that name, or of a script's path; brings what it measures, torch for most."""
    if name in NAMES:
        return cast(Benchmark, importlib.import_module(f"picotrain.bench.{name}"))
    folder, file = os.path.split(os.path.abspath(name))
    module = f"benchmarks.{file.removesuffix('.py')}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, name)
        assert spec and spec.loader
        sys.modules[module] = importlib.util.module_from_spec(spec)
        sys.path.append(folder)  # its neighbours, which Python itself finds only for a script that it starts
        spec.loader.exec_module(sys.modules[module])
    return cast(Benchmark, sys.modules[module])


class _Parser(argparse.ArgumentParser):
    """One message for a user's mistake, without all of the options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(PicotrainError.exit_code, f"error: {message}; `{self.prog} --help` lists what there is\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description in the columns that there are: its paragraphs filled anew, its examples line by line."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, width=columns() - 2, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n{2,}", text.strip())
        return "\n\n".join(fitted(one, width) if one[:1] == " " else textwrap.fill(" ".join(one.split()), width) for one in paragraphs)


def parser(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a benchmark's options."""
    benchmark = load(name)
    about = benchmark.__doc__ or ""
    if prog:
        about = about.replace(f"python benchmarks/{name}.py", prog)
    found = _Parser(prog=prog, usage="%(prog)s [options]", description=about, formatter_class=_Help)
    benchmark.arguments(found)
    return found


def script(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a benchmark (NAMES, or a script's path) in this process and print a JSON line per setting; the exit code.

    arguments: None for those of the command line.
    """
    hardware.wait_briefly()
    terminal.print_log()
    end_on_sigterm()
    ranks.settle()
    options = parser(name, prog).parse_args(arguments)
    try:
        for line in load(name).run(options):
            print(json.dumps(line), flush=True)
    except PicotrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def end_on_sigterm() -> None:
    """Make SIGTERM unwind this process like an exit, so that it ends the processes it has started."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
