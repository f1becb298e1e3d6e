"""The training step alone: tokens/s, share of the matmul ceiling, MFU, peak memory. One JSON line per setting.

    python benchmarks/step.py                        d2, d4 and d6 as in the peers' published figures (T=512, B=8, vocabulary 8,192)
    python benchmarks/step.py --depth 12 --seq-len 2048 --vocab 32768 --device cuda --precision bf16 --compile

Batches are random ids, already on the device: what the loader costs is in benchmarks/loader.py. The matmul ceiling
(2048^3, same precision) is measured before each setting, since machines drift. Median of the steps after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from typing import Any

import torch

from picotrain import hardware, optim, shape
from picotrain.config.schema import HardwareConfig, ModelConfig, OptimizerConfig
from picotrain.model import DTYPES, GPT, Names
from picotrain.worker import set_up_process

RATES = shape.Rates(0.003, 0.2, 0.004, 0.1)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_flops(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOPs per second of torch.mm at 2048^3, median."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(times[1:])


def measure(depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """One setting: forward, backward and optimizer step on one micro-batch."""
    config = ModelConfig(depth=depth, head_dim=64 if depth < 12 else 128)
    dims, dtype = shape.dims(config), DTYPES[args.precision]
    params = shape.parameters(dims, args.vocab)
    flops = shape.flops_per_token(dims, params, shape.windows(config, args.seq_len), args.seq_len)
    ceiling = matmul_flops(args.device, dtype)
    model = GPT(config, args.vocab, args.seq_len, dtype).to(args.device)
    kernel = model.choose_kernels(Names(args.attention), kept=Names())[0].kernel.name
    model.init_weights(0)
    if args.compile:
        model.compile_blocks()
    own = {"momentum": 0.95, "ns_steps": 5} if args.optimizer == "muon" else {}
    optimizer = optim.build(OptimizerConfig(kind=args.optimizer, matrix_lr=1, embed_lr=1, head_lr=1, **own), model, RATES)
    ids = torch.randint(args.vocab, (args.batch, args.seq_len), device=args.device)
    seconds = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(args.device)
        seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[args.warmup :])
    model(ids, ids).backward()
    optimizer_seconds = []
    for _ in range(5):  # by itself, after the steps: a wait for the device within them would slow them down
        synchronize(args.device)
        started = time.perf_counter()
        optimizer.step()
        synchronize(args.device)
        optimizer_seconds.append(time.perf_counter() - started)
    tokens_per_s = args.batch * args.seq_len / step_s
    name = torch.cuda.get_device_name() if args.device == "cuda" else hardware.cpu().name
    peak = hardware.peak_flops(name)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "benchmark": "step",
        "depth": depth,
        "seq_len": args.seq_len,
        "batch": args.batch,
        "vocab": args.vocab,
        "precision": args.precision,
        "compile": args.compile,
        "attention": kernel,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tok_per_sec": round(tokens_per_s),
        "step_ms": round(1000 * step_s, 1),
        "optimizer": args.optimizer,
        "optimizer_ms": round(1000 * statistics.median(optimizer_seconds), 1),
        "first_step_s": round(seconds[0], 2),
        "gflops": round(flops * tokens_per_s / 1e9, 1),
        "matmul_gflops": round(ceiling / 1e9, 1),
        "of_ceiling": round(flops * tokens_per_s / ceiling, 3),
        "mfu": round(flops * tokens_per_s / peak, 4) if peak else None,
        "peak_rss_mib": round(rss / 2**20),
        "peak_device_mib": round(torch.cuda.max_memory_allocated() / 2**20) if args.device == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention", default="auto", help="a kernel of hardware.attention")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    set_up_process(HardwareConfig(device=args.device))
    for depth in args.depth:
        print(json.dumps(measure(depth, args)), flush=True)


if __name__ == "__main__":
    main()
