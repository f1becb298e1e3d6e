"""The step under changes of the config, side by side in one process: what each costs. One JSON line per variant.

    python benchmarks/variants.py                    each model feature, beside the plain model under Muon
    python benchmarks/variants.py --variants "model.window_pattern=SL" "hardware.attention=sdpa model.n_kv_heads=2" --rounds 60

A variant is one or more overrides in one word. In every round each variant and the config without any makes one step, in another order each
time: a machine that drifts by a quarter within minutes drifts for all of them. times: the step's time over that of the config
without a variant, the median of the ratios within a round; quartiles: of those ratios. Random ids, on the device. What a process has
only one of (hardware.threads, hardware.device) cannot be varied.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from typing import Any

from common import script

import torch

from picotrain import planning
from picotrain.bench.step import Training, config_of
from picotrain.bench.timing import Clock
from picotrain.config import Config
from picotrain.errors import ConfigError, Problem
from picotrain.worker import set_up_process

FEATURES = ("model.value_embeds=true", "model.residual_scalars=true", "model.smear=true", "model.qk_scale=1.3")
VARIANTS = [*FEATURES, " ".join(FEATURES), "model.window_pattern=SSSL", "model.logit_softcap=null", "optimizer=adamw"]
WARM_ROUNDS = 2  # in the first of them everything is compiled


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="'KEY=VALUE ...'")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp8"], default="auto", help="auto: bf16 where it is fast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--rounds", type=int, default=30)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    words = ["", *options.variants]  # the first is what the others are compared with
    configs = [_config(options, word) for word in words]
    _refuse_other_processes(configs, words)
    set_up_process(configs[0].hardware)
    _allow_recompiling(len(words))
    plans = [planning.make(config, "variants") for config in configs]
    trainings = [Training(plan, config, plan.grad_accum_steps) for plan, config in zip(plans, configs, strict=True)]
    clock, order = Clock(options.device), random.Random(0)
    seconds: list[list[float]] = [[] for _ in words]
    for number in range(WARM_ROUNDS + options.rounds):
        for i in order.sample(range(len(words)), len(words)):
            marks = trainings[i].step(clock)
            taken = clock.seconds(marks[0], marks[-1])
            if number >= WARM_ROUNDS:
                seconds[i].append(taken)
    for word, own in zip(words, seconds, strict=True):
        ratios = [a / b for a, b in zip(own, seconds[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        yield {
            "benchmark": "variants",
            **{key: getattr(options, key) for key in ("depth", "seq_len", "batch", "vocab", "compile", "optimizer", "rounds")},
            "precision": plans[0].precision,
            "hardware": plans[0].hardware_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "variant": word,
            "step_ms": round(1000 * statistics.median(own), 1),
            "times": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }


def _config(options: argparse.Namespace, variant: str) -> Config:
    one = {"depth": [options.depth], "precision": [options.precision], "optimizer": [options.optimizer]}
    return config_of(argparse.Namespace(**vars(options) | one | {"grad_accum": 1, "set": variant.split()}))


def _refuse_other_processes(configs: list[Config], words: list[str]) -> None:
    own = configs[0].hardware
    problems = [
        Problem(f"--variants '{word}'", "all variants run in one process, with its device and threads", "picotrain bench step measures it")
        for config, word in zip(configs, words, strict=True)
        if (config.hardware.device, config.hardware.threads) != (own.device, own.threads)
    ]
    if problems:
        raise ConfigError(problems)


def _allow_recompiling(variants: int) -> None:
    """Torch compiles a function for eight kinds of calls, each variant is one, and then runs it uncompiled: here it shall rather fail."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * variants)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


if __name__ == "__main__":
    raise SystemExit(script(__file__))
