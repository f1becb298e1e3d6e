"""Time to a given BPB: `picotrain train` in a process of its own, and its last checkpoint on validation text. One JSON line per recipe.

    python benchmarks/time_to_bpb.py --corpus FOLDER [--target 1.746] [--recipes fast reference] [--steps 160] [--budget 656]

d4, vocabulary 8,192, T=512, compiled, in the machine's best precision. recipes:

    fast        experiment=cpu_d4: Muon with every feature of picotrain.model.features, 4,096 tokens a step
    adamw       the plain model under AdamW, 4,096 tokens a step
    reference   our reproduction of nanochat's recipe of November 2026: Muon, value embeddings, residual scalars, smear, QK scale, rates
                scaled by its rules, 16,384 tokens a step

The horizon is fixed before: the rate falls to its end within --steps of that recipe; with --budget, within what a first short run
says that so many seconds of steps allow.

What is timed is what the peers' published figures time. steps_s: of the steps after the first ten. command_s: of the whole process that
trains, with imports, compiling from an empty cache, two validations over 131 k tokens, the save and the report; corpus and tokenizer
are prepared before it (prepare_s). val_bpb is measured after it, over the validation shard or its first --val-tokens, by the weights
of the last step. training_s: of all steps. matmul_gflops: the machine's ceiling at 2048^3 in that precision, before the run: figures of
two machines are comparable in multiples of it only. model and optimizer: what the run's own config.yaml says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import model_of, script

from picotrain import hardware
from picotrain.bench import processes
from picotrain.bench.matmul import flops_per_second
from picotrain.config.saved import read
from picotrain.data.stream import validation_rows
from picotrain.evaluation import Bpb, Rows, bits_per_byte
from picotrain.model import DTYPES
from picotrain.parallel import Parallel
from picotrain.worker import set_up_process

FEATURES = ["model.value_embeds=true", "model.residual_scalars=true", "model.smear=true", "model.qk_scale=1.3"]
ADAMW = ["optimizer=adamw", "optimizer.scale=false", "optimizer.matrix_lr=0.005", "optimizer.embed_lr=0.6", "optimizer.head_lr=0.02"]
RECIPES: dict[str, tuple[int, list[str]]] = {  # steps, overrides
    "fast": (150, ["experiment=cpu_d4"]),
    "adamw": (320, [*ADAMW, "train.total_batch_size=4096"]),
    "reference": (200, ["optimizer=muon", *FEATURES, "train.total_batch_size=16384"]),
}
PROBE_STEPS = 30
FIRST_STEPS = 10  # that the peers' published figure leaves out


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", help="a folder of Parquet shards, the last of which validates; default: the standard library")
    parser.add_argument("--target", type=float, default=1.746, help="BPB to be reached")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["fast", "reference"])
    parser.add_argument("--steps", type=int, help="of every recipe; default: its own")
    parser.add_argument("--budget", type=float, help="seconds of steps, which decide how many there are")
    parser.add_argument("--val-tokens", type=int, help="of the validation shard, from its start; default: all")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--cache", type=Path, help="a cache folder; default: an empty one; compiled code is never taken from it")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    machine = hardware.cpu()
    precision = "bf16" if machine.fast_bf16 else "fp32"
    for recipe in options.recipes:
        steps, overrides = RECIPES[recipe]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = _words(options, overrides, folder, precision)
            prepare_s = _seconds(["tokenizer", "train", *words])
            steps = options.steps or steps
            if options.budget:
                steps = _within(options.budget, words, folder / "probe")
            ceiling = flops_per_second("cpu", DTYPES[precision])
            found = _train([*words, f"train.max_steps={steps}", f"train.eval_every={steps}"], folder / "run")
            val = _validated(folder / "run", options.val_tokens)
        yield {
            "benchmark": "time_to_bpb",
            "recipe": recipe,
            "corpus": Path(options.corpus).name if options.corpus else "pystdlib",
            "precision": precision,
            "threads": machine.cores,
            "hardware": machine.name,
            "matmul_gflops": round(ceiling / 1e9, 1),
            "target": options.target,
            "reached": val.val_bpb <= options.target,
            "val_bpb": round(val.val_bpb, 4),
            "val_tokens": val.tokens,
            "prepare_s": round(prepare_s, 1),
            **found,
        }


def _words(options: argparse.Namespace, overrides: list[str], folder: Path, precision: str) -> list[str]:
    data = ["data=files", f"data.path={options.corpus}"] if options.corpus else ["data=pystdlib"]
    words = ["model=d4", "tokenizer.vocab_size=8192", "train.seq_len=512", "train.device_batch_size=8", *data]
    words += ["hardware=cpu", f"hardware.compile={str(hardware.has_compiler()).lower()}", "train.eval_tokens=131072"]
    words += [f"train.precision={precision}", f"run.seed={options.seed}", f"run.cache_dir={options.cache or folder / 'cache'}"]
    return [*words, "train.sample_every=0", "train.core_metric_every=0", "checkpoint.rolling_minutes=null", *overrides, *options.set]


def _within(budget_s: float, words: list[str], run_dir: Path) -> int:
    """How many steps take so many seconds, by a short run without validations."""
    found = _train([*words, f"train.max_steps={PROBE_STEPS}", "train.eval_every=0"], run_dir)
    return FIRST_STEPS + int(budget_s / found["step_ms"] * 1000)


def _train(words: list[str], run_dir: Path) -> dict[str, Any]:
    """Train in a process of its own with nothing compiled before, and read its metrics. Raises PicotrainError where it failed."""
    command_s = _seconds(["train", *words, f"run.dir={run_dir}"], TORCHINDUCTOR_CACHE_DIR=f"{run_dir}-compiled")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    steps_s = sum(line["dt_ms"] for line in train[FIRST_STEPS:]) / 1000
    config = read(run_dir / "config.yaml")
    return {
        "model": {key: value for key, value in config["model"].items() if value is not None},
        "optimizer": config["optimizer"]["kind"],
        "steps": len(train),
        "tokens": sum(line["tokens"] for line in train),
        "epochs": round(train[-1]["epoch"], 3),
        "step_ms": round(1000 * steps_s / (len(train) - FIRST_STEPS), 1),
        "steps_s": round(steps_s, 1),
        "training_s": round(train[-1]["total_training_time_s"], 1),
        "command_s": round(command_s, 1),
    }


def _seconds(words: list[str], **variables: str) -> float:
    """What `picotrain words...` takes."""
    started = time.perf_counter()
    processes.ended(processes.command(words, **variables))
    return time.perf_counter() - started


def _validated(run_dir: Path, max_tokens: int | None) -> Bpb:
    """The last checkpoint's bits per byte over the validation shard, or its first so many tokens."""
    material, model = model_of(run_dir)
    _, plan, corpus, tokenizer = material
    set_up_process(material.config.hardware)
    max_rows = max_tokens and max(1, max_tokens // plan.seq_len)
    rows = Rows(validation_rows(corpus, tokenizer, plan.seq_len, max_rows, plan.unit_bytes).rows)
    found = bits_per_byte(model, lambda: rows, tokenizer.token_bytes(), plan.device_batch_size, Parallel.single())
    assert found, "a process alone does not give up"
    return found[0]


if __name__ == "__main__":
    raise SystemExit(script(__file__))
