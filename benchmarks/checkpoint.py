"""How long a save holds the loop: in the background against waiting for the disk, the same state in one run. One JSON line, and one
more on how long a run takes from a signal to a whole checkpoint.

    python benchmarks/checkpoint.py [--depth 6] [--saves 5] [--folder DIR] [--signals 5]

sync_s: a synchronous save, fsync and hashing included. stall_s: how long the loop is held by a background save, from the second
one on (the first makes the host blocks). stall_share: the one over the other, medians. step_ms, step_ms_while_saving: a
training step (8 x 128 tokens) without and with a save under way, medians; slow_down: their ratio.

signal_to_whole_s: a run of that depth gets SIGTERM at random moments; seconds until its checkpoint is whole, seen from outside:
median and longest. signal_to_exit_s: until the process has ended, its report written. Text and tokenizer are taken from the cache,
or prepared.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import script

import torch

from picotrain import optim
from picotrain.checkpoint import Saver
from picotrain.config.schema import CheckpointConfig
from picotrain.errors import PicotrainError
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.optimizers.adamw import AdamWConfig
from picotrain.shape import Rates
from picotrain.state import TrainState

ROWS, SEQ_LEN, VOCAB = 8, 128, 32_768


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--signals", type=int, default=5, help="how often a run is stopped")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary folder")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield measure_saves(args)
    if args.signals:
        yield measure_signals(args)


def measure_saves(args: argparse.Namespace) -> dict[str, Any]:
    """Saves of a state in this process."""
    model = GPT(GPTConfig(depth=args.depth, head_dim=64), VOCAB, SEQ_LEN)
    model.init_weights(0)
    optimizer = optim.build(AdamWConfig(matrix_lr=1e-3, embed_lr=1e-3, head_lr=1e-3), model, Rates(1e-3, 1e-3, 1e-3, 0.1))
    state = TrainState(model, optimizer, loader={"row": 0, "lanes_count": 1, "lanes": [[[0, 0, 0, 0]]]})
    quiet = [step(state) for _ in range(4)][1:]

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder) / "run" / "checkpoints"
        root.parent.mkdir()
        section = CheckpointConfig(keep_last=1, keep_best=False, rolling_minutes=None)
        waiting = Saver(root, section.model_copy(update={"background": False}))
        sync_s = []
        for _ in range(args.saves):
            started = time.perf_counter()
            waiting.save(state, 0)
            sync_s.append(time.perf_counter() - started)
            state.step += 1
        n_bytes = sum(path.stat().st_size for path in next(root.glob("step_*")).iterdir())

        background = Saver(root, section)
        stall_s, busy = [], []
        for _ in range(args.saves + 1):
            started = time.perf_counter()
            background.save(state, 0)
            stall_s.append(time.perf_counter() - started)
            while background._thread is not None and background._thread.is_alive():
                busy.append(step(state))
            background.wait()
            assert all(saved.error is None for saved in background.poll())
    stall, sync = statistics.median(stall_s[1:]), statistics.median(sync_s)
    step_ms, busy_ms = statistics.median(quiet), statistics.median(busy)
    return {
        "benchmark": "checkpoint",
        "depth": args.depth,
        "state_mb": round(n_bytes / 1e6),
        "sync_s": round(sync, 3),
        "first_stall_s": round(stall_s[0], 3),
        "stall_s": round(stall, 3),
        "stall_share": round(stall / sync, 3),
        "step_ms": round(step_ms),
        "step_ms_while_saving": round(busy_ms),
        "slow_down": round(busy_ms / step_ms, 2),
        "threads": torch.get_num_threads(),
    }


def measure_signals(args: argparse.Namespace) -> dict[str, Any]:
    """Runs that are stopped."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        words = [f"model.depth={args.depth}", f"tokenizer.vocab_size={VOCAB}", f"train.seq_len={SEQ_LEN}", "data=pystdlib", "hardware=cpu"]
        words += [f"train.total_batch_size={ROWS * SEQ_LEN * 4}", f"train.device_batch_size={ROWS}", "train.max_steps=100000"]
        words += ["train.eval_every=0", "train.sample_every=0", "checkpoint.keep_last=1", "checkpoint.rolling_minutes=null"]
        to_whole, to_exit = zip(*(stop([*words, f"run.dir={run}"], run) for _ in range(args.signals)), strict=True)
    line = {"benchmark": "signal", "depth": args.depth, "times": args.signals, "tokens_per_micro_batch": ROWS * SEQ_LEN}
    line |= {"signal_to_whole_s": round(statistics.median(to_whole), 2), "longest_s": round(max(to_whole), 2)}
    return line | {"signal_to_exit_s": round(statistics.median(to_exit), 2)}


def stop(words: list[str], run: Path) -> tuple[float, float]:
    """Start the run or go on with it, stop it some seconds later; seconds until its checkpoint was whole, and until it had ended."""
    latest = run / "checkpoints" / "latest"
    steps, before = trained_steps(run), written_ns(latest)
    process = subprocess.Popen([sys.executable, "-m", "picotrain", "train", *words], stdout=subprocess.DEVNULL)
    try:
        wait_while(lambda: trained_steps(run) < steps + 2, process, poll_s=0.2)
        time.sleep(random.uniform(0, 2))
        started = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        wait_while(lambda: written_ns(latest) == before, process, poll_s=0.005)
        to_whole = time.perf_counter() - started
        assert process.wait() == 75
        return to_whole, time.perf_counter() - started
    finally:
        process.kill()  # where something went wrong: nothing must go on in a folder that is removed
        process.wait()


def trained_steps(run: Path) -> int:
    """How many steps a run has written down."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"kind": "train"') if file.exists() else 0


def written_ns(file: Path) -> int:
    """When a file was written, 0: never."""
    return file.stat().st_mtime_ns if file.exists() else 0


def wait_while(condition: Callable[[], bool], process: subprocess.Popen[bytes], poll_s: float) -> None:
    """Look every poll_s seconds. Raises PicotrainError where the process ends first."""
    while condition():
        if process.poll() is not None and condition():
            raise PicotrainError(f"the run has ended with exit code {process.returncode}")
        time.sleep(poll_s)


def step(state: TrainState) -> float:
    """One training step; its milliseconds."""
    started = time.perf_counter()
    ids = torch.randint(VOCAB, (ROWS, SEQ_LEN + 1))
    state.model(ids[:, :-1], ids[:, 1:]).backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
