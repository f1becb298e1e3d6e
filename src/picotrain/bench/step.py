"""The training step alone: tokens/s, share of the matmul ceiling, MFU, peak memory. One JSON line per setting.

    python benchmarks/step.py                        d2, d4 and d6 as in the peers' published figures (T=512, B=8, vocabulary 8,192)
    python benchmarks/step.py --depth 12 --seq-len 2048 --vocab 32768 --device cuda --precision bf16 --compile
    python benchmarks/step.py --depth 4 6 --precision fp32 bf16 --compile --repeats 3

Batches are random ids, already on the device: what the loader costs is in benchmarks/loader.py. The matmul ceiling (same
precision, see benchmarks/matmul.py) is measured before each setting, since machines drift. Medians of the steps after the warm-up;
forward_ms, backward_ms and optimizer_ms are parts of the same steps, over all micro-batches.

Several settings, or repeats, are measured in a process each, settings interleaved: then the medians are over the repeats, each
tokens/s stands in tok_per_sec_all, first_step_s is that of the first process and first_step_warm_s the median of the others.

predicted_mib is what the plan of such a run says of memory, of_predicted the peak's share of it: of allocated bytes on a GPU, of the
whole process' RSS on a CPU. `--batch auto` takes the plan's micro-batch. On a GPU its clocks, power and temperature are read under
the load of some more steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from picotrain import optim, planning
from picotrain import run as runs
from picotrain.bench import environment, matmul, processes
from picotrain.bench.timing import Clock, peak_rss_bytes
from picotrain.config import Config, compose
from picotrain.model import Names, build, compute_dtype
from picotrain.planning import pace
from picotrain.worker import set_up_process


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=_rows, default=8, help="rows of a micro-batch, or auto")
    parser.add_argument("--grad-accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp8"], nargs="+", default=["fp32"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--optimizer", nargs="+", default=["adamw"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the config, e.g. model.logit_softcap=15")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="processes per setting")


def _rows(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    settings = [
        argparse.Namespace(**vars(options) | {"depth": [depth], "precision": [precision], "optimizer": [optimizer], "repeats": 1})
        for depth, precision, optimizer in itertools.product(options.depth, options.precision, options.optimizer)
    ]
    if len(settings) * options.repeats == 1:
        yield measure(config_of(settings[0]), settings[0])
        return
    found: list[list[dict[str, Any]]] = [[] for _ in settings]
    for repeat in range(options.repeats):
        for setting, lines in zip(settings, found, strict=True):
            lines += processes.lines("step", processes.words(vars(setting)))
            if repeat == options.repeats - 1:
                yield lines[0] if options.repeats == 1 else medians(lines)


def medians(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of several of the same setting."""
    found = {
        key: round(statistics.median(line[key] for line in lines), 4) if _differs(key, lines) else value for key, value in lines[0].items()
    }
    first, *others = (line["first_step_s"] for line in lines)
    found |= {"repeats": len(lines), "tok_per_sec_all": [line["tok_per_sec"] for line in lines]}
    return found | {"first_step_s": first, "first_step_warm_s": round(statistics.median(others), 2)}


def _differs(key: str, lines: list[dict[str, Any]]) -> bool:
    return isinstance(lines[0][key], int | float) and any(line[key] != lines[0][key] for line in lines)


def config_of(options: argparse.Namespace) -> Config:
    """The config of a run whose steps are these. Raises ConfigError when the machine lacks what they want."""
    (depth,), (precision,), (optimizer,) = options.depth, options.precision, options.optimizer
    tokens = -1 if options.batch == "auto" else options.batch * options.seq_len * options.grad_accum
    values = {
        "model.depth": depth, "model.head_dim": 64 if depth < 12 else 128, "tokenizer.vocab_size": options.vocab, "data": "pystdlib",
        "optimizer": optimizer, "train.seq_len": options.seq_len, "train.device_batch_size": options.batch, "train.max_steps": 1,
        "train.total_batch_size": tokens, "train.precision": precision, "hardware.device": options.device,
        "hardware.nproc_per_node": 1, "hardware.compile": options.compile, "checkpoint.background": False,
    }  # fmt: skip
    config = runs.resolve(compose([*(f"{key}={str(value).lower()}" for key, value in values.items()), *options.set]))
    runs.check_machine(config)
    return config


class Training:
    """A model and its optimizer as a run has them, on one batch of random ids that is already on the device."""

    def __init__(self, plan: planning.Plan, config: Config, grad_accum: int):
        self.model = build(config.model, plan.vocab_size, plan.seq_len, plan.precision, plan.recompute).to(plan.device)
        hw = config.hardware
        chosen = self.model.choose_kernels(Names(hw.attention, hw.window_attention), kept=Names())
        self.kernels = Names(*(choice.kernel.name for choice in chosen)) if chosen else Names()
        self.model.init_weights(0)
        if plan.compile:
            self.model.compile_blocks()
        self._optimizer = optim.build(config.optimizer, self.model, plan.rates)
        self._ids = torch.randint(plan.vocab_size, (plan.device_batch_size, plan.seq_len), device=plan.device)
        self._grad_accum = grad_accum

    def step(self, clock: Clock) -> list[Any]:
        """Marks: at its start, after each forward and each backward, after the optimizer."""
        marks = [clock.mark()]
        for _ in range(self._grad_accum):
            loss = self.model(self._ids, self._ids) / self._grad_accum
            marks.append(clock.mark())
            loss.backward()
            marks.append(clock.mark())
        self._optimizer.step()
        marks.append(clock.mark())
        self._optimizer.zero_grad(set_to_none=True)
        return marks


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """One setting: forward and backward on every micro-batch of a step, and the optimizer."""
    set_up_process(config.hardware)
    plan = planning.make(config, "step")
    clock = Clock(plan.device)
    ceiling = matmul.flops_per_second(plan.device, compute_dtype(plan.precision))
    training = Training(plan, config, options.grad_accum)

    steps = [training.step(clock) for _ in range(options.warmup + options.steps)]
    starts = [*(marks[0] for marks in steps), clock.mark()]
    seconds = [clock.seconds(start, end) for start, end in itertools.pairwise(starts)]
    step_s = statistics.median(seconds[options.warmup :])
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else None
    rss = peak_rss_bytes()
    tokens_per_s = options.grad_accum * plan.device_batch_size * plan.seq_len / step_s
    flops = plan.flops_per_token * tokens_per_s
    load = environment.gpu(environment.STATE, lambda: clock.seconds(starts[0], training.step(clock)[-1])) if plan.device == "cuda" else {}
    return {
        "benchmark": "step", **_setting(plan, config, options), "attention": training.kernels.attention,
        "window_attention": training.kernels.window_attention if plan.window_attention else None,
        "tok_per_sec": round(tokens_per_s), "step_ms": round(1000 * step_s, 1), **_parts_ms(clock, steps[options.warmup :]),
        "first_step_s": round(seconds[0], 2), "gflops": round(flops / 1e9, 1), "matmul_gflops": round(ceiling / 1e9, 1),
        "of_ceiling": round(flops / ceiling, 3), "mfu": round(flops / plan.peak_flops, 4) if plan.peak_flops else None,
        "peak_rss_mib": round(rss / 2**20), "peak_device_mib": round(peak / 2**20) if peak else None,
        "predicted_mib": round(plan.predicted_memory_bytes / 2**20), "of_predicted": round((peak or rss) / plan.predicted_memory_bytes, 3),
        **load,
    }  # fmt: skip


def _setting(plan: planning.Plan, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "depth": plan.depth, "seq_len": plan.seq_len, "batch": plan.device_batch_size, "grad_accum": options.grad_accum,
        "vocab": plan.vocab_size, "precision": plan.precision, "compile": plan.compile, "optimizer": config.optimizer.kind,
        "recompute": plan.recompute, "device": plan.device, "hardware": plan.hardware_name, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "set": options.set, **pace.setting(plan, config),
    }  # fmt: skip


def _parts_ms(clock: Clock, steps: list[list[Any]]) -> dict[str, float]:
    """Medians over the steps of what their marks tell apart."""
    spans = [[1000 * clock.seconds(start, end) for start, end in itertools.pairwise(marks)] for marks in steps]
    parts = {"forward_ms": slice(0, -1, 2), "backward_ms": slice(1, -1, 2), "optimizer_ms": slice(-1, None)}
    return {name: round(statistics.median(sum(ms[part]) for ms in spans), 1) for name, part in parts.items()}
