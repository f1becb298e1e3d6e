"""Start-up: from the command to the first completed step, and to the text of `--help`. One JSON line per mode.

    python benchmarks/startup.py [--depth 4] [--repeats 5] [--modes help eager compiled]

Every figure is of a process of its own, which runs the command: wall time, median over the repeats, whose modes are interleaved. A
step is completed when its line stands in metrics.jsonl; T=512, B=8, vocabulary 8,192, precision by the machine. Corpus and
tokenizer are in the cache before, or prepared. command_s: until the process has ended; of a run of one step, its save and report
included. compiled: with torch's compile cache as an earlier run has left it; first_step_cold_s is that run's own, with an empty one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picotrain import hardware
from picotrain.bench import processes

SEQ_LEN, ROWS, VOCAB = 512, 8, 8192
POLL_S = 0.005


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", choices=["help", "eager", "compiled"], nargs="+", default=["help", "eager", "compiled"])


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    modes = list(dict.fromkeys(options.modes))
    base = {"benchmark": "startup", "device": options.device, "depth": options.depth, "threads": hardware.cores()}
    if "compiled" in modes and options.device == "cpu" and not hardware.has_compiler():
        modes.remove("compiled")
        yield base | {"mode": "compiled", "not_measured": "torch.compile needs a C++ compiler on a CPU, and none was found"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(modes) - {"help"}:
            processes.ended(processes.command(["tokenizer", "train", "data=pystdlib", f"tokenizer.vocab_size={VOCAB}"]))
        cold = _first_step("compiled", options, folder) if "compiled" in modes else {}
        seconds: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
        for _ in range(options.repeats):
            for mode, found in seconds.items():
                found.append(_help() if mode == "help" else _first_step(mode, options, folder))
    for mode, found in seconds.items():
        line = base | {"mode": mode, "repeats": options.repeats}
        line |= {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
        yield line | ({"first_step_cold_s": round(cold["first_step_s"], 3)} if mode == "compiled" else {})


def _help() -> dict[str, float]:
    started = time.perf_counter()
    processes.ended(processes.command(["--help"]))
    return {"command_s": time.perf_counter() - started}


def _first_step(mode: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of one step: seconds until its line is written, and until the process has ended."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run_dir = Path(place) / "run"
        words = ["data=pystdlib", f"model=d{options.depth}", f"tokenizer.vocab_size={VOCAB}", f"train.seq_len={SEQ_LEN}"]
        words += [f"train.device_batch_size={ROWS}", f"train.total_batch_size={ROWS * SEQ_LEN}", "train.max_steps=1", "train.eval_every=0"]
        words += ["train.core_metric_every=0", "train.sample_every=0", f"hardware.device={options.device}", "hardware.nproc_per_node=1"]
        words += [f"hardware.compile={str(mode == 'compiled').lower()}", f"run.dir={run_dir}"]
        started = time.perf_counter()
        process = processes.command(["train", *words], TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"))
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and b'"train"' in metrics.read_bytes()) and process.poll() is None:
            time.sleep(POLL_S)
        first_step_s = time.perf_counter() - started
        processes.ended(process)
        return {"first_step_s": first_step_s, "command_s": time.perf_counter() - started}
