"""How long a plan takes: from figures of `picotrain bench step` on the same hardware, else assumed and said to be. No torch.

A figure is a line as that benchmark prints it, with what `setting` adds. Figures shipped with the package stand in figures.jsonl beside
this file, those measured on this machine in the cache folder's file of the same name, which the benchmark appends to.

Forward and backward. A figure's seconds per FLOP are those of the matmul ceiling measured beside it, plus a rest. The rest is work on
single values, and a narrow model has more of it per FLOP. So a figure is carried to another width w as

    seconds per FLOP = 1 / ceiling + (measured - 1 / ceiling) x own width / w

Between two widths that were measured, both figures are carried and blended by log(w). The optimizer comes once a step, in seconds per
parameter that it works on. GPUs and processes are taken to scale without loss. docs/results.md says how near it comes.

Where no figure is near, the matmul ceiling of this machine stands in (`picotrain.plan.ceilings`), with the rest that was measured
elsewhere. For a GPU whose peak is known a share of that peak does. A validation is the forward of its tokens: a third of what
training on them takes.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from picotrain import hardware
from picotrain.config.schema import Config
from picotrain.disk import parse_json, read_plain
from picotrain.plan import ceilings
from picotrain.text import flops as flops_text

if TYPE_CHECKING:
    from picotrain.plan import Plan

ASSUMED_MFU = 0.40  # for the time and cost of hardware that has no figures but whose peak is known; shown as an assumption
SHIPPED = Path(__file__).with_name("figures.jsonl")
# Seconds per FLOP beyond the matmul ceiling, at REST_WIDTH, with one thread, in bf16; fp32 has twice the bytes. Eager: cpu_speedrun on the
# EPYC with AVX512-BF16 (1.3 to 1.5 with two threads), and d2 to d6 in fp32 without it (2.8, 2.8, 4.2). Compiled: d2 to d8 on that EPYC
# (0.6 to 0.9), d4 on a Xeon with AMX (1.2). docs/results.md has the lines.
REST = {"compiled": 2 * 0.8e-12, "eager": 2 * 1.4e-12}
REST_WIDTH = 256
ADAMW_S = 2 * 0.5e-9  # seconds per parameter and step with one thread; 0.3 to 0.7 ns with two
# Validations that take a larger share of a run are said, with the eval_tokens that make them VALIDATION_AIM of the steps.
VALIDATION_SHARE, VALIDATION_AIM = 0.2, 0.05
# A figure is near a plan when they differ by at most these factors.
NEAR = {"width": 2.0, "seq_len": 2.0, "micro_batch_tokens": 4.0, "vocab": 4.0}

Positive = Annotated[float, Field(gt=0, lt=1e30, allow_inf_nan=False)]


class Figure(BaseModel):
    """A measured step. `setting` names what must be the same for it to say something of a plan."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    setting: str
    width: Positive
    seq_len: Positive
    batch: Positive  # rows of a micro-batch
    grad_accum: Positive
    vocab: Positive
    flops_per_token: Positive
    optimized_parameters: Positive
    step_ms: Positive
    optimizer_ms: Annotated[float, Field(ge=0, lt=1e30, allow_inf_nan=False)]
    matmul_gflops: Positive

    @property
    def micro_batch_tokens(self) -> float:
        return self.batch * self.seq_len

    @property
    def seconds_per_flop(self) -> float:
        """Of forward and backward."""
        tokens = self.micro_batch_tokens * self.grad_accum
        return max(self.step_ms - self.optimizer_ms, 0.01 * self.step_ms) / 1000 / (tokens * self.flops_per_token)

    def carried(self, width: float) -> float:
        """Seconds per FLOP of a model of another width."""
        at_ceiling = min(1 / (self.matmul_gflops * 1e9), self.seconds_per_flop)
        return at_ceiling + (self.seconds_per_flop - at_ceiling) * self.width / width

    def slower(self, factor: float) -> Figure:
        """The same on a machine that takes `factor` times as long."""
        times = {"step_ms": self.step_ms * factor, "optimizer_ms": self.optimizer_ms * factor}
        return self.model_copy(update=times | {"matmul_gflops": self.matmul_gflops / factor})


def setting(plan: Plan, config: Config) -> dict[str, Any]:
    """What a figure holds beside the benchmark's own values, so that plans can tell whether it is about them."""
    threads = [f"{config.hardware.threads} threads"] if plan.device == "cpu" else []
    words = [
        _machine(config),
        *threads,
        plan.precision,
        "compiled" if plan.compile else "eager",
        config.optimizer.kind,
        *config.model.features,
    ]
    words += [f"recompute {plan.recompute}"] if plan.recompute != "none" else []
    params = config.model.parameters(plan.vocab_size)
    return {
        "setting": ", ".join(words),
        "width": plan.width,
        "flops_per_token": plan.flops_per_token,
        "optimized_parameters": config.optimizer.works_on(params),
    }


def _machine(config: Config) -> str:
    """The device that a decided config is for; this machine's CPU with all that tells it from others of its name."""
    hw = config.hardware
    here = hw.device == "cpu" and hw.name == hardware.cpu().name
    return hardware.cpu_identity() if here else hw.name or hw.device


def timed(plan: Plan, config: Config, peak: float | None, val_bytes: int | None) -> Plan:
    """The plan with its step time, hours and cost, as far as they can be told.

    peak: FLOPs per second of a device, None: unknown. val_bytes: text of the validation shards, None: not known yet.
    """
    own, bad = read_figures(Path(config.run.cache_dir) / SHIPPED.name) if config.run.cache_dir else ([], 0)
    shipped, _ = read_figures(SHIPPED)
    notes = [f"warning: {bad} lines of {config.run.cache_dir}/{SHIPPED.name} are no figures of steps and were passed over"] if bad else []
    wanted = _as_figure(plan, config)
    found = _nearest(wanted, joined(_of(wanted, own), _of(wanted, shipped)))
    flop_s, optimizer_s, by = None, 0.0, None
    if found:
        flop_s, optimizer_s, by, source = _blend(wanted, found), _optimizer_s(wanted, found), "measured", _source(wanted, found, own)
        if plan.world_size > 1:
            notes.append("the step's time was measured on one process; that several lose nothing by waiting for each other is assumed")
    elif peak and plan.device != "cpu":
        flop_s, by, source = 1 / (peak * ASSUMED_MFU), "assumed", f"an MFU of {ASSUMED_MFU:.0%}"
        notes.append(f"time and cost assume an MFU of {ASSUMED_MFU:.0%}, which was not measured")
    elif ceiling := ceilings.find(config):
        flop_s, optimizer_s, by = _by_ceiling(plan, config, ceiling), _assumed_optimizer_s(plan, config, ceiling), "assumed"
        share = 1 / (flop_s * ceiling.gflops * 1e9)
        source = f"{share:.0%} of a measured matmul ceiling of {flops_text(ceiling.gflops * 1e9)}/s"
        source += f", measured while others computed ({ceiling.busy})" if ceiling.busy else ""
    else:
        source = _missing(plan, config)
    predicted: dict[str, Any] = {"predicted_by": by, "predicted_from": source}
    if flop_s:
        each = plan.flops_per_token * flop_s / plan.world_size  # seconds of a token
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


def remember(line: str, cache: Path, name: str = SHIPPED.name) -> None:
    """Add a figure, or a line of another file, to the cache folder, at the end and in one write. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / name
    try:
        half = not read_plain(path).endswith(b"\n")  # the last write was cut off: its line ends here
    except FileNotFoundError:
        half = False
    with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(b"\n" * half + line.encode() + b"\n")


def joined(own: Sequence[Figure], others: Sequence[Figure]) -> list[Figure]:
    """This machine's figures, the newest of each shape, and others' that it lacks, brought to its speed by what both have in common."""
    mine, theirs = {_shape(figure): figure for figure in own}, {_shape(figure): figure for figure in others}
    near = [(figure, _nearest(figure, list(theirs.values()))) for figure in mine.values()]
    ratios = [figure.seconds_per_flop / _blend(figure, found) for figure, found in near if found]
    factor = statistics.median(ratios) if ratios else 1.0
    return [*mine.values(), *(figure.slower(factor) for shape, figure in theirs.items() if shape not in mine)]


def predict_ms(wanted: Figure, figures: Sequence[Figure]) -> float | None:
    """Milliseconds of a step in the shape of `wanted`, whatever times that holds. None: no figure is near."""
    found = _nearest(wanted, _of(wanted, figures))
    flops = wanted.micro_batch_tokens * wanted.grad_accum * wanted.flops_per_token
    return 1000 * (flops * _blend(wanted, found) + _optimizer_s(wanted, found)) if found else None


def _shape(figure: Figure) -> tuple[float, ...]:
    return figure.width, figure.seq_len, figure.micro_batch_tokens, figure.vocab


def _of(wanted: Figure, figures: Sequence[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.setting == wanted.setting]


def _as_figure(plan: Plan, config: Config) -> Figure:
    """The plan in the shape of a figure, with times that mean nothing."""
    sizes = {"seq_len": plan.seq_len, "batch": plan.device_batch_size, "grad_accum": plan.grad_accum_steps, "vocab": plan.vocab_size}
    return Figure.model_construct(None, **setting(plan, config), **sizes, step_ms=1.0, optimizer_ms=0.0, matmul_gflops=1.0)


def _nearest(wanted: Figure, figures: Sequence[Figure]) -> list[Figure]:
    """The figures to predict from: the nearest one at most as wide, and the nearest one at least as wide. [] if none is near."""

    def apart(figure: Figure, key: str) -> float:
        return abs(math.log2(getattr(figure, key) / getattr(wanted, key)))

    def distance(figure: Figure) -> float:
        return sum(apart(figure, key) for key in NEAR)

    near = [f for f in figures if all(apart(f, key) <= math.log2(factor) + 1e-9 for key, factor in NEAR.items() if key != "width")]
    below, above = [f for f in near if f.width <= wanted.width], [f for f in near if f.width >= wanted.width]
    best = [min(side, key=distance) for side in (below, above) if side]
    if not any(apart(figure, "width") <= math.log2(NEAR["width"]) + 1e-9 for figure in best):
        return []
    exact = [figure for figure in best if figure.width == wanted.width]
    return exact[:1] or best


def _share(wanted: Figure, low: Figure, high: Figure) -> float:
    return math.log(wanted.width / low.width) / math.log(high.width / low.width)


def _blend(wanted: Figure, found: Sequence[Figure]) -> float:
    """Seconds per FLOP at the wanted width."""
    if len(found) == 1:
        return found[0].carried(wanted.width)
    share = _share(wanted, found[0], found[1])
    return (1 - share) * found[0].carried(wanted.width) + share * found[1].carried(wanted.width)


def _optimizer_s(wanted: Figure, found: Sequence[Figure]) -> float:
    """Seconds of the optimizer's part of a step."""
    each = [figure.optimizer_ms / 1000 / figure.optimized_parameters for figure in found]
    share = _share(wanted, found[0], found[1]) if len(found) == 2 else 0.0
    return wanted.optimized_parameters * ((1 - share) * each[0] + share * each[-1])


def _source(wanted: Figure, found: Sequence[Figure], own: Sequence[Figure]) -> str:
    """Which figures, in words."""
    here = sum(figure in own for figure in found)
    where = "measured on this machine" if here == len(found) else "shipped, of this hardware" if not here else "of this hardware"
    widths = " and ".join(f"{figure.width:.0f}" for figure in found)
    beyond = len(found) == 1 and found[0].width != wanted.width
    text = f"{len(found)} figure{'s' * (len(found) > 1)} {where}, at width {widths}"
    return f"{text}, carried to {wanted.width:.0f}" if beyond else text


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
