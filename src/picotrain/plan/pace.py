"""How long a step of a plan takes: from figures of `picotrain bench step` on the same hardware, else assumed and said to be. No torch.

A figure is a line as that benchmark prints it, with what `setting` adds. Figures shipped with the package stand in figures.jsonl beside
this file, those measured on this machine in the cache folder's file of the same name, which the benchmark appends to.

Forward and backward. A figure's seconds per FLOP are those of the matmul ceiling measured beside it, plus a rest: work on single values,
of which there is as much per FLOP as the model is narrow. So a figure is carried to another width w as

    seconds per FLOP = 1 / ceiling + (measured - 1 / ceiling) x own width / w

and between two widths that were measured, both are carried and blended by log(w). The optimizer comes once a step, in seconds per
parameter that it works on. GPUs and processes are taken to scale without loss. How near it comes: docs/results.md.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from picotrain import hardware, shape
from picotrain.config.saved import parse_json, read_plain
from picotrain.config.schema import Config

if TYPE_CHECKING:
    from picotrain.plan import Plan

ASSUMED_MFU = 0.40  # for the time and cost of hardware that has no figures but whose peak is known; shown as an assumption
SHIPPED = Path(__file__).with_name("figures.jsonl")
FEATURES = ("value_embeds", "residual_scalars", "smear")  # of the model: work that FLOPs do not count
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
    on = [feature for feature in FEATURES if getattr(config.model, feature)]
    threads = [f"{config.hardware.threads} threads"] if plan.device == "cpu" else []
    words = [_machine(config), *threads, plan.precision, "compiled" if plan.compile else "eager", config.optimizer.kind, *on]
    words += [f"recompute {plan.recompute}"] if plan.recompute != "none" else []
    return {
        "setting": ", ".join(words),
        "width": plan.width,
        "flops_per_token": plan.flops_per_token,
        "optimized_parameters": plan.parameters["matrices" if config.optimizer.kind == "muon" else "total"],
    }


def _machine(config: Config) -> str:
    """The device that a decided config is for; this machine's CPU with all that tells it from others of its name."""
    hw = config.hardware
    here = hw.device == "cpu" and hw.name == hardware.cpu().name
    return hardware.cpu_identity() if here else hw.name or hw.device


def timed(plan: Plan, config: Config, peak: float | None) -> Plan:
    """The plan with its step time, hours and cost, as far as they can be told. peak: FLOPs per second of a device, None: unknown."""
    own, bad = read_figures(Path(config.run.cache_dir) / SHIPPED.name) if config.run.cache_dir else ([], 0)
    shipped, _ = read_figures(SHIPPED)
    notes = [f"warning: {bad} lines of {config.run.cache_dir}/{SHIPPED.name} are no figures of steps and were passed over"] if bad else []
    wanted = _as_figure(plan, config)
    found = _nearest(wanted, joined(_of(wanted, own), _of(wanted, shipped)))
    seconds, by, source = None, None, ""
    if found:
        flops = plan.total_batch_size / plan.world_size * plan.flops_per_token
        seconds, by, source = flops * _blend(wanted, found) + _optimizer_s(wanted, found), "measured", _source(wanted, found, own)
        if plan.world_size > 1:
            notes.append("the step's time was measured on one process; that several lose nothing by waiting for each other is assumed")
    elif peak and plan.device == "cuda":
        seconds = plan.total_batch_size * plan.flops_per_token / (peak * plan.world_size * ASSUMED_MFU)
        by, source = "assumed", f"an MFU of {ASSUMED_MFU:.0%}"
        notes.append(f"time and cost assume an MFU of {ASSUMED_MFU:.0%}, which was not measured")
    elif plan.device != "cpu":
        notes.append("no peak FLOPs are known for this device: no time, no cost, and MFU will be null")
    hours = seconds * plan.num_steps / 3600 if seconds else None
    price = config.hardware.price_per_hour
    predicted = {
        "predicted_step_ms": round(1000 * seconds, 1) if seconds else None,
        "predicted_by": by,
        "predicted_from": source,
        "predicted_hours": hours,
        "predicted_cost": hours * price * config.launch.nnodes if hours and price else None,
    }
    return plan.model_copy(update=predicted | {"notes": [*plan.notes, *notes]})


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


def remember(line: str, cache: Path) -> None:
    """Add a figure to the cache folder, at the end and in one write. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / SHIPPED.name
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
    """Milliseconds of a step of `wanted`'s shape, whose own times are not looked at; None: no figure is near."""
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
    """The figures to predict from: the nearest of those at most as wide and of those at least as wide; [] if none is near."""

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
    if plan.device not in ("cpu", "cuda") or config.optimizer.kind not in ("adamw", "muon"):
        return ""
    keys = [f"model.{feature}=true" for feature in FEATURES if getattr(config.model, feature)]
    keys += [f"model.width={plan.width}"] if shape.dims(config.model.model_copy(update={"width": None})).width != plan.width else []
    keys += [f"hardware.threads={hw.threads}"] if plan.device == "cpu" and hw.threads != hardware.cores() else []
    keys += [f"hardware.recompute={plan.recompute}"] if plan.recompute != "none" else []
    words = [f"--device {plan.device} --depth {plan.depth} --seq-len {plan.seq_len} --batch {plan.device_batch_size}"]
    words += [f"--vocab {plan.vocab_size} --precision {plan.precision} --{'' if plan.compile else 'no-'}compile"]
    words += [f"--optimizer {config.optimizer.kind}"] + (["--set", *keys] if keys else [])
    return f"picotrain bench step {' '.join(words)}"
