"""What `picotrain compare` compares: checkpoints of runs and Hugging Face folders, found by what was typed, loaded one at a time."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from picotrain import checkpoint
from picotrain import run as runs
from picotrain.checkpoint.folder import read_manifest
from picotrain.config import places
from picotrain.errors import PicotrainError, RunError
from picotrain.places import expanded
from picotrain.report import read_run, summarise

if TYPE_CHECKING:
    from picotrain.config.schema import SamplingConfig
    from picotrain.evaluation.subject import Subject

FORMS = "RUN, RUN@best, RUN@STEP, a folder RUN/checkpoints/step_..., or a Hugging Face folder"


@dataclass(frozen=True)
class Given:
    """One of the things to compare. run: its run directory, None for a Hugging Face folder. facts: see `_run_facts`."""

    text: str  # as it was typed
    path: Path  # the checkpoint, or the Hugging Face folder
    run: Path | None
    last: bool = True  # and not a checkpoint that was asked for
    name: str = ""
    material: runs.Material | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Of the checkpoint of a run."""
        return int(self.path.name.removeprefix(checkpoint.PREFIX))


def find_all(texts: Sequence[str], *others: Callable[[], object]) -> list[Given]:
    """What these texts name, with what is known without loading a model. Raises RunError with all mistakes at once, also those
    that the `others` raise."""
    found: list[Given] = []
    problems = [] if len(texts) > 1 else ["there is nothing to compare with: give at least two of " + FORMS]
    for text in texts:
        try:
            one = _found(text)
            found.append(_with_facts(one))
        except PicotrainError as error:
            problems.append(str(error))
            continue
        for other in found[:-1]:
            if other.path == one.path:
                what = f"{one.path}" if one.run is None else f"step {one.step:,} of {one.run}"
                problems.append(f"{text} and {other.text} are the same, {what}: give each once")
    if len(found) == len(texts) and found and not any(one.run for one in found):
        problems.append("none of these is a run, whose validation text all of them would be measured on: add one")
    for other in others:
        try:
            other()
        except PicotrainError as error:
            problems.append(str(error))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RunError(f"nothing can be compared, for {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return _named(found)


def _found(text: str) -> Given:
    if wrong := places.flaw(text, "local"):
        raise RunError(f"{wrong[0]} ({wrong[1]})")
    path = expanded(text)
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return _of_run(text, path, "last")
        if re.fullmatch(checkpoint.PREFIX + "[0-9]{1,18}", path.name) and path.absolute().parent.name == "checkpoints":
            return _of_run(text, path.absolute().parents[1], str(int(path.name.removeprefix(checkpoint.PREFIX))))
        if (path / "config.json").is_file():
            return Given(text, path.resolve(), None)
    head, at, which = text.rpartition("@")
    if at and head and not path.exists():
        return _of_run(text, expanded(head), which)
    runs.require_run(path)  # names the runs beside it
    raise RunError(f"{text} holds neither a run nor a Hugging Face model; right would be {FORMS}")


def _of_run(text: str, run: Path, which: str) -> Given:
    runs.require_run(run)
    return Given(text, checkpoint.find(run / "checkpoints", which).resolve(), run.resolve(), last=which == "last")


def _with_facts(given: Given) -> Given:
    if given.run is None:
        return replace(given, facts=_folder_facts(given.path))
    material = runs.read_material(given.run)
    return replace(given, material=material, facts=_run_facts(given, given.run, material))


def _run_facts(given: Given, run: Path, material: runs.Material) -> dict[str, Any]:
    """What the files of a run say, of which a report needs no more than plain values."""
    files, plan, corpus = read_run(run), material.plan, material.corpus
    summary = summarise(files)
    measured = checkpoint.read_metrics(given.path)
    return {
        "kind": "run",
        "path": str(given.path),
        "step": given.step,
        "parameters": plan.parameters["total"],
        "tokens": given.step * plan.total_batch_size,
        "seq_len": plan.seq_len,
        "precision": plan.precision,
        "val_bpb": measured.get("val_bpb"),
        "eval_rows": plan.eval_rows,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "train_shards": sorted(shard.fingerprint for part in corpus.corpora for shard in part.shards),
        "val_shards": [part.val.fingerprint for part in corpus.corpora],
        "tokenizer_fingerprint": (files.data.get("tokenizer") or {}).get("fingerprint"),
        "vocab_size": plan.vocab_size,
        **{key: summary[key] for key in ("median_tok_per_sec", "median_mfu", "hardware_name", "world_size")},
    }


def _folder_facts(path: Path) -> dict[str, Any]:
    """Of a Hugging Face folder nobody knows what it was trained on; size and vocabulary are known once it is loaded."""
    from picotrain.evaluation.hf import read_context, require_transformers

    require_transformers(str(path))
    known = {"kind": "hf", "path": str(path), "seq_len": read_context(path), "precision": "fp32"}
    unknown = (
        "step", "parameters", "tokens", "val_bpb", "eval_rows", "corpus", "corpus_fingerprint", "tokenizer_fingerprint", "vocab_size",
        "median_tok_per_sec", "median_mfu", "hardware_name", "world_size",
    )  # fmt: skip
    return {**known, **dict.fromkeys(unknown), "train_shards": [], "val_shards": []}


def _named(found: Sequence[Given]) -> list[Given]:
    """Names as short as they can be while each is another one: of the folder, with the step if one was asked for; else as typed."""

    def full(one: Given) -> str:
        return f"{one.run.name}@{one.step}" if one.run else one.path.name

    names = [one.run.name if one.run and one.last else full(one) for one in found]
    for longer in (full, lambda one: one.text):
        taken = Counter(names)
        names = [longer(one) if taken[name] > 1 else name for one, name in zip(found, names, strict=True)]
    return [replace(one, name=name, facts={"name": name, **one.facts}) for one, name in zip(found, names, strict=True)]


class Loaded(NamedTuple):
    """A model in memory. write: its continuations of prompts. facts: those that were not known before. store, key: where
    `picotrain eval` keeps the CORE results of these weights, and what identifies them (see `core_results`)."""

    subject: Subject
    write: Callable[[Sequence[str], SamplingConfig], list[str]]
    facts: dict[str, Any]
    store: Path | None
    key: dict[str, Any]


def load(given: Given, home: Path) -> Loaded:
    """Load one of them; home: the run whose folder keeps what is measured on a Hugging Face model. Raises CheckpointError."""
    loaded = _load_folder(given, home) if given.run is None else _load_run(given, given.run)
    writable = loaded.store is not None and os.access(loaded.store.parents[2], os.W_OK)
    return loaded if writable else loaded._replace(store=None)


def _load_run(given: Given, run: Path) -> Loaded:
    from picotrain import sampling
    from picotrain.api import load_model
    from picotrain.evaluation.subject import RunModel

    material, model, path = load_model(run, str(given.step))
    model = model.to(model.compute_dtype)  # the same numbers, without a cast of all weights at every call

    def write(prompts: Sequence[str], options: SamplingConfig) -> list[str]:
        return [one.text for one in sampling.complete(model, material.tokenizer, prompts, options, seed=0)]

    key = checkpoint_key(path, model.device.type)
    return Loaded(RunModel(given.name, model, material.tokenizer), write, {}, run / "eval" / path.name / "tasks", key)


def checkpoint_key(path: Path, device: str) -> dict[str, Any]:
    """What identifies a checkpoint's weights on a kind of device."""
    return {"weights": {name: entry.xxh3_64 for name, entry in read_manifest(path).items()}, "device": device}


def folder_key(path: Path, device: str) -> dict[str, Any]:
    """What identifies a Hugging Face folder's weights on a kind of device: sizes and times of its files."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(path.glob("*.safetensors"))}
    return {"hf": str(path.absolute()), **files, "device": device}


def _load_folder(given: Given, home: Path) -> Loaded:
    from picotrain import hardware
    from picotrain.evaluation.hf import HuggingFaceModel

    device = hardware.detect().device
    folder = HuggingFaceModel(given.path, device)

    def write(prompts: Sequence[str], options: SamplingConfig) -> list[str]:
        return [folder.complete(p, options.max_tokens, options.temperature, options.top_k, seed=i) for i, p in enumerate(prompts)]

    facts = {"parameters": folder.parameters, "vocab_size": folder.vocab_size}
    return Loaded(folder, write, facts, home / "eval" / f"hf-{given.path.name}" / "tasks", folder_key(given.path, device))
