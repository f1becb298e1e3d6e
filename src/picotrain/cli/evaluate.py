"""`picotrain eval`: one checkpoint measured on validation and training text, with samples."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from picotrain import evaluation, sampling
from picotrain.cli.commands import load_model
from picotrain.data.stream import validation_rows
from picotrain.parallel import Parallel
from picotrain.report.markdown import fence


def evaluate_checkpoint(run: Path, which: str) -> int:
    """Write `eval/step_*/results.json` and `results.md` and print the figures; the exit code.

    The whole validation shard counts, whatever train.eval_tokens is. Training text is the same number of rows from the
    start of the first training shard, in file order.
    """
    material, model, path = load_model(run, which)
    plan, corpus, tokenizer = material.plan, material.corpus, material.tokenizer
    parallel = dataclasses.replace(Parallel.single(), device=next(model.parameters()).device)
    batch = material.config.evaluation.bpb.device_batch_size or plan.device_batch_size
    val = validation_rows(corpus, tokenizer, plan.seq_len, None, plan.unit_bytes).rows
    first_shard = corpus.with_val_from_training()
    train = validation_rows(first_shard, tokenizer, plan.seq_len, len(val), plan.unit_bytes).rows

    scores = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        for split, rows in (("val", val), ("train", train)):
            task = bars.add_task(f"bits per byte, {split}")
            scores[split] = evaluation.bits_per_byte(
                model, rows, tokenizer.token_bytes(), batch, parallel,
                progress=lambda done, total, task=task: bars.update(task, completed=done, total=total),
            )  # fmt: skip
    samples = sampling.complete(model, tokenizer, material.config.sampling.prompts or ("",), material.config.sampling, seed=0)
    step = int(path.name.removeprefix("step_"))
    assert scores["val"] and scores["train"]
    results = {
        "step": step,
        "bpb": {"val": scores["val"].val_bpb, "train": scores["train"].val_bpb},
        "val_loss": scores["val"].val_loss,
        "train_loss": scores["train"].val_loss,
        "tokens": {split: score.tokens for split, score in scores.items() if score},
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }
    folder = run / "eval" / path.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = _markdown(run.name, results)
    (folder / "results.md").write_text(text)
    print(text)
    print(f"written to {folder}", file=sys.stderr)
    return 0


def _markdown(name: str, results: dict[str, Any]) -> str:
    lines = [
        f"# {name} at step {results['step']:,}",
        "",
        "| split | bits per byte | loss (nats per token) | tokens |",
        "|---|---|---|---|",
        f"| validation | {results['bpb']['val']:.4f} | {results['val_loss']:.4f} | {results['tokens']['val']:,} |",
        f"| training | {results['bpb']['train']:.4f} | {results['train_loss']:.4f} | {results['tokens']['train']:,} |",
        "",
        "CORE: not evaluated.",
    ]
    for sample in results["samples"]:
        lines += ["", f"Sample, prompt {sample['prompt']!r}:", "", fence(sample["prompt"] + sample["text"])]
    return "\n".join(lines)
