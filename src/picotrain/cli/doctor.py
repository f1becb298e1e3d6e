"""`picotrain doctor`: everything that could end a run early, tried beforehand; says what to fix."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.text import Text

from picotrain import hardware, planning
from picotrain import run as runs
from picotrain.cli import announced, rehearsal
from picotrain.cli.commands import resolved
from picotrain.config import Config, places
from picotrain.errors import CheckpointError, ConfigError, PicotrainError, Problem, UsageError
from picotrain.terminal import Printer
from picotrain.text import several, size

T = TypeVar("T")
CHECKPOINTS_KEPT = 3  # how many checkpoints the disk check wants room for


class _Checks:
    """Prints a line a check and remembers whether any failed."""

    def __init__(self) -> None:
        self.out = Printer()
        self.failed = 0

    def check(self, name: str, probe: Callable[[], tuple[str, T]]) -> T | None:
        """Run one probe: its line in green with what it found, or in red with what to fix. A bug keeps its traceback."""
        try:
            found, value = probe()
        except PicotrainError as error:
            self.failed += 1
            self.out.line(Text.assemble(("FAIL", "red"), f"  {name:<15}"), str(error))
            return None
        self.out.line(Text.assemble(("ok", "green"), f"    {name:<15}"), found)
        return value


def run(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> int:
    """Check a run directory's checkpoints, or a config on this machine; 0 when all is well, else 2."""
    if len(overrides) == 1 and "=" not in overrides[0]:
        if wrong := places.flaw(overrides[0], "local"):
            raise UsageError([Problem("RUN", *wrong)])
        return _check_run(Path(overrides[0]))
    checks = _Checks()
    config = resolved(overrides, config_file, config_dir)
    if config_file:
        announced.of_config(config, overrides, str(config_file))
    _say_load(config, checks.out)  # before this process computes
    checks.check("device", lambda: _device(config))
    checks.check(
        "precision", lambda: (f"{config.train.precision}, blocks {'compiled' if config.hardware.compile else 'not compiled'}", None)
    )
    plan = checks.check("plan", lambda: _plan(config))
    if plan:
        checks.check("disk", lambda: _disk(Path(config.run.dir or ""), plan.checkpoint_bytes))
    if config.archive.url:
        checks.check("archive", lambda: _archive(config))
    material = checks.check("data", lambda: _data(config, checks.out))
    if material:
        encoder = material.tokenizer.encoder
        checks.check(
            "tokenizer", lambda: (f"{material.tokenizer.vocab_size:,} tokens, encoded by {encoder}, ids equal on the sample", None)
        )
        for note in material.plan.notes:
            checks.out.line("note  ", note, "yellow")
        checks.check("two steps", lambda: rehearsal.two_steps(material))
    return 2 if checks.failed else 0


def _device(config: Config) -> tuple[str, None]:
    runs.check_machine(config)
    hw = config.hardware
    memory = f", {size(hw.memory_bytes)}" if hw.memory_bytes else ""
    waiting = f", waiting by {waits}" if (waits := hardware.waiting()) else ""
    return f"{hw.nproc_per_node} x {hw.name} ({hw.device}){memory}, {hw.threads} threads a process{waiting}", None


def _say_load(config: Config, out: Printer) -> None:
    """Whether other processes want the cores that a run would have."""
    ranks = int(config.hardware.nproc_per_node)
    if others := hardware.others_compute(ranks * (config.hardware.threads or 1) if config.hardware.device == "cpu" else ranks):
        text = f"other processes compute ({others}): steps take longer while they do, and so do those below"
        out.line("note  ", text, "yellow")


def _plan(config: Config) -> tuple[str, planning.Plan]:
    plan = runs.preview(config)
    return f"{several(plan.num_steps, 'step')} of {plan.total_batch_size:,} tokens, about {size(plan.predicted_memory_bytes)} a rank", plan


def _disk(run_dir: Path, checkpoint_bytes: int) -> tuple[str, None]:
    place = next(p for p in (run_dir, *run_dir.parents) if p.is_dir())
    free, wanted = shutil.disk_usage(place).free, CHECKPOINTS_KEPT * checkpoint_bytes
    if free < wanted:
        raise CheckpointError(
            f"{place} has {size(free)} free, {CHECKPOINTS_KEPT} checkpoints take {size(wanted)}; free some, or name another run.dir"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written ({error.strerror}); name another run.dir") from error
    return f"{size(free)} free, a checkpoint takes {size(checkpoint_bytes)}", None


def _archive(config: Config) -> tuple[str, None]:
    from picotrain.checkpoint import archive

    if problems := places.missing_packages({"archive": {"url": config.archive.url}}):
        raise ConfigError(problems)
    return archive.probe(config.archive.url or "", Path(config.run.dir or "")), None


def _data(config: Config, out: Printer) -> tuple[str, runs.Material]:
    material = runs.gather(config, lambda message: out.line(" " * 6, message, "dim"))
    corpus = material.corpus
    documents, lanes = several(corpus.documents, "document"), several(material.plan.lanes or 0, "lane")
    return f"{corpus.name}: {documents}, {size(corpus.text_bytes)} of text, {lanes}", material


def _check_run(run_dir: Path) -> int:
    """Verify every checkpoint of a run, hashes included."""
    from picotrain import checkpoint

    runs.require_run(run_dir)
    checks = _Checks()
    folders = sorted((run_dir / "checkpoints").glob(f"{checkpoint.PREFIX}*"))
    if not folders:
        checks.out.line("", f"{run_dir} has no checkpoint yet")
    for path in folders:
        checks.check(
            path.name, lambda path=path: (checkpoint.verify(path) or checkpoint.require_parts(path) or f"whole, {size(_bytes(path))}", None)
        )
    return 2 if checks.failed else 0


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
