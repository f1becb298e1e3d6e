"""What the commands do. Each imports what it needs: a plan must not wait for torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain import invocation, ranks
from picotrain import run as runs
from picotrain.cli import announced, say
from picotrain.config import Config, compose, dump, places
from picotrain.config.overrides import parse
from picotrain.data import sources, tokenizers
from picotrain.errors import ConfigError, Problem, UsageError
from picotrain.places import expanded
from picotrain.text import as_typed, printable

if TYPE_CHECKING:
    from picotrain.cli.estimate import Command
    from picotrain.launch import Start
    from picotrain.meeting import Meeting
    from picotrain.worker import Opened


def resolved(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> Config:
    """The config that these words mean, resolved; what was decided is said once."""
    return runs.resolve(composed(overrides, config_dir=config_dir, config_file=config_file), say)


def composed(overrides: Sequence[str], **how: Any) -> Config:
    """`compose`, with as many ranks and nodes as torchrun has started, where it has: a preset or a saved config may say otherwise.

    Raises ConfigError with all problems at once, a typed number that torchrun contradicts among them.
    """
    here = ranks.here()
    if not here.under_torchrun:
        return compose(overrides, **how)
    nproc, nodes = here.local_world_size, here.world_size // here.local_world_size
    typed = parse(overrides).read().values
    problems = [
        Problem(key, f"{typed[key]}, but torchrun has started {there}", "leave the key out: it follows from torchrun")
        for key, there in (("hardware.nproc_per_node", nproc), ("launch.nnodes", nodes))
        if typed.get(key) not in (None, "auto", there)
    ]
    if nodes * nproc != here.world_size:
        uneven = f"torchrun has started {here.world_size} ranks, {nproc} of them here"
        problems.append(Problem("hardware.nproc_per_node", uneven, "each node has to have as many"))
    found: list[Config] = []
    runs.all_problems(lambda: found.append(compose(overrides, **how)), lambda: _refuse(problems))
    meet = {"nnodes": nodes, "node_rank": 0, "rdzv_endpoint": os.environ[ranks.MASTER_ADDR] if nodes > 1 else None}
    launch = found[0].launch.model_copy(update=meet)
    return found[0].model_copy(update={"launch": launch, "hardware": found[0].hardware.model_copy(update={"nproc_per_node": nproc})})


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError(problems)


def new_run(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> Start:
    """What `picotrain train` starts."""
    from picotrain.cli.estimate import Command
    from picotrain.launch import Start

    config = resolved(overrides, config_file, config_dir)
    if config_file:
        announced.of_config(config, overrides, str(config_file))
    return Start(config, partial(_opened, config, overrides, Command(overrides, config_file, config_dir)))


def resumed(place: str, overrides: Sequence[str]) -> Start:
    """An existing run, or one that its archive has, that goes on by its own config under a few overrides."""
    from picotrain.launch import Start

    if wrong := places.flaw(place, "read"):
        raise UsageError([Problem("RUN", *wrong)])
    run, left = _fetched(place, overrides) if places.is_url(place) else (Path(place), overrides)
    runs.require_run(run)
    config = composed(left, config_file=run / "config.yaml", same_run=True)
    here = config.run.model_copy(update={"dir": str(run.absolute()), "name": run.name})
    config = runs.resolve(config.model_copy(update={"run": here}), say)
    announced.of_config(config, left, str(run / "config.yaml"))
    return Start(config, partial(_opened, config, left, None))


def _fetched(url: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that an archived run was restored into, and the overrides that are left. Its cache stays on its old machine."""
    from picotrain.checkpoint.archive import restore
    from picotrain.launch import RunLock

    chosen = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    if chosen and (wrong := places.flaw(chosen[-1], "local")):
        raise UsageError([Problem("run.dir", *wrong)])
    folder = expanded(chosen[-1] if chosen else f"runs/{url.rstrip('/').rpartition('/')[2]}")
    with RunLock(folder):
        restore(url, folder, say)
    rest = [text for text in overrides if not text.startswith("run.dir=")]
    return folder, ["run.cache_dir=null", *rest]


@contextmanager
def _opened(config: Config, overrides: Sequence[str], command: Command | None, meeting: Meeting | None) -> Generator[Opened | None]:
    """The config's run, created or opened again, under its lock; None when it is finished. command: of a new run.

    `meeting`: of torchrun's ranks. When it starts them again after one has died, they go on, whatever run.resume says.
    """
    from picotrain.cli.estimate import announce, say_time
    from picotrain.lock import RunLock
    from picotrain.signals import ending
    from picotrain.worker import Opened

    run_dir = Path(config.run.dir or "")
    if meeting and meeting.remembered("run") == str(run_dir):
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    with ExitStack() as stack:
        lock = RunLock(run_dir)
        with ending("preparing the run", lock.leave):
            stack.enter_context(lock)
            told = announce(config, command)
            material = runs.open_run(config, overrides, say)
            if material is None and config.archive.url:
                from picotrain.loop import archiving  # brings torch

                archiving.complete(config, run_dir, runs.read_plan(run_dir).num_steps)
        if meeting:
            meeting.remember("run", str(run_dir))
        if material is None:
            from picotrain import report as reports

            say(f"{invocation.shown(run_dir)} is finished; a larger horizon trains on, another run.name anew")
            reports.what_next(reports.summarise(reports.read_run(run_dir)), sys.stderr)
        elif not told:
            say_time(material.plan, config, command)
        yield Opened(run_dir, material) if material else None


def show_plan(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None, as_json: bool) -> None:
    """Print the plan as far as it is known without preparing anything."""
    from picotrain.cli import estimate

    config = resolved(overrides, config_file, config_dir)
    estimate.calibrate(config)
    plan = runs.preview(config)
    if as_json:
        print(json.dumps(plan.model_dump(mode="json"), indent=2))
        return
    from picotrain.cli.show import plan_table
    from picotrain.planning import ceilings, pace

    plan_table(plan, pace.hint(plan, config), ceilings.is_here(config))


def show_config(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> None:
    """Print the resolved YAML."""
    text = dump(resolved(overrides, config_file, config_dir), sys.stdout.encoding)
    print(printable(text) if sys.stdout.isatty() else text, end="")


def evaluate(run: Path, which: str, hf: Path | None, **options: Any) -> int:
    """Measure a checkpoint, or a Hugging Face model on the run's text; write a folder under RUN/eval."""

    def work() -> int:
        runs.require_run(run)
        from picotrain.cli.evaluate import Options, evaluate_checkpoint, evaluate_hf

        return evaluate_hf(hf, run, Options(**options)) if hf else evaluate_checkpoint(run, which, Options(**options))

    if not ranks.here().launched:
        return work()
    from picotrain.worker import as_rank

    return as_rank(work)


def sample(run: Path, prompt: str, which: str, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Stream a continuation to standard output."""
    from picotrain.api import load_model
    from picotrain.config.schema import SamplingConfig
    from picotrain.sampling import stream_text

    runs.require_run(run)
    material, model, _ = load_model(run, which)
    options = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_k=top_k)
    prompt = as_typed(prompt)
    on_terminal = sys.stdout.isatty()  # elsewhere the text stays as it is
    for piece in chain([prompt], stream_text(model, material.tokenizer, prompt, options, seed), ["\n"]):
        sys.stdout.write(printable(piece) if on_terminal else piece)
        sys.stdout.flush()


def report(run: Path) -> None:
    """Write the report of a run again and print its summary."""
    from picotrain import report as reports
    from picotrain.lock import is_locked

    runs.require_run(run)
    reports.console_summary(reports.write_report(run, running=is_locked(run)))


def data_show(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Prepare or fetch a corpus and print its facts."""
    from picotrain.cli.show import corpus_table

    config = resolved(overrides, None, config_dir)
    for corpus in sources.gather(config.data, runs.cache_dir(config), say).corpora:
        corpus_table(corpus, config)


def tokenizer_train(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Train a config's tokenizer unless the cache has it, and print its facts as JSON."""
    config = resolved(overrides, None, config_dir)
    cache = runs.cache_dir(config)
    corpus = sources.gather(config.data, cache, say)
    path, measured = tokenizers.obtain_tokenizer(config.tokenizer, corpus, cache, say)
    print(json.dumps({"path": str(path), **measured}, indent=2))
