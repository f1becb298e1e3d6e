"""What a config means: steps, batch arithmetic, memory, time and cost. Nothing is downloaded, built or launched here.

`decide` replaces every `auto` once, from tables and device facts; `make` derives the numbers and finds what does not
fit together, all of it at once. A run keeps its plan in plan.json and reads it back when it is resumed.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from picotrain import hardware, shape
from picotrain.config.saved import write_whole
from picotrain.config.schema import Config, FullAttention, OptimizerConfig, Recompute, WindowAttention
from picotrain.data.corpus import Corpus
from picotrain.data.mixture import Mixture
from picotrain.data.shares import Sharing
from picotrain.data.units import COUNT_BYTES, WINDOW_SHARDS, default_lanes, default_unit_bytes
from picotrain.errors import ConfigError
from picotrain.plan import fp8, pace
from picotrain.plan.memory import (
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
from picotrain.plan.problems import attention_problems, batch_problems, lane_problems, nearest, profiler_problems

AUTO_DATA_EPOCHS = 20.0  # data=auto takes the embedded corpus up to this many passes over it
REPEAT_WARNING_EPOCHS = 4.0  # repeating up to about 4 times costs little (arXiv:2305.16264)
COMPILE_FLOPS = 3e13  # of training on a CPU from which on torch.compile is taken: about a minute, of which it wins back what it takes


__all__ = ["Plan", "choose_data", "decide", "estimate_bytes_per_token", "halved", "lighter_settings", "make", "nearest", "predict_memory"]


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
    predicted_memory: dict[str, int] = {}  # the same by part (picotrain.plan.memory.Memory)
    predicted_step_ms: float | None = None
    predicted_by: Literal["measured", "assumed"] | None = None  # None: no time can be told (picotrain.plan.pace)
    predicted_from: str = ""  # which figures, or what is assumed
    predicted_hours: float | None = None  # of steps: evaluations and saves are not counted
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


def decide(config: Config) -> Config:
    """Replace every `auto` and null that the machine decides. Only what is left open asks the machine."""
    hw, train = config.hardware, config.train
    machine = hardware.cpu() if hw.device == "cpu" else hardware.detect()
    device = machine.device if hw.device == "auto" else hw.device
    known = machine if machine.device == device else None  # planning for hardware that is not here
    nproc = (known.count if known else 1) if hw.nproc_per_node == "auto" else hw.nproc_per_node
    name = hw.name or (known.name if known else device)
    fast_bf16 = known.fast_bf16 if known and not hw.name else device == "cuda"
    use_compile = _compile_pays(config, device) if hw.compile == "auto" else hw.compile
    return config.model_copy(
        update={
            "hardware": hw.model_copy(
                update={
                    "device": device,
                    "nproc_per_node": nproc,
                    "name": name,
                    "memory_bytes": hw.memory_bytes or (known.memory_bytes if known else None),
                    "threads": hw.threads or max(1, hardware.cores() // nproc),
                    "compile": use_compile,
                }
            ),
            "train": train.model_copy(
                update={
                    "seq_len": train.seq_len or shape.default_seq_len(config.model.depth),
                    "precision": ("bf16" if fast_bf16 else "fp32") if train.precision == "auto" else train.precision,
                }
            ),
        }
    )


def _compile_pays(config: Config, device: str) -> bool:
    """Always on a GPU. On a CPU where there is a C++ compiler and enough to do for what it costs (docs/log.md, 2026-11-25)."""
    if device != "cpu":
        return device == "cuda"
    return hardware.has_compiler() and _horizon_tokens(config, None)[0] * facts(config)[3] > COMPILE_FLOPS


def estimate_bytes_per_token(vocab_size: int) -> float:
    """Bytes a token stands for, before a tokenizer is there: 3.85 at 8,192 and 4.31 at 32,768, measured on Python source."""
    return 3.85 + 0.23 * math.log2(vocab_size / 8192)


def choose_data(config: Config, pystdlib_bytes: int) -> tuple[str, str]:
    """What data=auto means for this horizon: (group choice, the reason in words)."""
    tokens = _horizon_tokens(config, None)[0]
    epochs = tokens / (pystdlib_bytes / estimate_bytes_per_token(config.tokenizer.vocab_size))
    fact = f"the horizon of {tokens:,} tokens is {epochs:.1f} passes over the embedded standard library"
    if epochs <= AUTO_DATA_EPOCHS:
        return "pystdlib", f"data=auto is pystdlib: {fact} (at most {AUTO_DATA_EPOCHS:.0f})"
    return "climbmix", f"data=auto is climbmix: {fact}, more than {AUTO_DATA_EPOCHS:.0f}"


def make(config: Config, name: str, data: Corpus | Mixture | None = None, bytes_per_token: float | None = None) -> Plan:
    """Derive the plan of a decided config; what the corpus or tokenizer would tell stays an estimate without them.

    Raises ConfigError with every problem found: a batch that does not divide, a dp_size that does not divide the
    lanes, more lanes than units.
    """
    corpus = Mixture.of(data) if data else None
    train, hw = config.train, config.hardware
    assert train.seq_len is not None and hw.nproc_per_node != "auto", "plan.make wants a decided config"
    d, params, windows, flops = facts(config)
    per_token = bytes_per_token or estimate_bytes_per_token(config.tokenizer.vocab_size)
    epoch_rows = corpus.epoch_rows if corpus else None
    corpus_tokens = _epoch_tokens(corpus, train.seq_len, per_token) if corpus else None
    world_size = hw.nproc_per_node * config.launch.nnodes
    problems = attention_problems(config)

    batch, data_held = total_batch(config, params), data_bytes(config, corpus, per_token)
    problems += batch_problems(train, train.seq_len, batch, world_size)
    rows = max(batch // train.seq_len, 1)
    micro_rows = device_batch(config, d, params, rows, world_size, data_held)
    problems += fp8.problems(config, d, micro_rows * train.seq_len)

    stream = _stream_facts(config, corpus, train.seq_len)
    problems += lane_problems(config, stream["lanes"], stream.pop("largest_source"), world_size)

    tokens, horizon = _horizon_tokens(config, corpus_tokens)
    num_steps = max(1, math.ceil(tokens / batch)) if batch > 0 else 1
    if corpus or not train.num_train_epochs:  # else their number is not known yet
        problems += profiler_problems(config, num_steps)
    if problems:
        raise ConfigError(problems)

    total_tokens = num_steps * batch
    memory = predict(config, d, params, micro_rows, data_held)
    epochs = total_tokens / corpus_tokens if corpus_tokens else None
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
        epochs=epochs,
        epoch_rows=epoch_rows,
        sharing="even",
        **stream,
        sources=_source_epochs(corpus, total_tokens, train.seq_len, per_token) if corpus else {},
        bytes_per_token=per_token,
        eval_rows=max(train.eval_tokens // train.seq_len, 1),
        **dataclasses.asdict(_rates(config.optimizer, d.width, batch, total_tokens)),
        checkpoint_bytes=checkpoint_bytes(config, params),
        staging_bytes=staging_bytes(config, params),
        predicted_memory_bytes=memory.peak,
        predicted_memory=memory.parts(),
        notes=_notes(config, corpus, bytes_per_token, epochs, memory.peak),
    )
    return pace.timed(plan, config, plan.peak_flops)


def _rates(o: OptimizerConfig, width: int, batch: int, total_tokens: int) -> shape.Rates:
    """Peak rates and decay: as they stand, or scaled to the model, the batch and the horizon."""
    given = shape.Rates(o.matrix_lr, o.embed_lr, o.head_lr, o.weight_decay, o.scalar_lr)
    return shape.scale_rates(given, width, batch, total_tokens, orthogonal=o.kind == "muon") if o.scale else given


def _stream_facts(config: Config, mixture: Mixture | None, seq_len: int) -> dict[str, Any]:
    """Units of all sources and the lanes that read them; `largest_source` is the most units that one has. None: not known yet."""
    unit_bytes = config.data.unit_bytes or default_unit_bytes(seq_len)
    units = [len(found) for found in mixture.units(unit_bytes)] if mixture else []
    largest = max(units, default=None)
    lanes = config.data.lanes or (default_lanes(largest) if largest else None)
    return {"lanes": lanes, "unit_bytes": unit_bytes, "num_units": sum(units) or None, "largest_source": largest}


def _epoch_tokens(mixture: Mixture, seq_len: int, per_token: float) -> float:
    """Targets of one pass: counted, or estimated from the bytes of the text."""
    rows = mixture.epoch_rows
    return mixture.text_bytes / per_token if rows is None else rows * seq_len


def _source_epochs(mixture: Mixture, total_tokens: int, seq_len: int, per_token: float) -> dict[str, float]:
    """Passes over each source of a mixture, were none to leave and, where they are not counted, all of the same bytes per token; {} for
    a single corpus."""
    if len(mixture.sources) == 1:
        return {}
    tokens = _epoch_tokens(mixture, seq_len, per_token)
    of_all = zip(mixture.names, mixture.shares, mixture.sizes, strict=True)
    return {name: total_tokens * share / (tokens * size / sum(mixture.sizes)) for name, share, size in of_all}


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
    """The kernels, where they are certain before anything runs: all but those that a GPU has to try."""
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


def _horizon_tokens(config: Config, corpus_tokens: float | None) -> tuple[int, str]:
    """Training tokens and the key that set them. Epochs of an unknown corpus count as if it had no end: 0 tokens."""
    _, params, _, flops = facts(config)
    train = config.train
    batch = total_batch(config, params)
    if train.max_steps:
        return train.max_steps * batch, "train.max_steps"
    if train.num_train_epochs:
        return round(train.num_train_epochs * (corpus_tokens or 0)), "train.num_train_epochs"
    if train.target_tokens:
        return train.target_tokens, "train.target_tokens"
    if train.target_flops:
        return int(train.target_flops / flops), "train.target_flops"
    ratio = train.target_param_data_ratio or shape.DEFAULT_RATIO
    return round(ratio * params.scaling), "train.target_param_data_ratio"


def _notes(config: Config, corpus: Mixture | None, bytes_per_token: float | None, epochs: float | None, memory: int) -> list[str]:
    notes = []
    if corpus is None:
        notes.append(f"the corpus {config.data.name} is not prepared yet: units, lanes and epochs are not known")
        if config.train.num_train_epochs:
            notes.append("num_train_epochs needs the corpus: the number of steps is not known yet and shown as 1")
    elif config.train.num_train_epochs and corpus.epoch_rows is None:
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
        notes.append("no tokenizer is trained yet: bytes per token is an estimate from the vocabulary size")
    if epochs and epochs > REPEAT_WARNING_EPOCHS:
        notes.append(
            f"warning: {epochs:.1f} passes over the corpus; beyond {REPEAT_WARNING_EPOCHS:.0f} repeated data teaches less and less"
        )
    notes += fp8.notes(config)
    room = config.hardware.memory_bytes
    if room and memory > room * MEMORY_SHARE:
        notes.append(f"warning: predicted memory {memory / 2**30:.1f} GiB of {room / 2**30:.1f} GiB; try a smaller train.device_batch_size")
    return notes


def _why_uncounted(corpus: Mixture) -> str:
    if any(source.remote for source in corpus.corpora):
        return "its rows are not counted, since shards are elsewhere"
    if max(source.text_bytes for source in corpus.corpora) > COUNT_BYTES:
        return f"its rows are not counted above {COUNT_BYTES / 1e6:,.0f} MB of text"
    return "its rows are counted when the run is created"
