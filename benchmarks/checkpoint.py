"""How long a save holds the loop: in the background against waiting for the disk, the same state in one run. One JSON line.

    python benchmarks/checkpoint.py [--depth 6] [--saves 5] [--folder DIR]

sync_s: a synchronous save, fsync and hashing included. stall_s: how long the loop is held by a background save, from the second
one on (the first makes the host blocks). stall_share: the one over the other, medians. step_ms, step_ms_while_saving: a
training step (8 x 128 tokens) without and with a save under way, medians; slow_down: their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from picotrain import optim
from picotrain.checkpoint import Saver
from picotrain.config.schema import AdamWConfig, CheckpointConfig, ModelConfig
from picotrain.model import GPT
from picotrain.shape import Rates
from picotrain.state import TrainState

ROWS, SEQ_LEN, VOCAB = 8, 128, 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary folder")
    args = parser.parse_args()
    model = GPT(ModelConfig(depth=args.depth, head_dim=64), VOCAB, SEQ_LEN)
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
    print(
        json.dumps(
            {
                "benchmark": "checkpoint",
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
        )
    )


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
    main()
