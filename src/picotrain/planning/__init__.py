"""What a config means: steps, batch arithmetic, memory, time and cost. Nothing is downloaded, built or launched here.

`resolve` replaces every `auto` once, from tables and device facts; `make` derives the numbers and finds what does not
fit together, all of it at once. A run keeps its plan in plan.json and reads it back when it is resumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from picotrain import hardware, shape
from picotrain.config.schema import Config, FullAttention, Recompute, WindowAttention
from picotrain.contracts import Optimizer
from picotrain.data import amounts, sources
from picotrain.data.amounts import Amount
from picotrain.data.corpus import Corpus
from picotrain.data.mixture import Mixture
from picotrain.data.prepare.shards import VAL_FRACTION
from picotrain.data.shares import Sharing
from picotrain.data.units import COUNT_BYTES, WINDOW_SHARDS, default_lanes, default_unit_bytes
from picotrain.disk import write_whole
from picotrain.errors import ConfigError, DataError
from picotrain.planning import fp8, pace, repeats
from picotrain.planning.memory import (
    MEMORY_SHARE,
    checkpoint_bytes,
    data_bytes,
    device_batch,
    facts,
    halved,
    lighter_settings,
    predict,
    predict_memory,
    staging_bytes,
    total_batch,
)
from picotrain.planning.problems import attention_problems, batch_problems, lane_problems, nearest, profiler_problems, total_problems
from picotrain.planning.resolve import choose_data, decide, estimate_bytes_per_token, horizon_tokens, resolve
from picotrain.text import several, size

__all__ = [
    "Plan",
    "choose_data",
    "decide",
    "estimate_bytes_per_token",
    "halved",
    "lighter_settings",
    "make",
    "nearest",
    "predict_memory",
    "resolve",
]


class Plan(BaseModel):
    """A config's meaning on a corpus and a machine. Tokens and rows are counted over all ranks unless named per rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    depth: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: dict[str, int]  # embedding, matrices, head, total
    flops_per_token: int
    device: str
    hardware_name: str
    precision: str
    compile: bool
    attention: FullAttention = "auto"  # kernel of layers that see the whole row; auto: the first start chooses, and writes it here
    window_attention: WindowAttention | None = None  # of layers with a sliding window; None: there are none
    recompute: Recompute = "none"
    peak_flops: float | None  # per device
    seq_len: int
    total_batch_size: int  # tokens per step
    rows_per_step: int
    device_batch_size: int  # rows per rank and micro-batch
    grad_accum_steps: int
    dp_size: int
    world_size: int
    num_steps: int
    total_tokens: int
    horizon: str  # the config key that set num_steps
    epochs: float | None  # passes over the corpus, by epoch_rows or estimated from its bytes; None: corpus unknown
    epoch_rows: int | None = None  # rows of the first pass; None: not counted
    text_bytes: int | None = None  # of training text, of all sources; None: not known
    text_estimate: str = ""  # what that, the epochs and a horizon in epochs were estimated from; "": the corpus is there
    licences: dict[str, str] = {}  # of the text, by source, where the config says one
    lanes: int | None
    unit_bytes: int
    sharing: Sharing = "dealt"  # of an epoch among the lanes (picotrain.data.shares); plans of before it was written down lack it
    num_units: int | None  # of all sources
    sources: dict[str, float] = {}  # of a mixture: expected passes over each source, by its name
    bytes_per_token: float  # measured on the corpus, or estimated from the vocabulary size
    eval_rows: int  # at most; the validation shard may have fewer
    matrix_lr: float
    embed_lr: float
    head_lr: float
    weight_decay: float
    scalar_lr: float = 0.0
    checkpoint_bytes: int
    staging_bytes: int = 0  # host memory that rank 0 keeps for saving in the background, on a CPU part of the next
    predicted_memory_bytes: int  # per rank, an estimate
    predicted_memory: dict[str, int] = {}  # the same by part (picotrain.planning.memory.Memory)
    predicted_step_ms: float | None = None
    predicted_by: Literal["measured", "assumed"] | None = None  # None: no time can be told (picotrain.planning.pace)
    predicted_from: str = ""  # which figures, or what is assumed, or what is missing
    predicted_eval_s: float | None = None  # seconds of one validation
    predicted_hours: float | None = None  # of all steps and validations (picotrain.planning.pace.seconds_left)
    predicted_cost: float | None = None  # dollars
    notes: list[str] = []

    @property
    def rates(self) -> shape.Rates:
        return shape.Rates(self.matrix_lr, self.embed_lr, self.head_lr, self.weight_decay, self.scalar_lr)

    @property
    def stream(self) -> dict[str, Any]:
        """What makes the data stream, as `picotrain.data.stream.Loader` takes it."""
        assert self.lanes is not None, "a plan made without a corpus cannot train"
        return {
            "seq_len": self.seq_len,
            "unit_bytes": self.unit_bytes,
            "lanes": self.lanes,
            "sharing": self.sharing,
            "device_batch_size": self.device_batch_size,
            "rows_per_step": self.rows_per_step,
        }

    def save(self, path: Path) -> None:
        """Write plan.json."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")


def make(
    config: Config,
    name: str,
    data: Corpus | Mixture | None = None,
    bytes_per_token: float | None = None,
    guess: Sequence[Amount] = (),
) -> Plan:
    """Derive the plan of a decided config. Without corpus or tokenizer, what they would tell is an estimate.

    guess: how much text a corpus has that is not prepared yet.

    Raises ConfigError with every problem found: a batch that does not divide, a dp_size that does not divide the
    lanes, more lanes than units.
    """
    corpus = Mixture.of(data) if data else None
    train, hw = config.train, config.hardware
    assert train.seq_len is not None and hw.nproc_per_node != "auto", "plan.make wants a decided config"
    d, params, windows, flops = facts(config)
    per_token = bytes_per_token or estimate_bytes_per_token(config.tokenizer.vocab_size)
    text = amounts.of_mixture(corpus) if corpus else guess
    text_bytes = None if not text or None in (n := [amount.text_bytes for amount in text]) else sum(filter(None, n))
    epoch_rows = corpus.epoch_rows if corpus else None
    corpus_tokens = epoch_rows * train.seq_len if epoch_rows else text_bytes / per_token if text_bytes else None
    world_size = hw.nproc_per_node * config.launch.nnodes
    problems = attention_problems(config)

    batch, data_held = total_batch(config, params), data_bytes(config, corpus, per_token)
    problems += batch_problems(train, train.seq_len, batch, world_size)
    rows = max(batch // train.seq_len, 1)
    micro_rows = device_batch(config, d, params, rows, world_size, data_held)
    problems += fp8.problems(config, d, micro_rows * train.seq_len)

    stream = _stream_facts(config, corpus, train.seq_len)
    problems += lane_problems(config, stream["lanes"], stream.pop("largest_source"), world_size)

    tokens, horizon = horizon_tokens(config, corpus_tokens)
    num_steps = max(1, math.ceil(tokens / batch)) if batch > 0 else 1
    problems += total_problems(num_steps * batch, num_steps, horizon)
    if corpus or not train.num_train_epochs:  # else their number is not known yet
        problems += profiler_problems(config, num_steps)
    if problems:
        raise ConfigError(problems)

    total_tokens = num_steps * batch
    memory = predict(config, d, params, micro_rows, data_held)
    rates = _rates(config.optimizer, d.width, batch, total_tokens)
    plan = Plan(
        name=name,
        **_model_facts(config, d, params),
        **_machine_facts(config, world_size),
        **_attention(config, windows),
        flops_per_token=flops,
        seq_len=train.seq_len,
        total_batch_size=batch,
        rows_per_step=rows,
        device_batch_size=micro_rows,
        grad_accum_steps=rows // (micro_rows * world_size),
        num_steps=num_steps,
        total_tokens=total_tokens,
        horizon=horizon,
        epochs=total_tokens / corpus_tokens if epoch_rows and corpus_tokens else repeats.epochs(text, total_tokens, per_token),
        epoch_rows=epoch_rows,
        text_bytes=None if text_bytes is None else round(text_bytes),
        text_estimate="; ".join(f"{a.name}: {a.estimated}" if len(text) > 1 else a.estimated for a in text if a.estimated),
        licences={part.name: part.licence for part in sources.parts_of(config.data) if part.licence},
        sharing="even",
        **stream,
        sources=repeats.passes(text, total_tokens, per_token),
        bytes_per_token=per_token,
        eval_rows=max(train.eval_tokens // train.seq_len, 1),
        **dataclasses.asdict(rates),
        checkpoint_bytes=checkpoint_bytes(config, params),
        staging_bytes=staging_bytes(config, params),
        predicted_memory_bytes=memory.peak,
        predicted_memory=memory.parts(),
        notes=_notes(config, corpus, bytes_per_token) + _decay_notes(config.optimizer, rates, num_steps),
    )
    notes = [*_estimates(config, plan, corpus), *plan.notes, *_memory_notes(plan, config), *repeats.warnings(plan)]
    return pace.timed(plan.model_copy(update={"notes": notes}), config, plan.peak_flops, _val_bytes(config, corpus))


def _val_bytes(config: Config, corpus: Mixture | None) -> int | None:
    """Bytes of validation text, for the standard library also before it is prepared; None: not known yet."""
    if corpus:
        return sum(source.val.text_bytes for source in corpus.corpora)
    if config.data.kind == "pystdlib":
        with suppress(DataError):  # this Python came without its library, which whoever prepares it will say
            return round(VAL_FRACTION * amounts.pystdlib_text_bytes())
    return None


def _rates(o: Optimizer, width: int, batch: int, total_tokens: int) -> shape.Rates:
    """Peak learning rates and decay: as they stand, or scaled to the model, the batch and the horizon."""
    given = shape.Rates(o.matrix_lr, o.embed_lr, o.head_lr, o.weight_decay, o.scalar_lr)
    return shape.scale_rates(given, width, batch, total_tokens, orthogonal=o.orthogonal) if o.scale else given


def _decay_notes(o: Optimizer, rates: shape.Rates, num_steps: int) -> list[str]:
    """A warning where decay is at the bound of a scaled one, or beyond it because it was typed so."""
    shrink = rates.matrix_lr * rates.weight_decay
    if o.scale and shrink > shape.MOST_SHRINK * (1 - 1e-9):
        return [
            f"warning: over {several(num_steps, 'step')} optimizer.weight_decay={o.weight_decay:g} shrinks the matrices by more than "
            f"{shape.MOST_SHRINK:.0%} a step; it is held at {rates.weight_decay:.3g}, which is {shape.MOST_SHRINK:.0%}"
        ]
    if not o.scale and shrink > shape.MOST_SHRINK:
        what = "turns their signs" if shrink > 1 else "leaves little of what they learned ten steps before"
        most = shape.MOST_SHRINK / rates.matrix_lr
        return [
            f"warning: optimizer.matrix_lr x optimizer.weight_decay is {shrink:.3g}: each step shrinks the matrices by {shrink:.0%}, "
            f"which {what}; at most {most:.3g} would be usual"
        ]
    return []


def _stream_facts(config: Config, mixture: Mixture | None, seq_len: int) -> dict[str, Any]:
    """Units of all sources, and the lanes that read them. `largest_source`: the units of the source that has most. None: not known yet."""
    unit_bytes = config.data.unit_bytes or default_unit_bytes(seq_len)
    units = [len(found) for found in mixture.units(unit_bytes)] if mixture else []
    largest = max(units, default=None)
    lanes = config.data.lanes or (default_lanes(largest) if largest else None)
    return {"lanes": lanes, "unit_bytes": unit_bytes, "num_units": sum(units) or None, "largest_source": largest}


def _model_facts(config: Config, d: shape.Dims, params: shape.Parameters) -> dict[str, Any]:
    return {
        "depth": d.depth,
        "width": d.width,
        "n_heads": d.n_heads,
        "n_kv_heads": d.n_kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": config.tokenizer.vocab_size,
        "parameters": {part: n for part, n in dataclasses.asdict(params).items() if n} | {"total": params.total},
    }


def _machine_facts(config: Config, world_size: int) -> dict[str, Any]:
    hw = config.hardware
    return {
        "device": hw.device,
        "hardware_name": hw.name or hw.device,
        "precision": config.train.precision,
        "compile": bool(hw.compile),
        "recompute": hw.recompute,
        "peak_flops": _peak(config),
        "dp_size": world_size,
        "world_size": world_size,
    }


def _attention(config: Config, windows: tuple[int, ...]) -> dict[str, Any]:
    """The kernels, where they are known before anything runs. A GPU has to try some of them first."""
    hw, seq_len = config.hardware, config.train.seq_len or 0
    narrow = [window for window in windows if window < seq_len]

    def known(asked: str, kernels: tuple[str, ...], window: int) -> str:
        settled = asked != "auto" or hw.device in hardware.TRIED_ON
        return asked if settled else hardware.untried_kernel(hw.device, kernels, window)

    window_attention = known(hw.window_attention, hardware.window_kernels(hw.device), max(narrow)) if narrow else None
    return {"attention": known(hw.attention, hardware.attention_kernels(hw.device), seq_len), "window_attention": window_attention}


def _peak(config: Config) -> float | None:
    """Peak dense bf16 FLOPs per second and device; a CPU has one only when the config says so."""
    hw = config.hardware
    return hw.peak_flops or (hardware.peak_flops(hw.name or "") if hw.device == "cuda" else None)


def _estimates(config: Config, plan: Plan, corpus: Mixture | None) -> list[str]:
    """What is not known before the corpus is there, and what is told of it all the same."""
    if corpus:
        return []
    by_epochs = bool(config.train.num_train_epochs)
    if plan.epochs is None:
        notes = [f"the corpus {config.data.name} is not prepared yet: units, lanes and epochs are not known"]
        return notes + ["num_train_epochs needs the corpus: the number of steps is not known yet and shown as 1"] * by_epochs
    estimated = "epochs and the number of steps are estimates" if by_epochs else "epochs are an estimate"
    source = f", from {plan.text_estimate}" if plan.text_estimate else ""
    return [f"the corpus {config.data.name} is not prepared yet: units and lanes are not known, {estimated}{source}"]


def _notes(config: Config, corpus: Mixture | None, bytes_per_token: float | None) -> list[str]:
    notes = []
    if corpus and config.train.num_train_epochs and corpus.epoch_rows is None:
        notes.append(f"the length of an epoch is estimated from the bytes of the text: {_why_uncounted(corpus)}")
    for source in corpus.corpora if corpus else ():
        working_set = 2 * WINDOW_SHARDS * sum(shard.bytes for shard in source.shards) // max(1, len(source.shards))
        if (
            source.remote
            and source.remote.cache_bytes
            and source.remote.cache_bytes < min(working_set, sum(s.bytes for s in source.shards))
        ):
            notes.append(
                f"warning: data.cache_bytes={source.remote.cache_bytes:,} holds less than the {2 * WINDOW_SHARDS} shards of {source.name} "
                f"that are in use at a time (about {working_set:,} bytes): shards will be fetched more than once an epoch"
            )
    if config.train.core_metric_every > 0 and config.evaluation.core.bundle is None:
        notes.append("CORE will not be evaluated: evaluation.core.bundle names no bundle")
    if bytes_per_token is None:
        what = "there is no text yet to measure the tokenizer on" if config.tokenizer.path else "no tokenizer is trained yet"
        notes.append(f"{what}: bytes per token is an estimate from the vocabulary size")
    notes += fp8.notes(config)
    return notes


def _memory_notes(plan: Plan, config: Config) -> list[str]:
    """Whether the prediction leaves too little room, and which settings would take less."""
    memory, room = plan.predicted_memory_bytes, config.hardware.memory_bytes
    if not room or memory <= room * MEMORY_SHARE:
        return []
    lighter = "; ".join(lighter_settings(plan, config)) or "a smaller model, or a machine with more memory"
    return [f"warning: predicted memory {size(memory)} of {size(room)}; what would take less: {lighter}"]


def _why_uncounted(corpus: Mixture) -> str:
    if any(source.remote for source in corpus.corpora):
        return "its rows are not counted, since shards are elsewhere"
    if max(source.text_bytes for source in corpus.corpora) > COUNT_BYTES:
        return f"its rows are not counted above {COUNT_BYTES / 1e6:,.0f} MB of text"
    return "its rows are counted when the run is created"
