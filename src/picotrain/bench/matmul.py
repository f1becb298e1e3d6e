"""The matmul ceiling: FLOPs per second of torch.mm on square matrices, median; best_gflops: of the fastest. One JSON line per precision.

    python benchmarks/matmul.py [--precision fp32 bf16] [--device cpu] [--size 2048]

The size is 2,048 on a CPU, 8,192 on a GPU and 4,096 on Apple's unless given. of_peak: share of the data sheet's peak for dense bf16,
where the device is in the table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from picotrain import hardware
from picotrain.bench.timing import Clock
from picotrain.config.schema import HardwareConfig
from picotrain.model import DTYPES
from picotrain.worker import set_up_process

SIZES = {"cpu": 2048, "cuda": 8192, "mps": 4096}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--size", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of a CPU; default: as a run has them")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    set_up_process(HardwareConfig(device=options.device, threads=options.threads))
    size = options.size or SIZES[options.device]
    name = torch.cuda.get_device_name() if options.device == "cuda" else hardware.cpu().name  # Apple's GPU goes by its chip
    for precision in options.precision:
        times = seconds(options.device, DTYPES[precision], size, options.repeats)
        flops = 2 * size**3 / statistics.median(times)
        peak = hardware.peak_flops(name) if precision == "bf16" else None
        yield {
            "benchmark": "matmul", "precision": precision, "size": size, "gflops": round(flops / 1e9, 1),
            "best_gflops": round(2 * size**3 / min(times) / 1e9, 1), "of_peak": round(flops / peak, 3) if peak else None,
            "device": options.device, "hardware": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip


def flops_per_second(device: str, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """FLOPs per second of torch.mm at size^3, median."""
    size = size or SIZES[device]
    return 2 * size**3 / statistics.median(seconds(device, dtype, size, repeats))


def seconds(device: str, dtype: torch.dtype, size: int, repeats: int) -> list[float]:
    """Of each product of two matrices of size^2."""
    clock = Clock(device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    marks = [clock.mark()]
    for _ in range(repeats + 1):  # the first is a warm-up
        torch.mm(a, a)
        marks.append(clock.mark())
    return [clock.seconds(start, end) for start, end in itertools.pairwise(marks[1:])]
