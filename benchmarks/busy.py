"""A machine that others use: tokens/s of training, validating and sampling beside so many busy processes, by how threads wait.

    python benchmarks/busy.py                          0, 1, 2 and 8 busy processes; about ten minutes
    python benchmarks/busy.py --loads 0 2 --seconds 3 --repeats 1

chosen: GOMP_SPINCOUNT as picotrain sets it (hardware.SPINS); active: libgomp's own 300,000 spins; passive: none, as under
OMP_WAIT_POLICY=passive. Every figure is of a process of its own, in an experiment=cpu_speedrun's model and batch, median over the
repeats, whose modes are interleaved. of_better: the chosen one's share of the better of the other two. One JSON line per load.
The busy processes end with the measurement, however that ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from common import script

from picotrain import hardware
from picotrain.bench import processes

MODES = {"chosen": str(hardware.SPINS), "active": "300000", "passive": "0"}  # of GOMP_SPINCOUNT, which wins over OMP_WAIT_POLICY
WORK = ("training", "validating", "sampling")
# Ends by itself when whoever started it is gone.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100_000): pass"
SETTLE_S = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 2, 8], help="busy processes beside")
    parser.add_argument("--modes", choices=list(MODES), nargs="+", default=list(MODES))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each kind of work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this process, as it is, without any load")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.here:
        yield {"benchmark": "busy", "waiting": hardware.waiting(), **_tokens_per_s(options.seconds)}
        return
    for load in options.loads:
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in dict.fromkeys(options.modes)}
        with busy(load):
            for _ in range(options.repeats):
                for mode, lines in found.items():
                    lines += processes.lines(__file__, ["--here", "--seconds", str(options.seconds)], {"GOMP_SPINCOUNT": MODES[mode]})
        rates = {work: {mode: round(statistics.median(line[work] for line in lines)) for mode, lines in found.items()} for work in WORK}
        yield {
            "benchmark": "busy",
            "load": load,
            "cores": hardware.cores(),
            "hardware": hardware.cpu().name,
            "unit": "tokens/s",
            "repeats": options.repeats,
            "spins": hardware.SPINS,
            **rates,
            "of_better": {work: share for work in WORK if (share := _of_better(rates[work])) is not None},
        }


def _of_better(rates: dict[str, int]) -> float | None:
    others = [rate for mode, rate in rates.items() if mode != "chosen"]
    return round(rates["chosen"] / max(others), 2) if "chosen" in rates and others and max(others) else None


@contextmanager
def busy(count: int) -> Generator[list[subprocess.Popen[bytes]]]:
    """So many processes that do nothing but compute, ended at the end."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]))
        time.sleep(SETTLE_S)
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _tokens_per_s(seconds: float) -> dict[str, float]:
    """Of the three kinds of work, in this process."""
    import numpy as np
    import torch

    from picotrain import evaluation, planning
    from picotrain.bench.step import Training
    from picotrain.bench.timing import Clock
    from picotrain.config import compose
    from picotrain.parallel import Parallel
    from picotrain.sampling import generate_rows
    from picotrain.worker import set_up_process

    config = planning.decide(compose(["experiment=cpu_speedrun", "hardware.compile=false"]))
    set_up_process(config.hardware)
    plan = planning.make(config, "busy")
    training, clock, parallel = Training(plan, config, plan.grad_accum_steps), Clock("cpu"), Parallel.setup("cpu")
    rows = np.random.default_rng(0).integers(plan.vocab_size, size=(plan.rows_per_step, plan.seq_len + 1))
    ones, prompt, new_tokens = np.ones(plan.vocab_size, dtype=np.int64), torch.zeros((1, 1), dtype=torch.int64), 32

    def validate() -> None:
        evaluation.bits_per_byte(training.model, lambda: evaluation.Rows(rows), ones, plan.device_batch_size, parallel)

    def sample() -> None:
        for _ in generate_rows(training.model, prompt, new_tokens, temperature=0, top_k=None, seed=0):
            pass

    batch = plan.total_batch_size
    work: tuple[tuple[Callable[[], object], int], ...] = ((lambda: training.step(clock), batch), (validate, batch), (sample, new_tokens))
    return {name: round(_rate(each, tokens, seconds), 1) for name, (each, tokens) in zip(WORK, work, strict=True)}


def _rate(work: Callable[[], object], tokens: int, seconds: float) -> float:
    """Tokens a second of work that is done again and again for so long, after a first time that does not count."""
    work()
    started, count = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds or not count:
        work()
        count += 1
    return count * tokens / took if took else 0.0


if __name__ == "__main__":
    raise SystemExit(script(__file__))
