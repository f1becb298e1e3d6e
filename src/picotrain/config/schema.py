"""The schema of a run's config: frozen, typed, and closed to unknown keys.

A config holds data, never code: replaceable parts are chosen by their `kind`, and bring their keys (`picotrain.contracts`).
`schema_of` gives the schema with the parts that a config names.
`auto` values are decided once, before config.yaml is written (see `picotrain.planning.decide`).
Units stand in the names: `_tokens`, `_bytes`, `_s`. A rule that ties keys of one section together
is checked by that section's `_check`, so that no object of these classes contradicts itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, StrictBool, create_model

from picotrain import parts
from picotrain.contracts import Evaluation, Model, Optimizer, Part, Schedule, Source, Strategy
from picotrain.errors import ConfigError, Problem
from picotrain.section import (
    CREDENTIALS,
    Int,
    Large,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveFloat,
    Seconds,
    Section,
    Seed,
    Size,
    Steps,
    Text,
    Words,
)

LEAST_SEQ_LEN = 8  # tokens a row

SCHEMA_VERSION = 1
HORIZONS = ("max_steps", "num_train_epochs", "target_tokens", "target_flops", "target_param_data_ratio")

FullAttention = Literal["auto", "fa4", "fa3", "cudnn", "flash", "sdpa", "blocked"]
WindowAttention = Literal["auto", "fa4", "fa3", "flash", "flex", "banded", "blocked"]
Recompute = Literal["none", "selective", "full"]
if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[tuple(parts.kinds("trackers"))]  # what is installed


class RunConfig(Section):
    """Which run this is and where it lives."""

    name: Text | None = None  # null: model, data and a hash of the experiment
    dir: Text | None = None  # null: runs/<name> below the current folder
    cache_dir: Text | None = None  # corpora and tokenizers; null: $PICOTRAIN_CACHE, else ~/.cache/picotrain
    seed: Seed = 1337
    resume: Literal["auto", "never"] = "auto"

    def _problems(self) -> list[Problem]:
        parts = (self.name or "run").split("/")  # a name may lead into folders below runs/, never out of it
        if all(part not in ("", ".", "..") and part.isprintable() and len(part.encode(errors="replace")) <= 255 for part in parts):
            return []
        rule = f"is {self.name!r:.60} and must name a folder below runs/: no part of it empty, '.', '..', over 255 bytes or unprintable"
        return [Problem("run.name", rule, "e.g. run.name=first; run.dir=PATH puts a run anywhere")]


class MixtureSource(Section):
    """One source of data.kind=mixture."""

    source: Text  # pystdlib, climbmix, fineweb_edu, or a path or URL as data.path takes it
    weight: PositiveFloat = 1.0  # its share of the rows, relative to the others'
    at_end: Literal["wrap", "stop"] = "wrap"  # read once: begin anew, or leave the mixture
    num_shards: Size | None = None  # of a Hugging Face Hub source: training shards to fetch; null: what its share of the horizon needs
    val_shard: Text | None = None  # file name of its validation shard; null: the last one

    @property
    def name(self) -> str:
        """What it is called in metrics."""
        return self.source.rstrip("/").rpartition("/")[2] or self.source


class DataConfig(Part):
    """A corpus: Parquet shards with a `text` column."""

    kind: Literal["auto", "pystdlib", "files", "hub", "mixture"]
    name: Text  # shown in run names and reports
    path: Text | None = None  # kind=files: a folder, a file or a glob; or the URL of a folder of shards
    mixture: tuple[MixtureSource, ...] = ()  # kind=mixture
    repo_id: Text | None = None  # kind=hub: data set on the Hugging Face Hub
    file_pattern: Text | None = None  # kind=hub: e.g. "shard_{index:05d}.parquet"
    num_shards: Size | None = None  # kind=hub: training shards to fetch; null: what the horizon needs (picotrain.planning.resolve)
    shard_text_bytes: Positive | None = None  # kind=hub: text in a shard, about
    max_shards: Annotated[int, Field(ge=2, le=2**20), Number] | None = None  # kind=hub: shards there are, the validation shard included
    val_shard: Text | None = None  # file name of the validation shard; null: the last one
    licence: Text | None = None  # of the text, in words; shown, and nothing follows from it
    lanes: Size | None = None  # null: the largest power of two <= min(64, units)
    unit_bytes: Positive | None = None  # null: max(1 MiB, 400 x (seq_len + 1))
    on_bad_shard: Literal["stop", "skip"] = "stop"  # what cannot be read: save and end, or pass over it and note an event
    cache_bytes: Positive | None = 100_000_000_000  # of shards fetched from a URL that are kept; null: all

    def _problems(self) -> list[Problem]:
        needed = {"files": ("path",), "hub": ("repo_id", "file_pattern", "max_shards"), "mixture": ("mixture",)}
        optional = {"hub": ("num_shards", "shard_text_bytes")}
        problems = []
        for kind, keys in needed.items():
            for key in (*keys, *optional.get(kind, ())):
                given = getattr(self, key) not in (None, ())
                if kind == self.kind and not given and key in keys:
                    problems.append(Problem(f"data.{key}", f"must be given for data.kind={kind}", f"data.{key}=..."))
                if kind != self.kind and given and (self.kind, key) != ("auto", "num_shards"):  # auto may become a hub corpus
                    rule = f"is read for data.kind={kind} only, and this is {self.kind}"
                    problems.append(Problem(f"data.{key}", rule, "e.g. data=climbmix" if kind == "hub" else f"add data={kind}"))
        urls = {"data.path": [self.path or ""], "data.mixture": [entry.source for entry in self.mixture]}
        for key, texts in urls.items():
            if any(CREDENTIALS.match(text) for text in texts):
                rule = "holds credentials, which config.yaml would keep for everybody to read"
                problems.append(Problem(key, rule, "the protocol's own environment variables or files, e.g. ~/.netrc, AWS_ACCESS_KEY_ID"))
        if problems:
            return problems
        return {"hub": self._shard_problems, "mixture": self._mixture_problems}.get(self.kind, list)()

    def _mixture_problems(self) -> list[Problem]:
        problems = []
        names = [entry.name for entry in self.mixture]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            rule = f"has several sources called {', '.join(twice)}, which metrics could not tell apart"
            problems.append(Problem("data.mixture", rule, "folders with different names"))
        if all(entry.at_end == "stop" for entry in self.mixture):
            problems.append(Problem("data.mixture", "would run dry: every source has at_end=stop", "at_end=wrap for at least one"))
        return problems

    def _shard_problems(self) -> list[Problem]:
        assert self.file_pattern and self.max_shards
        problems = []
        try:
            named = self.file_pattern.format(index=0) != self.file_pattern.format(index=1)
        except (LookupError, ValueError):
            named = False
        if not named:
            rule = f"must name a shard by its number, and {self.file_pattern!r} does not"
            problems.append(Problem("data.file_pattern", rule, 'e.g. "shard_{index:05d}.parquet"'))
        if self.num_shards is None and self.shard_text_bytes is None:
            rule = "must be given, as data.shard_text_bytes does not say how much text a shard has"
            problems.append(Problem("data.num_shards", rule, "data.num_shards=..., or data.shard_text_bytes=... and the horizon decides"))
        if (self.num_shards or 0) >= self.max_shards:
            rule = f"must be below data.max_shards={self.max_shards}, as one shard validates, not {self.num_shards}"
            problems.append(Problem("data.num_shards", rule, f"at most {self.max_shards - 1}"))
        return problems


class TokenizerConfig(Section):
    """Byte-level BPE, trained on the training split or taken from a file."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**24), Number] = 32_768  # specials included: 256 bytes and <|bos|> at least
    train_bytes: Positive = 100_000_000  # text the vocabulary is trained on, spread over the shards
    path: Text | None = None  # a tokenizer.json to use instead of training one
    encoder: Literal["auto", "gigatoken", "tokenizers"] = "auto"


class TrainConfig(Section):
    """Batch, horizon, cadence and precision."""

    seq_len: Annotated[int, Field(ge=LEAST_SEQ_LEN, le=2**24), Number] | None = None  # null: 512 below depth 12, else 2,048
    total_batch_size: Positive | Literal[-1] = -1  # tokens per step; -1: from the model's size
    device_batch_size: Size | Literal["auto"] = "auto"  # rows per rank and micro-batch
    max_steps: Steps | None = None
    num_train_epochs: PositiveFloat | None = None
    target_tokens: Positive | None = None
    target_flops: Large | None = None
    target_param_data_ratio: PositiveFloat | None = None
    eval_every: Int = 250  # steps; <= 0: off
    eval_tokens: Positive = 41_943_040
    core_metric_every: Int = 2000  # steps; <= 0: off
    core_metric_max_per_task: Int = 500  # examples; <= 0: all
    sample_every: Int = 2000  # steps; <= 0: off
    save_every: Int = -1  # steps; <= 0: only at the end
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # fp8: the blocks' matmuls, the rest in bf16
    deterministic: StrictBool = False
    grad_clip: PositiveFloat | None = 1.0
    max_skipped: NonNegativeInt = 10  # updates skipped in a row, because they are not finite, before the run ends as diverged
    skip_loss_z: PositiveFloat | None = None  # skip an update whose loss is so many deviations above the last 100's; null: off

    def _problems(self) -> list[Problem]:
        given = [f"train.{key}" for key in HORIZONS if getattr(self, key) is not None]
        return [two_horizons(given)] if len(given) > 1 else []


def two_horizons(keys: list[str]) -> Problem:
    """The problem of several horizon keys set at the same level."""
    return Problem(keys[0], f"sets the horizon, and so does {' and '.join(keys[1:])}", "give one of them only")


class HardwareConfig(Section):
    """What the machine decides; the experiment does not change with it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    nproc_per_node: Size | Literal["auto"] = "auto"  # auto: every GPU, else 1
    threads: Size | None = None  # CPU threads per process; null: cores / processes
    compile: StrictBool | Literal["auto"] = "auto"
    attention: FullAttention = "auto"  # auto: the first of the device's kernels that works, see picotrain.hardware
    window_attention: WindowAttention = "auto"  # of layers with a sliding window
    recompute: Recompute = "none"  # activations computed again in the backward instead of kept (picotrain.model.recompute)
    name: Text | None = None  # e.g. "NVIDIA H100 80GB HBM3"; null: ask the machine
    memory_bytes: Positive | None = None  # per device; null: ask the machine
    peak_flops: Large | None = None  # dense bf16 per device; null: from the table of picotrain.hardware
    price_per_hour: NonNegative | None = None  # of the node, in dollars

    def _problems(self) -> list[Problem]:
        asked = {self.attention, self.window_attention} & {"fa4", "fa3", "flash"}
        if len(asked) < 2:
            return []
        rule = f"is {self.window_attention} and hardware.attention is {self.attention}, but a process holds one flash-attention"
        return [Problem("hardware.window_attention", rule, "the same for both, or auto for one of them")]


class LaunchConfig(Section):
    """How processes are started and ended."""

    nnodes: Size = 1
    node_rank: NonNegativeInt = 0
    rdzv_endpoint: Text | None = None  # host:port of the first node; null on one node
    grace_s: Seconds = 120.0  # how long workers get to save after a signal
    max_restarts: NonNegativeInt = 0  # how often workers are started again after one has died
    hang_s: Seconds | None = 1800.0  # no step for so long: every rank prints its stacks and ends; null: never

    def _problems(self) -> list[Problem]:
        problems = []
        if self.node_rank >= self.nnodes:
            problems.append(
                Problem("launch.node_rank", f"must be below launch.nnodes={self.nnodes}, not {self.node_rank}", "ranks start at 0")
            )
        host, _, port = (self.rdzv_endpoint or "host:1").rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
            rule = f"must be host:port with a port of 1 to 65535, not {self.rdzv_endpoint!r}"
            problems.append(Problem("launch.rdzv_endpoint", rule, "e.g. launch.rdzv_endpoint=node0:29400"))
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            problems.append(
                Problem("launch.rdzv_endpoint", "must be given on more than one node", "launch.rdzv_endpoint=host:port of node 0")
            )
        return problems


class CheckpointConfig(Section):
    """How checkpoints are written, and which stay."""

    background: StrictBool = True  # the loop waits only while tensors are copied to host memory
    rolling_minutes: PositiveFloat | None = 10.0  # at most so much work is lost; null: no rolling checkpoints
    keep_last: Steps | None = None  # permanent checkpoints that stay; null: all
    keep_best: StrictBool = True  # the one with the lowest validation BPB stays, too
    keep_every: Steps | None = None  # and those of steps that this divides
    shard_bytes: Positive = 5 * 10**9  # of a safetensors file at most


class ArchiveConfig(Section):
    """Where a run is mirrored to while it trains."""

    url: Text | None = None  # the run's own folder: s3://, gs://, hf://datasets/..., file:// or a path; null: none
    interval_s: Seconds = 300.0  # between passes; a whole checkpoint is sent at once
    min_age_s: NonNegative = 30.0  # younger files wait: they may be half-written
    keep_last: Steps | None = 3  # checkpoints that stay there, beside the best; null: all
    close_s: Seconds = 600.0  # how long the end of a run waits for the last pass

    def _problems(self) -> list[Problem]:
        if not CREDENTIALS.match(self.url or ""):
            return []
        rule = "holds credentials, which config.yaml would keep for everybody to read"
        return [Problem("archive.url", rule, "the protocol's own environment variables or files, e.g. AWS_ACCESS_KEY_ID")]


class BpbConfig(Section):
    """Bits per byte on the validation shard."""

    device_batch_size: Size | None = None  # rows per forward; null: as in training


class CoreConfig(Section):
    """The tasks of the CORE metric."""

    bundle: Text | None = None  # folder of an evaluation bundle, or the URL of its archive; null: CORE is not evaluated
    sha256: Text | None = None  # of the archive at that URL, 64 hex digits
    baseline_table: Text = "eval_meta_data.csv"  # the file in the bundle that has the random baselines

    def _problems(self) -> list[Problem]:
        problems = []
        if CREDENTIALS.match(self.bundle or ""):
            problems.append(Problem("evaluation.core.bundle", "holds credentials", "a URL without them"))
        if "://" in (self.bundle or "") and self.sha256 is None:
            hint = "the 64 digits that `sha256sum` prints for an archive you trust"
            problems.append(Problem("evaluation.core.sha256", "a bundle from a URL needs the SHA-256 of its archive", hint))
        elif self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            problems.append(Problem("evaluation.core.sha256", f"{self.sha256!r} is no SHA-256", "64 hexadecimal digits"))
        return problems


class EvaluationConfig(Section):
    """What is measured on the weights."""

    bpb: BpbConfig = BpbConfig()
    core: CoreConfig = CoreConfig()


class SamplingConfig(Section):
    """What is generated when samples are due."""

    prompts: tuple[str, ...] = ()
    max_tokens: Words = 64
    temperature: NonNegative = 0.8  # 0: greedy
    top_k: Words | None = 50  # null: all


class LoggerConfig(Section):
    """What is shown; metrics.jsonl always has every step."""

    log_every: Steps = 10  # steps between console lines
    trackers: tuple[TrackerName, ...] = ()  # places beside metrics.jsonl that records go to


class ProfilerConfig(Section):
    """A look into a few steps, written to profile/ in the run directory."""

    enabled: StrictBool = False
    first_step: NonNegativeInt | None = None  # null: the fourth step of a start, once in a run
    steps: Steps = 3


class Config(Section):
    """Everything a run does."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run: RunConfig = RunConfig()
    model: SerializeAsAny[Model]
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: SerializeAsAny[Optimizer]
    schedule: SerializeAsAny[Schedule]
    train: TrainConfig = TrainConfig()
    hardware: HardwareConfig = HardwareConfig()
    parallel: SerializeAsAny[Strategy]
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    archive: ArchiveConfig = ArchiveConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    logger: LoggerConfig = LoggerConfig()
    profiler: ProfilerConfig = ProfilerConfig()


# The schema of a config that names these parts ------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """A section that a part fills."""

    group: str  # of `picotrain.parts`
    contract: type[Part]
    default: str | None = None  # the kind where none is named; None: one has to be


ROOMS = {
    "model": Room("models", Model, "gpt"),
    "data": Room("sources", Source),
    "optimizer": Room("optimizers", Optimizer, "adamw"),
    "schedule": Room("schedules", Schedule),
    "parallel": Room("strategies", Strategy, "ddp"),
}
TAKEN = ("train", "val", "core", "sample", "checkpoint", "event", "torn")  # kinds of the lines of metrics.jsonl
DATA_KINDS = ("auto", "pystdlib", "files", "hub", "mixture")  # of DataConfig


def kinds_of(section: str) -> list[str]:
    """The kinds that there are for a section."""
    return [*(DATA_KINDS if section == "data" else ()), *parts.kinds(ROOMS[section].group)]


def part_of(section: str, kind: str) -> type[Part]:
    """The class of a part. Raises ConfigError for a package's part that cannot be used, KeyError for a kind that does not exist."""
    if section == "data" and kind in DATA_KINDS:
        return DataConfig
    return parts.find(ROOMS[section].group, kind, ROOMS[section].contract)


def evaluation_of(kind: str) -> type[Part]:
    """The class of a periodic evaluation; as `part_of`."""
    if kind in TAKEN:
        raise ConfigError([Problem(kind, "cannot be an evaluation's kind, as lines of metrics.jsonl have it already", "another name")])
    return parts.find("evaluations", kind, Evaluation)


def section_class(schema: type[Config], section: str) -> type[Section]:
    """The class of a section of this schema."""
    found: Any = schema.model_fields[section].annotation
    return found


def schema_of(chosen: Mapping[str, str], evaluations: tuple[str, ...] = ()) -> type[Config]:
    """The schema where these kinds fill the sections, and with a section `evaluation.<kind>` for each of these evaluations."""
    return _schema(tuple(sorted(chosen.items())), tuple(sorted(evaluations)))


@cache
def _schema(chosen: tuple[tuple[str, str], ...], evaluations: tuple[str, ...]) -> type[Config]:
    fields: dict[str, Any] = {}
    for section, kind in chosen:
        part = part_of(section, kind)
        fields[section] = (part, part(kind=kind) if (section, kind) == ("parallel", "ddp") else ...)
    if evaluations:  # a config names them, so that their keys, of which some may have no default, are there
        added: dict[str, Any] = {name: (evaluation_of(name), ...) for name in evaluations}
        fields["evaluation"] = (create_model("EvaluationConfig", __base__=EvaluationConfig, **added), ...)
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, **fields)
