"""`picotrain eval`: a checkpoint, or a Hugging Face model, on validation text, on the tasks of CORE, and at writing.

    picotrain eval RUN                                        # one process
    torchrun --nproc_per_node 8 -m picotrain eval RUN         # ranks share the work, rank 0 writes

Everything lands in one folder of the run: results.json, results.md, core.csv, predictions.jsonl, and tasks/, which is what an
evaluation that was interrupted goes on from.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from picotrain import evaluation, parallel, sampling
from picotrain import run as runs
from picotrain.cli import say
from picotrain.cli.commands import load_model
from picotrain.cli.subjects import checkpoint_key, folder_key
from picotrain.config.saved import is_own_json, write_whole
from picotrain.data.origins import validation_documents, validation_origins
from picotrain.data.stream import validation_rows
from picotrain.errors import ConfigError, Problem, RunError
from picotrain.evaluation.bundle import Bundle
from picotrain.evaluation.core import Core, TaskResult, summary
from picotrain.evaluation.documents import score_documents
from picotrain.evaluation.hf import HuggingFaceModel
from picotrain.evaluation.subject import RunModel, Subject
from picotrain.evaluation.suite import core_results
from picotrain.parallel import Parallel
from picotrain.report.evaluated import render

Show = Callable[[str, int, int], None]  # what is measured, done, in all


class Options(NamedTuple):
    """What the command line chose beside the run. None: as in the run's config."""

    bundle: str | None = None
    baseline_table: str | None = None
    max_per_task: int | None = None


def evaluate_checkpoint(run: Path, which: str, options: Options) -> int:
    """Measure a run's checkpoint and write `eval/step_*/`; the exit code.

    The whole validation shard counts, whatever train.eval_tokens is. Training text is the same number of rows from the
    start of the first training shard, in file order.
    """
    material, model, path = load_model(run, which)
    _check_folder(run / "eval" / path.name)
    material = material._replace(config=_chosen(material.config, options))
    with _ranks(next(model.parameters()).device) as ranks, _bars(ranks) as show:
        model = model.to(ranks.device, model.compute_dtype)  # the same numbers, without a cast of all weights at every call
        subject = RunModel(run.name, model, material.tokenizer)
        scores = _bits_per_byte(material, model, ranks, show)
        key = checkpoint_key(path, ranks.device.type)
        core, predictions = _core(material.config, subject, ranks, run / "eval" / path.name / "tasks", key, show)
        prompts = dict.fromkeys((*material.config.sampling.prompts, ""))  # and one from nothing
        samples = sampling.complete(model, material.tokenizer, list(prompts), material.config.sampling, seed=0) if ranks.is_main else []
    results = {
        "step": int(path.name.removeprefix("step_")),
        "precision": str(model.compute_dtype).removeprefix("torch."),
        **scores,
        "core": core and dataclasses.asdict(core),
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }
    if ranks.is_main:
        _write(run / "eval" / path.name, f"{run.name} at step {results['step']:,}", results, predictions)
    return 0


def evaluate_hf(path: Path, run: Path, options: Options) -> int:
    """Measure a Hugging Face model on the validation documents of a run, whole and in windows of its own context, and on CORE;
    write `eval/hf-NAME/` of that run; the exit code."""
    material = runs.read_material(run)
    config = _chosen(material.config, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _ranks(torch.device(device)) as ranks, _bars(ranks) as show:
        subject = HuggingFaceModel(path, ranks.device)
        texts = [document.text for document in validation_documents(material.corpus)]
        window = min(subject.seq_len or material.plan.seq_len, material.plan.seq_len)
        found = score_documents(subject, texts, window, ranks, lambda done, total: show("bits per byte", done, total))
        folder = run / "eval" / f"hf-{subject.name}"
        _check_folder(folder)
        core, predictions = _core(config, subject, ranks, folder / "tasks", folder_key(path, ranks.device.type), show)
        options_ = config.sampling
        samples = [
            {"prompt": prompt, "text": subject.complete(prompt, options_.max_tokens, options_.temperature, options_.top_k, seed=i)}
            for i, prompt in enumerate(dict.fromkeys((*options_.prompts, "")))
            if ranks.is_main
        ]
    results = {
        "hf": str(path),
        "parameters": subject.parameters,
        "window": window,
        "bpb": {"val": found.bpb},
        "val_loss": float(found.bits.sum()) * math.log(2) / max(1, int(found.tokens.sum())),
        "tokens": {"val": int(found.tokens.sum())},
        "core": core and dataclasses.asdict(core),
        "samples": samples,
    }
    if ranks.is_main:
        _write(folder, f"{subject.name} on the documents of {run.name}", results, predictions)
    return 0


def _chosen(config: Any, options: Options) -> Any:
    """The run's config with what the command line says instead."""
    core, train = config.evaluation.core, config.train
    changes = {}
    if options.bundle:
        if "://" in options.bundle:
            raise ConfigError([Problem("--bundle", "is a URL", "a folder; a URL with its SHA-256 goes into evaluation.core of the run")])
        changes["bundle"] = str(Path(options.bundle).expanduser().absolute())
    if options.baseline_table:
        changes["baseline_table"] = options.baseline_table
    if options.max_per_task is not None:
        train = train.model_copy(update={"core_metric_max_per_task": options.max_per_task})
    evaluation_ = config.evaluation.model_copy(update={"core": core.model_copy(update=changes)})
    return config.model_copy(update={"evaluation": evaluation_, "train": train})


@contextmanager
def _ranks(device: torch.device) -> Iterator[Parallel]:
    """The ranks that torchrun started, or this process alone."""
    if "RANK" not in os.environ:
        yield dataclasses.replace(Parallel.single(), device=device)
        return
    ranks = parallel.build("ddp", device.type)
    yield ranks
    ranks.teardown()  # not after an error: that could hang


@contextmanager
def _bars(ranks: Parallel) -> Iterator[Show]:
    """A progress bar for each thing that is measured, on rank 0's terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not (ranks.is_main and sys.stderr.isatty())) as progress:
        bars: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what)
            progress.update(bars[what], completed=done, total=total)

        yield show


def _bits_per_byte(material: runs.Material, model: Any, ranks: Parallel, show: Show) -> dict[str, Any]:
    """Of validation text, by origin too where the corpus says it, and of training text."""
    config, plan, corpus, tokenizer = material

    def measure(name: str, data: Any, max_rows: int | None, by_origin: bool) -> tuple[list[evaluation.Bpb], list[str], int]:
        packed = validation_rows(data, tokenizer, plan.seq_len, max_rows, plan.unit_bytes)
        origins = validation_origins(data) if by_origin else None
        rows = evaluation.Rows(packed.rows, origins.of_tokens(packed), len(origins.names)) if origins else evaluation.Rows(packed.rows)
        batch = config.evaluation.bpb.device_batch_size or plan.device_batch_size
        progress = lambda done, total: show(f"bits per byte, {name}", done, total)  # noqa: E731
        found = evaluation.bits_per_byte(model, lambda: rows, tokenizer.token_bytes(), batch, ranks, progress=progress)
        return found or [], origins.names if origins else [], len(packed.rows)

    (val, *groups), names, rows = measure("validation", corpus, None, by_origin=True)
    (train, *_), _, _ = measure("training", corpus.with_val_from_training(), rows, by_origin=False)
    by_source = {name: group.val_bpb for name, group in zip(names, groups, strict=True) if group.tokens}
    return {
        "bpb": {"val": val.val_bpb, "train": train.val_bpb, "by_source": by_source},
        "val_loss": val.val_loss,
        "train_loss": train.val_loss,
        "tokens": {"val": val.tokens, "train": train.tokens},
    }


def _core(config: Any, subject: Subject, ranks: Parallel, store: Path, key: dict[str, Any], show: Show) -> tuple[Core | None, Any]:
    """CORE and the predictions of its tasks; nothing without a bundle."""
    if config.evaluation.core.bundle is None:
        return None, []
    bundle: Bundle = runs.open_bundle(config)
    key = key | {"baseline_table": bundle.baseline_table}
    max_per_task = config.train.core_metric_max_per_task
    found = core_results(subject.scorer, bundle, max_per_task, ranks, store, key, lambda *at: show(f"CORE {at[0]}", *at[1:]))
    for result in found:
        if result.traceback and ranks.is_main:
            say(result.traceback)
    return summary(bundle, found, max_per_task), found


def _check_folder(folder: Path) -> None:
    """Raise RunError where files that are no results of ours would be replaced. results.json is the first to be written."""
    names = [name for name in ("results.json", "results.md", "core.csv", "predictions.jsonl") if os.path.lexists(folder / name)]
    if names and not (names[0] == "results.json" and is_own_json(folder / names[0], "bpb", "samples")):
        raise RunError(f"{folder / names[0]} was not written by `picotrain eval`, which would replace it; move it away")


def _write(folder: Path, title: str, results: dict[str, Any], tasks: list[TaskResult]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    text = render(title, results)
    write_whole(folder / "results.md", text)
    if results["core"]:
        write_whole(folder / "core.csv", _table(results["core"]))
        lines = [{"task": task.label, **dataclasses.asdict(one)} for task in tasks for one in task.predictions]
        write_whole(folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    print(text)
    say(f"written to {folder}")


def _table(core: dict[str, Any]) -> str:
    """core.csv: a line a task, and the metric."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["task", "n", "accuracy", "centered", "stderr", "problem"])
    for label, task in core["tasks"].items():
        table.writerow([label, task["n"], task["accuracy"], task["centered"], task["stderr"], core["problems"].get(label, "")])
    table.writerow(["CORE", "", "", core["core_metric"], "", ""])
    return file.getvalue()
