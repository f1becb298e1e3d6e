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
import traceback
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from picotrain import evaluation, invocation, parallel, sampling
from picotrain import ranks as ranks_
from picotrain import run as runs
from picotrain.api import load_model
from picotrain.cli import checks, say
from picotrain.cli.bars import bars
from picotrain.cli.checks import Options as Options
from picotrain.cli.subjects import checkpoint_key, folder_key
from picotrain.data.origins import validation_documents, validation_origins
from picotrain.data.stream import validation_rows
from picotrain.disk import is_own_json, write_whole
from picotrain.errors import PicotrainError, RunError
from picotrain.evaluation import EvaluationFailed
from picotrain.evaluation.bundle import Bundle
from picotrain.evaluation.core import TaskResult, summary
from picotrain.evaluation.documents import score_documents
from picotrain.evaluation.hf import HuggingFaceModel
from picotrain.evaluation.subject import RunModel, Subject
from picotrain.evaluation.suite import core_results
from picotrain.parallel import Parallel
from picotrain.report.evaluated import render
from picotrain.terminal import Printer
from picotrain.ticker import Show


class Evaluation:
    """What was measured so far, in the folder that it is written to after each part: a part that fails costs no other one."""

    def __init__(self, folder: Path, title: str, parts: Sequence[str], ranks: Parallel, about: dict[str, Any]):
        self.folder, self._title, self.ranks = folder, title, ranks
        self.predictions: list[TaskResult] = []
        self._written: dict[str, Path] = {}
        self._failed: dict[str, str] = {}
        self.results: dict[str, Any] = {**about, "bpb": {}, "tokens": {}, "core": None, "samples": []}
        self.results["missing"] = dict.fromkeys(parts, "the evaluation ended before it")

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Measure one part; what goes wrong in it is said, kept as its reason to be missing, and raised at the end, by `finish`.

        Of several ranks all fail together, by an EvaluationFailed, or the failing one ends the evaluation: the others may wait for it.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, EvaluationFailed) and self.ranks.world_size > 1:
                raise
            if not isinstance(error, PicotrainError):
                traceback.print_exc()
            elif isinstance(error, EvaluationFailed) and error.trace and self.ranks.is_main:
                say(error.trace)
            why = str(error) if isinstance(error, PicotrainError) else f"{type(error).__name__}: {error}"
            self.results["missing"][name] = self._failed[name] = why
        else:
            del self.results["missing"][name]
        if self.ranks.is_main and self._measured():
            self._write()

    def finish(self) -> int:
        """Print what there is and name its files; the exit code. Raises EvaluationIncomplete for what failed."""
        if self.ranks.is_main and self._written:
            Printer().page(render(self._title, self.results))
            say("\n".join(["written:", *(f"  {invocation.shown(path)}" for path in self._written.values())]))
        if self._failed:
            kept = f"; what was measured is in {self.folder}" if self._measured() else "; nothing was measured"
            raise EvaluationIncomplete(
                f"the evaluation is not complete{kept}:\n" + "\n".join(f"  - {name}: {why}" for name, why in self._failed.items())
            )
        return 0

    def _measured(self) -> bool:
        return bool(self.results["bpb"] or self.results["core"] or self.results["samples"])

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "results.json": json.dumps(self.results, indent=1, ensure_ascii=False) + "\n",
            "results.md": render(self._title, self.results),
        }
        if self.results["core"]:
            made = [{"task": task.label, **dataclasses.asdict(one)} for task in self.predictions for one in task.predictions]
            texts["core.csv"] = _table(self.results["core"])
            texts["predictions.jsonl"] = "".join(json.dumps(one) + "\n" for one in made)
        for name, text in texts.items():
            write_whole(self.folder / name, text)
            self._written[name] = self.folder / name


class EvaluationIncomplete(PicotrainError):
    """An evaluation of which a part failed; the others are written down."""

    exit_code = 1


VAL, TRAIN, CORE, SAMPLES = "bits per byte of validation text", "bits per byte of training text", "CORE", "samples"


def evaluate_checkpoint(run: Path, which: str, options: Options) -> int:
    """Measure a run's checkpoint and write `eval/step_*/`; the exit code. Raises EvaluationIncomplete.

    The whole validation shard counts, whatever train.eval_tokens is, or the first options.tokens of it, in a folder of their own.
    Training text is the same number of rows from the start of the first training shard, in file order.
    """
    ready = checks.check(run, which, None, options)
    _check_folder(ready.folder)
    material, model, path = load_model(run, which)
    config, seq_len = ready.config, material.plan.seq_len
    max_rows = options.tokens and max(1, options.tokens // seq_len)
    device = next(model.parameters()).device
    with _ranks(device) as ranks, _bars(ranks) as show:
        model = model.to(ranks.device, model.compute_dtype)  # the same numbers, without a cast of all weights at every call
        step = int(path.name.removeprefix("step_"))
        about = {"step": step, "precision": str(model.compute_dtype).removeprefix("torch."), "only_tokens": options.tokens}
        parts = [VAL, TRAIN, *([CORE] if ready.bundle else []), SAMPLES]
        done = Evaluation(ready.folder, f"{run.name} at step {step:,}", parts, ranks, about)
        found = done.results
        with done.part(VAL):
            (val, *groups), names, rows = _bits_per_byte(material, model, "validation", max_rows, ranks, show)
            by_source = {name: group.val_bpb for name, group in zip(names, groups, strict=True) if group.tokens}
            found |= {"bpb": {"val": val.val_bpb, "by_source": by_source}, "val_loss": val.val_loss, "tokens": {"val": val.tokens}}
            max_rows = rows
        with done.part(TRAIN):
            (train, *_), _, _ = _bits_per_byte(material, model, "training", max_rows or material.plan.eval_rows, ranks, show)
            found["bpb"]["train"], found["train_loss"], found["tokens"]["train"] = train.val_bpb, train.val_loss, train.tokens
        if ready.bundle:
            with done.part(CORE):
                subject, key = RunModel(run.name, model, material.tokenizer), checkpoint_key(path, ranks.device.type)
                _core(done, config, ready.bundle, subject, run / "eval" / path.name / "tasks", key, show)
        with done.part(SAMPLES):
            prompts = list(dict.fromkeys((*config.sampling.prompts, "")))  # and one from nothing
            for i, prompt in enumerate(prompts if ranks.is_main else ()):
                show(SAMPLES, i, len(prompts))
                found["samples"] += map(dataclasses.asdict, sampling.complete(model, material.tokenizer, [prompt], config.sampling, seed=i))
                show(SAMPLES, i + 1, len(prompts))
    return done.finish()


def evaluate_hf(path: Path, run: Path, options: Options) -> int:
    """Measure a Hugging Face model on the validation documents of a run, whole and in windows of its own context, and on CORE;
    write `eval/hf-NAME/` of that run; the exit code. Raises EvaluationIncomplete."""
    ready = checks.check(run, "last", path, options)
    _check_folder(ready.folder)
    material, sampling_ = ready.material, ready.config.sampling
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _ranks(torch.device(device)) as ranks, _bars(ranks) as show:
        subject = HuggingFaceModel(path, ranks.device)
        window = min(subject.seq_len or material.plan.seq_len, material.plan.seq_len)
        about = {"hf": str(path), "parameters": subject.parameters, "window": window, "only_tokens": options.tokens}
        title = f"{subject.name} on the documents of {run.name}"
        done = Evaluation(ready.folder, title, [VAL, *([CORE] if ready.bundle else []), SAMPLES], ranks, about)
        found = done.results
        with done.part(VAL):
            texts = _documents(material, subject, options.tokens)
            scores = score_documents(subject, texts, window, ranks, lambda at, of: show("bits per byte, documents", at, of))
            tokens = int(scores.tokens.sum())
            found |= {"bpb": {"val": scores.bpb}, "tokens": {"val": tokens}}
            found["val_loss"] = float(scores.bits.sum()) * math.log(2) / max(1, tokens)
        if ready.bundle:
            with done.part(CORE):
                key = folder_key(path, ranks.device.type)
                _core(done, ready.config, ready.bundle, subject, run / "eval" / f"hf-{subject.name}" / "tasks", key, show)
        with done.part(SAMPLES):
            prompts = list(dict.fromkeys((*sampling_.prompts, "")))
            for i, prompt in enumerate(prompts if ranks.is_main else ()):
                show(SAMPLES, i, len(prompts))
                text = subject.complete(prompt, sampling_.max_tokens, sampling_.temperature, sampling_.top_k, seed=i)
                found["samples"].append({"prompt": prompt, "text": text})
                show(SAMPLES, i + 1, len(prompts))
    return done.finish()


def _documents(material: runs.Material, subject: Subject, tokens: int | None) -> list[str]:
    """The validation documents, or the first of them that have so many tokens."""
    texts, count = [], 0
    for document in validation_documents(material.corpus):
        texts.append(document.text)
        if tokens is not None:
            count += len(subject.encode([document.text])[0])
            if count >= tokens:
                break
    return texts


@contextmanager
def _ranks(device: torch.device) -> Generator[Parallel]:
    """The ranks that torchrun started, or this process alone."""
    if not ranks_.here().launched:
        yield dataclasses.replace(Parallel.single(), device=device)
        return
    ranks = parallel.build(device.type)
    yield ranks
    ranks.teardown()  # not after an error: that could hang


def _bars(ranks: Parallel) -> AbstractContextManager[Show]:
    return bars() if ranks.is_main else nullcontext(lambda *at: None)


def _bits_per_byte(
    material: runs.Material, model: Any, what: str, max_rows: int | None, ranks: Parallel, show: Show
) -> tuple[list[evaluation.Bpb], list[str], int]:
    """Of validation or training text: of all of it, then of each origin where the corpus tells them; the origins; how many rows."""
    config, plan, corpus, tokenizer = material
    data = corpus if what == "validation" else corpus.with_val_from_training()
    name = f"bits per byte, {what}"
    show(name, 0, 0)
    packed = validation_rows(data, tokenizer, plan.seq_len, max_rows, plan.unit_bytes)
    origins = validation_origins(data) if what == "validation" else None
    rows = evaluation.Rows(packed.rows, origins.of_tokens(packed), len(origins.names)) if origins else evaluation.Rows(packed.rows)
    batch = config.evaluation.bpb.device_batch_size or plan.device_batch_size
    progress = lambda done, total: show(name, done, total)  # noqa: E731
    found = evaluation.bits_per_byte(model, lambda: rows, tokenizer.token_bytes(), batch, ranks, progress=progress)
    return found or [], origins.names if origins else [], len(packed.rows)


def _core(done: Evaluation, config: Any, bundle: Bundle, subject: Subject, store: Path, key: dict[str, Any], show: Show) -> None:
    """CORE and the predictions of its tasks. Raises EvaluationFailed where no task could be evaluated."""
    key = key | {"baseline_table": bundle.baseline_table}
    max_per_task = config.train.core_metric_max_per_task
    ranks = done.ranks
    tasks = core_results(subject.scorer, bundle, max_per_task, ranks, store, key, lambda *at: show(f"CORE {at[0]}", *at[1:]))
    for result in tasks:
        if result.traceback and ranks.is_main:
            say(result.traceback)
    core = summary(bundle, tasks, max_per_task)
    done.predictions, done.results["core"] = tasks, dataclasses.asdict(core)
    if core.core_metric is None:
        raise EvaluationFailed("none of its tasks could be evaluated: " + "; ".join(core.problems.values()))


def _check_folder(folder: Path) -> None:
    """Raise RunError where files that are no results of ours would be replaced. results.json is the first to be written."""
    names = [name for name in ("results.json", "results.md", "core.csv", "predictions.jsonl") if os.path.lexists(folder / name)]
    if names and not (names[0] == "results.json" and is_own_json(folder / names[0], "bpb", "samples")):
        raise RunError(f"{folder / names[0]} was not written by `picotrain eval`, which would replace it; move it away")


def _table(core: dict[str, Any]) -> str:
    """core.csv: a line a task, and the metric."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["task", "n", "accuracy", "centered", "stderr", "problem"])
    for label, task in core["tasks"].items():
        table.writerow([label, task["n"], task["accuracy"], task["centered"], task["stderr"], core["problems"].get(label, "")])
    table.writerow(["CORE", "", "", core["core_metric"], "", ""])
    return file.getvalue()
