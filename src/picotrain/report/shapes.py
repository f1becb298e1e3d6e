"""What a report wants of a run's files: which keys it counts, compares or formats, and as what. Other keys are shown as they are."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Number = Annotated[float, Field(strict=True, ge=-1e30, le=1e30, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]


class SampleShape(BaseModel):
    prompt: Text | None = None
    text: Text = ""


class TaskShape(BaseModel):
    """One task of CORE."""

    n: Count | None = None
    accuracy: Number | None = None
    centered: Number | None = None
    stderr: Number | None = None


class LineShape(BaseModel):
    """A line of metrics.jsonl."""

    step: Count | None = None
    kind: Text | None = None
    name: Text | None = None
    time: Text | None = None
    message: Text | None = None
    path: Text | None = None
    samples: list[SampleShape] = Field(default_factory=list)  # a plain [] would be copied for every line
    source_tokens: dict[str, Count] | None = None
    source_epochs: dict[str, Number] | None = None
    loss: Number | None = None
    smooth_loss: Number | None = None
    lr: Number | None = None
    grad_norm: Number | None = None
    tokens: Count | None = None
    tok_per_sec: Number | None = None
    mfu: Number | None = None
    dt_ms: Number | None = None
    data_wait_ms: Number | None = None
    total_training_time_s: Number | None = None
    epoch: Number | None = None
    val_bpb: Number | None = None
    val_loss: Number | None = None
    core_metric: Number | None = None
    tasks: dict[str, TaskShape] = Field(default_factory=dict)
    seconds: Number | None = None
    profiled: bool | None = None


class PlanShape(BaseModel):
    """plan.json, as far as a report shows it."""

    name: Text | None = None
    parameters: dict[str, Count] = {}
    notes: list[Text] = []
    num_steps: Count | None = None
    total_batch_size: Count | None = None
    flops_per_token: Count | None = None
    bytes_per_token: Number | None = None
    seq_len: Count = 0
    vocab_size: Count | None = None
    depth: Count = 0
    width: Count = 0
    n_heads: Count = 0
    n_kv_heads: Count = 0
    head_dim: Count = 0
    device_batch_size: Count = 0
    dp_size: Count = 0
    grad_accum_steps: Count = 0
    world_size: Count | None = None


class ShardShape(BaseModel):
    name: Text = ""
    row_groups: list[tuple[Count, Count]] = []


class CorpusShape(BaseModel):
    name: Text | None = None
    shards: list[ShardShape] = []
    val: ShardShape | None = None
    remote: tuple[Text, Count | None] | None = None


class NamedCorpusShape(BaseModel):
    name: Text
    shards: list[ShardShape]


class SourceShape(BaseModel):
    weight: Annotated[Number, Field(gt=0)]
    corpus: NamedCorpusShape


class MixtureShape(CorpusShape):
    sources: list[SourceShape] | None = None


class TokenizerShape(BaseModel):
    vocab_size: Count | None = None


class DataShape(BaseModel):
    """data.json, as far as a report shows it."""

    corpus: MixtureShape | None = None
    tokenizer: TokenizerShape | None = None


class SamplingShape(BaseModel):
    prompts: list[str] = []


class ConfigShape(BaseModel):
    """config.yaml, as far as a report looks into it."""

    run: dict[str, Any] = {}
    data: dict[str, Any] = {}
    sampling: SamplingShape = SamplingShape()


class ScoreShape(BaseModel):
    """metrics.json of a checkpoint."""

    val_bpb: Number | None = None


class FileShape(BaseModel):
    bytes: Count


class ManifestShape(BaseModel):
    """manifest.json of a checkpoint."""

    files: dict[str, FileShape] = {}


class SplitsShape(BaseModel):
    val: Number | None = None
    train: Number | None = None
    by_source: Any = None  # shown as far as it holds numbers by name


class CoreShape(BaseModel):
    core_metric: Number | None = None
    tasks: dict[str, TaskShape] = {}


class EvalShape(BaseModel):
    """results.json of an evaluation."""

    step: Count | None = None
    bpb: SplitsShape | None = None
    val_loss: Number | None = None
    core: CoreShape | None = None
