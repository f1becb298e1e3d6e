"""`picotrain compare`: several models measured on the same documents and examples, one in memory at a time, and what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from picotrain import run as runs
from picotrain.cli import announced, fairness, say
from picotrain.cli.bars import bars
from picotrain.cli.subjects import Given, Loaded, find_all, load
from picotrain.config.schema import Config, SamplingConfig
from picotrain.data.origins import Document, validation_documents
from picotrain.disk import is_own_page, write_whole
from picotrain.errors import PicotrainError, RunError
from picotrain.evaluation import EvaluationFailed, comparison
from picotrain.evaluation.bundle import Bundle, read_bundle
from picotrain.evaluation.core import TaskResult
from picotrain.evaluation.documents import DocumentScores, score_documents
from picotrain.evaluation.suite import core_results
from picotrain.metrics import plain
from picotrain.parallel import Parallel, free_memory
from picotrain.report import compare as pages
from picotrain.terminal import Printer
from picotrain.ticker import Show


@dataclass(frozen=True)
class Work:
    """What every model has to do. home: the run whose text, prompts and bundle are used. spread: whether the documents are some of
    all. window: tokens, the shortest context among the models."""

    home: Path
    documents: list[Document]
    spread: bool
    window: int
    bundle: Bundle | None
    max_per_task: int
    prompts: tuple[str, ...]
    sampling: SamplingConfig


@dataclass(frozen=True)
class Measured:
    """What one model did. problem: why its documents have no scores."""

    scores: DocumentScores | None
    problem: str
    tasks: list[TaskResult] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def compare(
    texts: Sequence[str], html: Path | None, bundle: Path | None, max_per_task: int | None, documents: int | None, as_json: bool
) -> int:
    """Print the comparison of these models as Markdown or JSON, and write it as a page if asked for; the exit code.

    What is not given is as in the config of the first run, whose validation shard, prompts and bundle are used. Raises RunError
    for what cannot be compared, all of it at once.
    """
    given = find_all(texts, lambda: _check_page(html), lambda: read_bundle(bundle) if bundle else None)
    home = next(one for one in given if one.material)
    assert home.material and home.run
    config = home.material.config
    announced.of_evaluation(home.run, home.material.corpus, None if bundle else config.evaluation.core.bundle)
    found, core_problem = _open_bundle(config, bundle)
    chosen = list(validation_documents(home.material.corpus, documents))
    of = sum(corpus.val.rows for corpus in home.material.corpus.corpora)
    prompts = tuple(dict.fromkeys((*config.sampling.prompts, "")))  # an empty one starts a document
    work = Work(
        home=home.run,
        documents=[document for document in chosen if document.text],
        spread=len(chosen) < of,
        window=min(length for one in given if (length := one.facts["seq_len"]) is not None),
        bundle=found,
        max_per_task=config.train.core_metric_max_per_task if max_per_task is None else max_per_task,
        prompts=prompts,
        sampling=config.sampling,
    )
    with bars() as show:
        measured = [_measure(one, work, show) for one in given]
    results = plain(_results(given, home, work, measured, of, core_problem))
    results["headline"] = pages.headlines(results)
    _write(results, html, as_json)
    return 0


def _check_page(html: Path | None) -> None:
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        wrong = "is a folder" if html.is_dir() else f"is in no folder that there is ({html.absolute().parent})"
        raise RunError(f"--html {html} {wrong}: name a file")
    if html is not None and not is_own_page(html):
        raise RunError(f"--html {html} is there and is no page of picotrain's, which alone may be written anew: name another file")


def _open_bundle(config: Config, bundle: Path | None) -> tuple[Bundle | None, str]:
    """The bundle, or why there is none. One that is asked for must be right; one that the config names may have gone."""
    if bundle is None and config.evaluation.core.bundle is None:
        return None, "no bundle was given (--bundle, or evaluation.core.bundle in the config of the first run)"
    if bundle is not None:
        core = config.evaluation.core.model_copy(update={"bundle": str(bundle.absolute())})
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"core": core})})
        return runs.open_bundle(config), ""
    try:
        return runs.open_bundle(config), ""
    except PicotrainError as error:
        return None, str(error)


def _measure(given: Given, work: Work, show: Show) -> Measured:
    """All that is wanted of one model, which is gone from memory afterwards."""
    loaded = load(given, work.home)
    scores, problem = None, "there is no text in the validation shard"
    if work.documents:
        try:
            progress = partial(show, f"{given.name}: documents")
            texts = [document.text for document in work.documents]
            scores = score_documents(loaded.subject, texts, work.window, Parallel.single(), progress)
            problem = ""
        except EvaluationFailed as error:
            problem = str(error)
            if error.trace:
                say(error.trace)
    tasks = _core_results(loaded, work.bundle, work.max_per_task, show) if work.bundle else []
    measured = Measured(scores, problem, tasks, loaded.write(work.prompts, work.sampling), loaded.facts)
    del loaded
    free_memory()
    return measured


def _core_results(loaded: Loaded, bundle: Bundle, max_per_task: int, show: Show) -> list[TaskResult]:
    """The results of all tasks, from `picotrain eval` or an earlier comparison where they are there."""

    def progress(label: str, done: int, of: int) -> None:
        show(f"{loaded.subject.name}: {label}", done, of)

    key = loaded.key | {"baseline_table": bundle.baseline_table}
    results = core_results(loaded.subject.scorer, bundle, max_per_task, Parallel.single(), loaded.store, key, progress)
    for result in results:
        if result.traceback:
            say(result.traceback)
    return results


def _results(
    given: Sequence[Given], home: Given, work: Work, measured: Sequence[Measured], documents: int, core_problem: str
) -> dict[str, Any]:
    """Everything that is said, as `picotrain.report.compare` takes it."""
    facts = [{**one.facts, **found.facts} for one, found in zip(given, measured, strict=True)]
    for one, found in zip(facts, measured, strict=True):
        one["bytes_per_token"] = found.scores and float(found.scores.bytes.sum() / found.scores.tokens.sum())
        one["loop_problem"] = "" if one is facts[0] else fairness.loop_problem(facts[0], one)
    scored = facts[given.index(home)]
    configs = [one.material.config if one.material else None for one in given]
    origins = [document.origin for document in work.documents]
    scores = [found.scores for found in measured]
    rows = comparison.compare_documents(scores, origins) if any(scores) else []
    core: dict[str, Any] = {"problem": core_problem}
    if work.bundle:
        tasks = comparison.compare_core(work.bundle.tasks, [found.tasks for found in measured])
        core |= {"bundle": str(work.bundle.path), "baseline_table": work.bundle.baseline_table, "max_per_task": work.max_per_task, **tasks}
    differences = fairness.config_differences(configs)
    return {
        "headline": [],
        "verdicts": [
            comparison.verdict(rows[0]["differences"][i] if rows else None, core["differences"][i] if work.bundle else None)
            for i in range(len(given) - 1)
        ],
        "confidence": comparison.confidence(len(given)),
        "subjects": [{key: value for key, value in one.items() if key not in ("train_shards",)} for one in facts],
        "warnings": fairness.warnings(facts, scored),
        "config": differences,
        "seeds_only": fairness.seeds_only(differences) and None not in configs,
        "bpb": {
            "text_of": home.name,
            "window": work.window,
            "documents": len(origins),
            "of": documents,
            "spread": work.spread,
            "rows": rows,
            "problems": {one.name: found.problem for one, found in zip(given, measured, strict=True) if found.problem},
        },
        "core": core,
        "samples": {
            **work.sampling.model_dump(include={"max_tokens", "temperature", "top_k"}),
            "prompts": work.prompts,
            "texts": [found.texts for found in measured],
        },
    }


def _write(results: dict[str, Any], html: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    else:
        Printer().page(pages.markdown(results))
    if html is not None:
        try:
            write_whole(html, pages.page(results))
        except OSError as error:
            raise RunError(f"{html} cannot be written: {error.strerror or error}") from error
        say(f"written to {html}")
