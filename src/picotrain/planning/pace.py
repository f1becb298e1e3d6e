"""How long a plan takes: what `picotrain bench step` measured of that very step on this machine, else assumed and said to be. No torch.

Figures are lines as the benchmark prints them, with what `setting` adds; the benchmark appends them to figures.jsonl in the cache folder.

Where there is none, the matmul ceiling of this machine stands in (`picotrain.planning.ceilings`), with a rest as it was elsewhere; for
a GPU whose peak is known, a share of that. The optimizer comes once a step. A validation is the forward of its tokens: a third of what
training on them takes. How near it comes: docs/performance.md.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from picotrain import hardware
from picotrain.config.schema import Config
from picotrain.disk import parse_json, read_plain
from picotrain.planning import ceilings
from picotrain.text import flops as flops_text

if TYPE_CHECKING:
    from picotrain.planning import Plan

FILE = "figures.jsonl"
ASSUMED_MFU = 0.40  # for the time and cost of hardware that has no figures but whose peak is known; shown as an assumption
# Seconds per FLOP beyond the matmul ceiling, at REST_WIDTH, with one thread, in bf16; fp32 has twice the bytes. Eager: cpu_speedrun on the
# EPYC with AVX512-BF16 (1.3 to 1.5 with two threads), and d2 to d6 in fp32 without it (2.8, 2.8, 4.2). Compiled: d2 to d8 on that EPYC
# (0.6 to 0.9), d4 on a Xeon with AMX (1.2). docs/results.md has the lines.
REST = {"compiled": 2 * 0.8e-12, "eager": 2 * 1.4e-12}
REST_WIDTH = 256
ADAMW_S = 2 * 0.5e-9  # seconds per parameter and step with one thread; 0.3 to 0.7 ns with two
# A validation that takes more than so much of a run is said, with the eval_tokens that would make all of them VALIDATION_AIM of the steps.
VALIDATION_SHARE, VALIDATION_AIM = 0.2, 0.05

Positive = Annotated[float, Field(gt=0, lt=1e30, allow_inf_nan=False)]


class Figure(BaseModel):
    """A measured step. `setting` names all that must be the same for it to tell a plan's time, but the number of micro-batches."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    setting: str
    width: Positive
    seq_len: Positive
    batch: Positive  # rows of a micro-batch
    grad_accum: Positive
    vocab: Positive
    flops_per_token: Positive
    step_ms: Positive
    optimizer_ms: Annotated[float, Field(ge=0, lt=1e30, allow_inf_nan=False)]
    matmul_gflops: Positive

    @property
    def micro_batch_ms(self) -> float:
        """Forward and backward of a micro-batch."""
        return max(self.step_ms - self.optimizer_ms, 0.01 * self.step_ms) / self.grad_accum

    def is_of(self, plan: Plan, config: Config) -> bool:
        """Whether it was measured on this plan's step."""
        own = setting(plan, config) | {"seq_len": plan.seq_len, "batch": plan.device_batch_size, "vocab": plan.vocab_size}
        return all(getattr(self, key) == value for key, value in own.items())


def setting(plan: Plan, config: Config) -> dict[str, Any]:
    """What a figure holds beside the benchmark's own values, so that plans can tell whether it is about them."""
    threads = [f"{config.hardware.threads} threads"] if plan.device == "cpu" else []
    words = [_machine(config), *threads, plan.precision, "compiled" if plan.compile else "eager", config.optimizer.kind]
    words += [*config.model.features, *([f"recompute {plan.recompute}"] if plan.recompute != "none" else [])]
    return {"setting": ", ".join(words), "width": plan.width, "flops_per_token": plan.flops_per_token}


def _machine(config: Config) -> str:
    """The device that a decided config is for; this machine's CPU with all that tells it from others of its name."""
    hw = config.hardware
    here = hw.device == "cpu" and hw.name == hardware.cpu().name
    return hardware.cpu_identity() if here else hw.name or hw.device


def timed(plan: Plan, config: Config, peak: float | None, val_bytes: int | None) -> Plan:
    """The plan with its step time, hours and cost, as far as they can be told.

    peak: FLOPs per second of a device, None: unknown. val_bytes: text of the validation shards, None: not known yet.
    """
    figures, bad = read_figures(Path(config.run.cache_dir) / FILE) if config.run.cache_dir else ([], 0)
    notes = [f"warning: {bad} lines of {config.run.cache_dir}/{FILE} are no figures of steps and were passed over"] if bad else []
    found = next((figure for figure in reversed(figures) if figure.is_of(plan, config)), None)  # the newest
    token_s, optimizer_s, by = None, 0.0, None
    if found:
        token_s, optimizer_s, by = found.micro_batch_ms / 1000 / (found.batch * found.seq_len), found.optimizer_ms / 1000, "measured"
        source = "a step measured on this machine"
        if plan.world_size > 1:
            notes.append("the step's time was measured on one process; that several lose nothing by waiting for each other is assumed")
    elif peak and plan.device != "cpu":
        token_s, by, source = plan.flops_per_token / (peak * ASSUMED_MFU), "assumed", f"an MFU of {ASSUMED_MFU:.0%}"
        notes.append(f"time and cost assume an MFU of {ASSUMED_MFU:.0%}, which was not measured")
    elif ceiling := ceilings.find(config):
        flop_s, optimizer_s, by = _by_ceiling(plan, config, ceiling), _assumed_optimizer_s(plan, config, ceiling), "assumed"
        token_s = plan.flops_per_token * flop_s
        share = 1 / (flop_s * ceiling.gflops * 1e9)
        source = f"{share:.0%} of a measured matmul ceiling of {flops_text(ceiling.gflops * 1e9)}/s"
        source += f", measured while others computed ({ceiling.busy})" if ceiling.busy else ""
    else:
        source = _missing(plan, config)
    predicted: dict[str, Any] = {"predicted_by": by, "predicted_from": source}
    if token_s:
        each = token_s / plan.world_size
        step_s, eval_s = plan.total_batch_size * each + optimizer_s, _eval_tokens(plan, val_bytes) * each / 3
        predicted |= {"predicted_step_ms": round(1000 * step_s, 1), "predicted_eval_s": round(eval_s, 3)}
    plan = plan.model_copy(update=predicted)
    seconds = seconds_left(plan, config)
    hours, price = seconds and seconds / 3600, config.hardware.price_per_hour
    cost = hours * price * config.launch.nnodes if hours and price else None
    notes += [text] if (text := _validation_note(plan, config)) else []
    return plan.model_copy(update={"predicted_hours": hours, "predicted_cost": cost, "notes": [*plan.notes, *notes]})


def _by_ceiling(plan: Plan, config: Config, ceiling: ceilings.Ceiling) -> float:
    """Seconds per FLOP of forward and backward, assumed."""
    at_ceiling = 1 / (ceiling.gflops * 1e9)
    if plan.device != "cpu":
        return at_ceiling / ASSUMED_MFU
    values = 2 if plan.precision == "fp32" else 1
    return at_ceiling + REST["compiled" if plan.compile else "eager"] * values * REST_WIDTH / plan.width / (config.hardware.threads or 1)


def _assumed_optimizer_s(plan: Plan, config: Config, ceiling: ceilings.Ceiling) -> float:
    """Seconds of the optimizer's part of a step on a CPU, assumed: AdamW's memory traffic, Muon's matmuls, three to an iteration."""
    if plan.device != "cpu":
        return 0.0
    seconds = ADAMW_S * plan.parameters["total"] / (config.hardware.threads or 1)
    flops = config.optimizer.step_flops(config.model.parameters(plan.vocab_size), plan.width)
    return seconds + flops / (ceiling.gflops * 1e9)


def _missing(plan: Plan, config: Config) -> str:
    """What would have to be known to tell a time."""
    if ceilings.is_here(config):
        return "nothing was measured on this machine yet"
    name = f"{plan.hardware_name} ({plan.device}) is not here and "
    if plan.device == "cpu":
        return name + "no step of this kind was measured on such a machine"
    return name + "no peak is known for it; hardware.peak_flops=FLOPS, the dense bf16 FLOPs per second of its data sheet, gives an estimate"


def _eval_tokens(plan: Plan, val_bytes: int | None) -> float:
    """Tokens of a validation: at most all that the validation shard has."""
    asked = plan.eval_rows * plan.seq_len
    return asked if val_bytes is None else min(asked, val_bytes / plan.bytes_per_token)


def validations(plan: Plan, config: Config, done: int = 0) -> int:
    """How often a run that has done `done` steps still validates: at multiples of train.eval_every and at the end."""
    every = config.train.eval_every
    return (plan.num_steps - 1) // every - (done - 1) // every + 1 if every > 0 else 0


def seconds_left(plan: Plan, config: Config, done: int = 0) -> float | None:
    """Predicted seconds of a run that has done `done` steps: the steps that are left and their validations. None: not known.

    Not in it: what comes before the first step (downloads, a tokenizer, compiling), samples, CORE, saves.
    """
    unknown_horizon = plan.horizon == "train.num_train_epochs" and plan.epochs is None
    if plan.predicted_step_ms is None or unknown_horizon:
        return None
    steps = max(0, plan.num_steps - done)
    return steps * plan.predicted_step_ms / 1000 + validations(plan, config, done) * (plan.predicted_eval_s or 0)


def _validation_note(plan: Plan, config: Config) -> str:
    """What to set where validations take much of a run, "" where they do not."""
    seconds, count = seconds_left(plan, config), validations(plan, config)
    if not seconds or not plan.predicted_eval_s or count * plan.predicted_eval_s <= VALIDATION_SHARE * seconds:
        return ""
    tokens = VALIDATION_AIM * 3 * plan.total_tokens / count
    fewer = max(plan.seq_len, 2 ** int(math.log2(max(tokens, 1))))
    share = count * plan.predicted_eval_s / seconds
    return (
        f"warning: {count} validations take {share:.0%} of the predicted time; "
        f"train.eval_tokens={fewer} would make that {VALIDATION_AIM:.0%} or less"
    )


def read_figures(path: Path) -> tuple[list[Figure], int]:
    """The figures of a file, and how many of its lines are none (of other benchmarks aside). A file that cannot be read has none."""
    try:
        lines = [line for line in read_plain(path).splitlines() if line.strip()]
    except FileNotFoundError:
        return [], 0
    except OSError:
        return [], 1
    found, bad = [], 0
    for line in lines:
        try:
            values = parse_json(line)
            if isinstance(values, dict) and values.get("benchmark", "step") != "step":
                continue
            found.append(Figure.model_validate(values))
        except (ValueError, ValidationError):
            bad += 1
    return found, bad


def remember(line: str, cache: Path, name: str = FILE) -> None:
    """Add a figure, or a line of another file, to the cache folder, at the end and in one write. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / name
    try:
        half = not read_plain(path).endswith(b"\n")  # the last write was cut off: its line ends here
    except FileNotFoundError:
        half = False
    with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(b"\n" * half + line.encode() + b"\n")


def hint(plan: Plan, config: Config) -> str:
    """The command that measures this plan's step, where the benchmark can."""
    hw = config.hardware
    if plan.device not in ("cpu", "cuda"):
        return ""
    keys = [*config.model.bench_keys]
    keys += [f"hardware.threads={hw.threads}"] if plan.device == "cpu" and hw.threads != hardware.cores() else []
    keys += [f"hardware.recompute={plan.recompute}"] if plan.recompute != "none" else []
    words = [f"--device {plan.device} --depth {plan.depth} --seq-len {plan.seq_len} --batch {plan.device_batch_size}"]
    words += [f"--vocab {plan.vocab_size} --precision {plan.precision} --{'' if plan.compile else 'no-'}compile"]
    words += [f"--optimizer {config.optimizer.kind}"] + (["--set", *keys] if keys else [])
    return f"picotrain bench step {' '.join(words)}"
