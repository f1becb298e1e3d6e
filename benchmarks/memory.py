"""Peak memory of training, predicted by the plan and measured. One JSON line per setting.

    python benchmarks/memory.py [--depth 2 4] [--batch 2 8] [--precision fp32 bf16] [--compile false true] [--grad-accum 1 2]
    python benchmarks/memory.py --recompute none selective full
    python benchmarks/memory.py --device cuda --depth 12 20 --seq-len 2048 --vocab 32768 --batch 4 16 --precision bf16 --compile true
    python benchmarks/memory.py --count --depth 12 20 --seq-len 2048 --vocab 32768 --batch 4 16 --precision bf16

Every setting is a run of --steps steps in a process of its own, as `picotrain train` does it, saved in the background half-way and at the
end. measured_mib: on a CPU the most that was resident (VmHWM; elsewhere than on Linux getrusage), on a GPU the most that torch had
allocated. ratio: measured / predicted. The data is the embedded standard library, from the cache or prepared before.

--count runs nothing: a step for a GPU is followed on torch's meta device, and its live tensors are counted (live.py). What
CUDA's context, libraries and fragmentation take is in neither figure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import script

from picotrain import planning
from picotrain import run as runs
from picotrain.bench import processes
from picotrain.config import compose
from picotrain.lock import RunLock
from picotrain.planning import Plan
from picotrain.worker import run as train

SWITCH = ["false", "true"]
VARIED = ("depth", "batch", "grad_accum", "precision", "compile", "recompute", "optimizer")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="rows of a micro-batch")
    parser.add_argument("--grad-accum", type=int, nargs="+", default=[1], help="micro-batches a step")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp8"], nargs="+", default=["fp32"])
    parser.add_argument("--compile", choices=SWITCH, nargs="+", default=["false"])
    parser.add_argument("--recompute", choices=["none", "selective", "full"], nargs="+", default=["none"])
    parser.add_argument("--optimizer", choices=["adamw", "muon"], nargs="+", default=["adamw"])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--count", action="store_true", help="count a GPU's live tensors on the meta device instead of running")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the config, e.g. hardware.threads=1")
    parser.add_argument("--steps", type=int, default=6)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    settings = [
        argparse.Namespace(**vars(options) | dict(zip(VARIED, [[value] for value in values], strict=True)))
        for values in itertools.product(*(getattr(options, key) for key in VARIED))
    ]
    if not options.count:  # a tokenizer that is not there yet would be trained by the run, and its memory would be the run's
        processes.ended(processes.command(["tokenizer", "train", "data=pystdlib", f"tokenizer.vocab_size={options.vocab}"]))
    for setting in settings:
        if options.count:
            yield _counted(setting)
        elif len(settings) == 1:
            yield _measured(setting)
        else:
            yield from processes.lines(__file__, processes.words({key: value for key, value in vars(setting).items() if key != "count"}))


def overrides(setting: argparse.Namespace, device: str) -> list[str]:
    """What a run of this setting is configured by."""
    (depth,), (batch,), (micro_batches,) = setting.depth, setting.batch, setting.grad_accum
    values = {
        "model.depth": depth, "model.head_dim": 64 if depth < 12 else 128, "tokenizer.vocab_size": setting.vocab, "data": "pystdlib",
        "optimizer": setting.optimizer[0], "train.seq_len": setting.seq_len, "train.device_batch_size": batch,
        "train.total_batch_size": batch * micro_batches * setting.seq_len, "train.max_steps": setting.steps,
        "train.save_every": max(1, setting.steps // 2), "train.precision": setting.precision[0], "train.eval_every": 0,
        "train.sample_every": 0, "train.core_metric_every": 0, "hardware.device": device, "hardware.nproc_per_node": 1,
        "hardware.compile": setting.compile[0], "hardware.recompute": setting.recompute[0],
    }  # fmt: skip
    return [*(f"{key}={value}" for key, value in values.items()), *setting.set]


def _measured(setting: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, and ask how much it has held."""
    words = overrides(setting, setting.device)
    with tempfile.TemporaryDirectory() as folder:
        config = runs.resolve(compose([*words, f"run.dir={folder}/run"]))
        run_dir = Path(config.run.dir or "")
        with RunLock(run_dir), contextlib.redirect_stdout(sys.stderr):
            material = runs.open_run(config, words, lambda text: None)
            assert material is not None, "the run is new"
            train(run_dir, material)
    return _line(setting, material.plan, peak_bytes(material.plan.device))


def peak_bytes(device: str) -> int:
    """The most that this process has held: allocated on a GPU, else resident."""
    import torch

    from picotrain.bench.timing import peak_rss_bytes

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


def _counted(setting: argparse.Namespace) -> dict[str, Any]:
    from live import gpu_step_bytes

    config = runs.resolve(compose([*overrides(setting, "cuda"), "hardware.name=meta"]))
    plan = planning.make(config, "memory")
    return _line(setting, plan, gpu_step_bytes(config, plan)) | {"counted": "on the meta device"}


def _line(setting: argparse.Namespace, plan: Plan, peak: int) -> dict[str, Any]:
    return {
        "benchmark": "memory",
        "device": plan.device,
        "depth": plan.depth,
        "seq_len": plan.seq_len,
        "batch": plan.device_batch_size,
        "grad_accum": plan.grad_accum_steps,
        "vocab": plan.vocab_size,
        "precision": plan.precision,
        "compile": plan.compile,
        "recompute": plan.recompute,
        "optimizer": setting.optimizer[0],
        "set": setting.set,
        "hardware": plan.hardware_name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "measured_mib": round(peak / 2**20),
        "predicted_mib": round(plan.predicted_memory_bytes / 2**20),
        "ratio": round(peak / plan.predicted_memory_bytes, 3),
        "predicted_parts_mib": {part: round(n / 2**20) for part, n in plan.predicted_memory.items()},
    }


if __name__ == "__main__":
    raise SystemExit(script(__file__))
