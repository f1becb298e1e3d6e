"""Time to a given BPB: `picotrain train` in a process of its own, and what its validation says at the end. One JSON line per recipe.

    python benchmarks/time_to_bpb.py --corpus FOLDER [--target 1.746] [--recipes fast reference] [--steps 160] [--budget 656]

d4, vocabulary 8,192, T=512, compiled, in the machine's best precision; the whole validation shard, before the first step and after
the last. recipes:

    fast        experiment=cpu_d4: Muon with every feature of picotrain.model.features, 4,096 tokens a step
    adamw       the plain model under AdamW, 4,096 tokens a step
    reference   our reproduction of nanochat's recipe of November 2026: Muon, value embeddings, residual scalars, smear, QK scale, rates
                scaled by its rules, 16,384 tokens a step

The horizon is fixed before: the rate falls to its end within --steps of that recipe; with --budget, within what a first short run
says that so many seconds of steps allow. val_bpb: at the end. steps_s: of the steps after the first ten, which is what the peers'
published figure counts; training_s: of all steps; command_s: of the whole process, with imports, the preparation of corpus and
tokenizer unless they are in the cache (--cache), compiling, both validations, the save and the report. matmul_gflops: the machine's
ceiling at 2048^3 in that precision, before the run: figures of two machines are comparable in multiples of it only. model and
optimizer: what the run's own config.yaml says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picotrain import hardware
from picotrain.bench.matmul import flops_per_second
from picotrain.config.saved import read
from picotrain.errors import PicotrainError
from picotrain.model import DTYPES

FEATURES = ["model.value_embeds=true", "model.residual_scalars=true", "model.smear=true", "model.qk_scale=1.3"]
ADAMW = ["optimizer=adamw", "optimizer.scale=false", "optimizer.matrix_lr=0.005", "optimizer.embed_lr=0.6", "optimizer.head_lr=0.02"]
RECIPES: dict[str, tuple[int, list[str]]] = {  # steps, overrides
    "fast": (220, ["experiment=cpu_d4"]),
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
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--cache", type=Path, help="a cache folder; default: an empty one, so that everything is prepared anew")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    machine = hardware.cpu()
    precision = "bf16" if machine.fast_bf16 else "fp32"
    for recipe in options.recipes:
        steps, overrides = RECIPES[recipe]
        with tempfile.TemporaryDirectory() as name:
            words = _words(options, overrides, Path(name), precision)
            steps = options.steps or steps
            if options.budget:
                steps = _within(options.budget, [*words, f"run.dir={name}/probe"])
            ceiling = flops_per_second("cpu", DTYPES[precision])
            found = _train([*words, f"train.max_steps={steps}", f"train.eval_every={steps}", f"run.dir={name}/run"])
        yield {
            "benchmark": "time_to_bpb",
            "recipe": recipe,
            "corpus": Path(options.corpus).name if options.corpus else "pystdlib",
            "precision": precision,
            "threads": machine.cores,
            "hardware": machine.name,
            "matmul_gflops": round(ceiling / 1e9, 1),
            "target": options.target,
            "reached": found["val_bpb"] <= options.target,
            **found,
        }


def _words(options: argparse.Namespace, overrides: list[str], folder: Path, precision: str) -> list[str]:
    data = ["data=files", f"data.path={options.corpus}"] if options.corpus else ["data=pystdlib"]
    words = ["model=d4", "tokenizer.vocab_size=8192", "train.seq_len=512", "train.device_batch_size=8", *data]
    words += ["hardware=cpu", f"hardware.compile={str(hardware.has_compiler()).lower()}", "train.eval_tokens=41943040"]
    words += [f"train.precision={precision}", f"run.seed={options.seed}", f"run.cache_dir={options.cache or folder / 'cache'}"]
    return [*words, "train.sample_every=0", "train.core_metric_every=0", "checkpoint.rolling_minutes=null", *overrides, *options.set]


def _within(budget_s: float, words: list[str]) -> int:
    """How many steps take so many seconds, by a short run without validations; it leaves caches warm as a later run finds them."""
    found = _train([*words, f"train.max_steps={PROBE_STEPS}", "train.eval_every=0"])
    return FIRST_STEPS + int(budget_s / found["step_ms"] * 1000)


def _train(words: list[str]) -> dict[str, Any]:
    """Train in a process of its own, and read its metrics. Raises PicotrainError with what it said where it failed."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "picotrain", "train", *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    command_s = time.perf_counter() - started
    if done.returncode:
        raise PicotrainError(f"`{' '.join(command[2:])}` ended with exit code {done.returncode}:\n{done.stderr}")
    run_dir = Path(next(word for word in reversed(words) if word.startswith("run.dir=")).partition("=")[2])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    steps_s = sum(line["dt_ms"] for line in train[FIRST_STEPS:]) / 1000
    config = read(run_dir / "config.yaml")
    return {
        "model": {key: value for key, value in config["model"].items() if value is not None},
        "optimizer": config["optimizer"]["kind"],
        "val_bpb": round(val[-1]["val_bpb"], 4) if val else None,
        "val_tokens": val[-1]["tokens"] if val else None,
        "steps": len(train),
        "tokens": sum(line["tokens"] for line in train),
        "epochs": round(train[-1]["epoch"], 3),
        "step_ms": round(1000 * steps_s / (len(train) - FIRST_STEPS), 1),
        "steps_s": round(steps_s, 1),
        "training_s": round(train[-1]["total_training_time_s"], 1),
        "command_s": round(command_s, 1),
    }
