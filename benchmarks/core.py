"""CORE evaluation against a plain implementation that forwards one example at a time, in the same run and dtype.

Seeded examples of each task of a bundle, random weights or those of a run. Prints one JSON line a task and one for all: seconds
of both (medians of interleaved repeats), their ratio, how many predictions were made by a margin below 1e-5 (choices that are
the same text among them), and every prediction that differs. In the sums each task's time is weighted by its size. The plain
one renders, tokenizes and forwards each example on its own, all its options as one padded batch, and takes losses and likeliest
tokens at all positions, as nanochat's core_eval does. Reading a task's file, which both do in the same way and once whatever
the number of examples, is taken off both times.

    python benchmarks/core.py --bundle FOLDER --corpus FOLDER [--seq-len 2048] [--examples 48] [--tasks copa piqa]
    python benchmarks/core.py --bundle FOLDER --run RUN --examples 300      # are the predictions of a trained model the same?

The tokenizer is trained on the first shard of the corpus, or read (`--tokenizer FOLDER`), or the run's.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import model_of, script

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from picotrain.config.schema import HardwareConfig
from picotrain.errors import DataError
from picotrain.evaluation import core
from picotrain.evaluation.bundle import Example, LanguageModeling, MultipleChoice, Task, read_bundle, read_examples
from picotrain.evaluation.scorer import DecoderScorer
from picotrain.model import DTYPES
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.parallel import Parallel
from picotrain.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from picotrain.worker import set_up_process

MARGIN = 1e-5  # below it two implementations may differ
Answer = tuple[int | list[int], float]  # the prediction and by what margin it was made


def prompts_of(example: Example, shots: list[Example], delimiter: str) -> list[str]:
    """As `picotrain.evaluation.prompts` has it, written once more, plainly."""
    before = ""
    for shot in shots:
        if isinstance(shot, LanguageModeling):
            before += shot.context.strip() + delimiter + shot.continuation + "\n\n"
        elif isinstance(shot, MultipleChoice):
            before += shot.query + delimiter + shot.choices[shot.gold] + "\n\n"
        else:
            before += shot.context_options[shot.gold] + delimiter + shot.continuation + "\n\n"
    if isinstance(example, LanguageModeling):
        without = before + example.context.strip() + delimiter
        return [without.strip(), without + example.continuation]
    if isinstance(example, MultipleChoice):
        return [before + example.query + delimiter + choice for choice in example.choices]
    return [before + context + delimiter + example.continuation for context in example.context_options]


def shared_length(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    length = 0
    while all(length < len(ids) and ids[length] == sequences[0][length] for ids in sequences):
        length += 1
    return length


@torch.no_grad()
def plain_example(model: GPT, tokenizer: Tokenizer, examples: list[Example], index: int, task: Task) -> Answer:
    """One example, nothing shared and nothing left out."""
    example = examples[index]
    others = [i for i in range(len(examples)) if i != index]
    drawn = random.Random(1234 + index).sample(others, min(task.num_fewshot, len(others))) if task.num_fewshot else []
    prompts = prompts_of(example, [examples[i] for i in drawn], task.delimiter)
    sequences = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if isinstance(example, LanguageModeling):
        starts = [shared_length(sequences)]
        sequences = sequences[1:]
    elif isinstance(example, MultipleChoice):
        starts = [shared_length(sequences)] * len(sequences)
    else:
        suffix = shared_length([ids[::-1] for ids in sequences])
        starts = [len(ids) - suffix for ids in sequences]
    starts = [max(1, start - max(0, len(ids) - model.seq_len)) for start, ids in zip(starts, sequences, strict=True)]
    sequences = [ids[-model.seq_len :] for ids in sequences]
    width = max(map(len, sequences))
    table = torch.tensor([ids + [tokenizer.bos_id] * (width - len(ids)) for ids in sequences], device=model.embed.weight.device)
    logits = model(table)  # (K, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), table.roll(-1, dims=1).flatten(), reduction="none").view(table.shape)
    likeliest = logits.argmax(dim=-1)
    spans = [slice(start - 1, len(ids) - 1) for start, ids in zip(starts, sequences, strict=True)]
    if isinstance(example, LanguageModeling):
        top = logits[0, spans[0]].topk(2, dim=-1).values
        return likeliest[0, spans[0]].tolist(), float((top[:, 0] - top[:, 1]).min())
    means = [losses[row, span].mean().item() if span.start < span.stop else math.inf for row, span in enumerate(spans)]
    best, second = sorted(means)[:2]
    return means.index(best), second - best


def plain_task(model: GPT, tokenizer: Tokenizer, task: Task, max_per_task: int) -> list[Answer]:
    """The whole task, one example after the other."""
    examples = read_examples(task)
    random.Random(1337).shuffle(examples)
    examples = examples[:max_per_task] if max_per_task > 0 else examples
    return [plain_example(model, tokenizer, examples, index, task) for index in range(len(examples))]


def perturbed(model: GPT, seed: int = 1) -> GPT:
    """`model` with weights of which every part matters: fresh ones have zero matrices and a head near zero."""
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "head.weight" or name.endswith(("attn.o.weight", "mlp.down.weight")):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.size(1) ** -0.5)
    return model


def mismatches(task: Task, result: core.TaskResult, plain: list[Answer]) -> Iterator[dict[str, Any]]:
    """The examples for which the two implementations predict different answers; margin: how near the plain one was to another."""
    for one, (answer, margin) in zip(result.predictions, plain, strict=True):
        if one.prediction != answer:
            yield {"task": task.label, "index": one.index, "prediction": one.prediction, "plain": answer, "margin": margin}


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(seconds, what it gave), the device waited for."""
    started = time.perf_counter()
    found = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def weighted(rows: list[dict[str, Any]]) -> float | None:
    """How many times faster, over the full size of these tasks."""
    plain = sum(row["size"] / row["examples"] * row["plain_s"] for row in rows)
    return round(plain / sum(row["size"] / row["examples"] * row["ours_s"] for row in rows), 2) if rows else None


def measure(task: Task, model: GPT, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, Any]:
    """Both implementations on one task: seconds of each (medians of the repeats, reading aside), and what they predict differently."""
    scorer, parallel = DecoderScorer(model, tokenizer), Parallel.single(options.device)
    ours_s, plain_s = [], []
    read_s = min(timed(lambda: read_examples(task), options.device)[0] for _ in range(3))
    for _ in range(options.repeats):
        seconds, result = timed(lambda: core.evaluate_task(scorer, task, options.examples, parallel), options.device)
        ours_s.append(seconds - read_s)
        seconds, plain = timed(lambda: plain_task(model, tokenizer, task, options.examples), options.device)
        plain_s.append(seconds - read_s)
    if result.problem:
        raise SystemExit(f"{task.label}: {result.problem}\n{result.traceback}")
    row: dict[str, Any] = {
        "benchmark": "core",
        "task": task.label,
        "kind": task.kind,
        "shots": task.num_fewshot,
        "examples": result.n,
        "size": len(read_examples(task)),
        "plain_s": round(statistics.median(plain_s), 4),
        "ours_s": round(statistics.median(ours_s), 4),
        "accuracy": result.accuracy,
        "truncated": result.truncated,
        "empty": result.empty,
        "unclean": result.unclean,
        "close": sum(margin < MARGIN for _, margin in plain),
        "mismatches": list(mismatches(task, result, plain)),
    }
    return row | {"ratio": round(row["plain_s"] / row["ours_s"], 2)}


def report(rows: list[dict[str, Any]], model: GPT, device: str) -> dict[str, Any]:
    """The line of all tasks together."""
    differing = [one for row in rows for one in row["mismatches"]]
    few_shot = [row for row in rows if row["kind"] == "multiple_choice" and row["shots"] > 0]
    return {
        "benchmark": "core",
        "task": "all",
        "ratio": weighted(rows),
        "ratio_few_shot_multiple_choice": weighted(few_shot),
        "ratio_language_modeling": weighted([row for row in rows if row["kind"] == "language_modeling"]),
        "slowest": min((row["ratio"], row["task"]) for row in rows),
        "examples": sum(row["examples"] for row in rows),
        "close": sum(row["close"] for row in rows),
        "mismatches": len(differing),
        "mismatches_beyond_margin": [one for one in differing if one["margin"] >= MARGIN],
        "depth": len(model.blocks),
        "seq_len": model.seq_len,
        "precision": next(name for name, dtype in DTYPES.items() if dtype is model.compute_dtype),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def subject_of(options: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer, on the device and in the dtype it computes in."""
    dtype = DTYPES[options.precision]
    if options.run:
        material, model = model_of(options.run, dtype)
        tokenizer = material.tokenizer
    else:
        tokenizer = tokenizer_of(options)
        model = perturbed(GPT(GPTConfig(depth=options.depth, head_dim=64), tokenizer.vocab_size, options.seq_len, dtype))
    return model.to(options.device, dtype), tokenizer


def tokenizer_of(options: argparse.Namespace) -> Tokenizer:
    """The tokenizer that was named, or one trained on a shard of the corpus."""
    if options.tokenizer:
        return load_tokenizer(options.tokenizer)
    shard = min(options.corpus.glob("*.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(pq.read_table(shard, columns=["text"])["text"].to_pylist(), options.vocab, Path(folder) / "tokenizer.json")
        return load_tokenizer(Path(folder))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--corpus", type=Path, help="folder of Parquet shards to train a tokenizer on")
    vocabulary.add_argument("--tokenizer", type=Path, help="instead of training one")
    vocabulary.add_argument("--run", type=Path, help="model and tokenizer of this run's last checkpoint instead")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--examples", type=int, default=48, help="of each task")
    parser.add_argument("--tasks", nargs="*", help="labels; all by default")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    set_up_process(HardwareConfig(device=options.device, threads=options.threads))
    model, tokenizer = subject_of(options)
    bundle = read_bundle(options.bundle)
    tasks = [task for task in bundle.tasks if not options.tasks or task.label in options.tasks]
    if not tasks:
        raise DataError(f"{options.bundle} has no task {' or '.join(options.tasks)}; it has {', '.join(t.label for t in bundle.tasks)}")
    plain_task(model, tokenizer, tasks[0], 2)  # warm-up
    rows = []
    for task in tasks:
        rows.append(measure(task, model, tokenizer, options))
        yield rows[-1]
    yield report(rows, model, options.device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
