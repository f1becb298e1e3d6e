"""What `picotrain eval` needs, looked at before anything is measured: all that is wrong is said at once."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from picotrain import checkpoint
from picotrain import run as runs
from picotrain.cli import announced, say
from picotrain.config import places
from picotrain.errors import ConfigError, DataError, PicotrainError, Problem, RunError
from picotrain.evaluation.bundle import Bundle
from picotrain.places import expanded


class Options(NamedTuple):
    """What the command line chose beside the run. None: as in the run's config."""

    bundle: str | None = None
    baseline_table: str | None = None
    max_per_task: int | None = None
    tokens: int | None = None  # of each text, about; None: the whole validation shard


class Ready(NamedTuple):
    """What an evaluation starts from. config: the run's, with what the command line says instead. folder: where results go."""

    material: runs.Material
    config: Any
    bundle: Bundle | None
    folder: Path


def check(run: Path, which: str, hf: Path | None, options: Options) -> Ready:
    """Look at run, corpus, checkpoint or Hugging Face folder, bundle and output folder. Raises RunError with all that is wrong."""
    problems: list[str] = []

    @contextmanager
    def noting() -> Generator[None]:
        try:
            yield
        except ConfigError as error:
            problems.extend(map(str, error.problems))
        except PicotrainError as error:
            problems.append(str(error))

    runs.require_run(run)
    material = config = bundle = None
    name = f"hf-{hf.resolve().name}" if hf else ""
    with noting():
        if hf:
            from picotrain.evaluation.hf import check_folder

            check_folder(hf)
        else:
            path = checkpoint.find(run / "checkpoints", which)
            name = path.name
            checkpoint.verify(path)
    with noting():
        material = runs.read_material(run)
        config = material.config
        with noting():
            config = _chosen(config, options)
        announced.of_evaluation(run, material.corpus, None if options.bundle else config.evaluation.core.bundle)
        with noting():
            bundle = _bundle(config, options)
        problems += _corpus_problems(material, with_training=hf is None)
    if options.tokens is not None:
        name += f"-tokens-{options.tokens}"  # beside the results of all the text, which they do not replace
    with noting():
        _check_writable(run / "eval" / name)
    if problems or material is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RunError(f"nothing was measured, for {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Ready(material, config, bundle, run / "eval" / name)


def _chosen(config: Any, options: Options) -> Any:
    """The run's config with what the command line says instead."""
    core, train = config.evaluation.core, config.train
    changes = {}
    if options.bundle:
        if wrong := places.flaw(options.bundle, "read"):
            raise ConfigError([Problem("--bundle", *wrong)])
        if places.is_url(options.bundle):
            raise ConfigError([Problem("--bundle", "is a URL", "a folder; a URL with its SHA-256 goes into evaluation.core of the run")])
        changes["bundle"] = str(expanded(options.bundle).absolute())
    if options.baseline_table:
        changes["baseline_table"] = options.baseline_table
    if options.max_per_task is not None:
        train = train.model_copy(update={"core_metric_max_per_task": options.max_per_task})
    evaluation_ = config.evaluation.model_copy(update={"core": core.model_copy(update=changes)})
    return config.model_copy(update={"evaluation": evaluation_, "train": train})


def _bundle(config: Any, options: Options) -> Bundle | None:
    """The bundle, of whose tasks at least one can be evaluated; what is wrong with others is said."""
    if config.evaluation.core.bundle is None:
        given = {"--baseline-table": options.baseline_table, "--max-per-task": options.max_per_task}
        if needless := [
            Problem(name, "there is no bundle", "--bundle DIR names one") for name, value in given.items() if value is not None
        ]:
            raise ConfigError(needless)
        return None
    bundle = runs.open_bundle(config)
    wrong = [problem for task in bundle.tasks if (problem := task.problem or ("" if task.path.is_file() else f"{task.path} is not there"))]
    if len(wrong) == len(bundle.tasks):
        raise DataError(f"{bundle.path} has no task that can be evaluated: " + "; ".join(wrong))
    for problem in wrong:
        say(f"WARNING: CORE will lack a task: {problem}")
    return bundle


def _corpus_problems(material: runs.Material, with_training: bool) -> Iterator[str]:
    """Which shards that are read are not there as they were; those behind a URL are fetched later."""
    for corpus in material.corpus.corpora:
        for shard in (corpus.val, *(corpus.shards[:1] if with_training else ())):
            try:
                if corpus.remote is None:
                    with corpus.files.hold(shard):
                        pass
            except DataError as error:
                yield str(error)


def _check_writable(folder: Path) -> None:
    """Raise RunError unless files can be written into a folder that need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise RunError(f"{there} is no folder, and results would go into {folder}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{there} cannot be written to, and results would go into {folder}")
