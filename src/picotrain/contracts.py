"""What a part has to offer: the page to read before you add an optimizer, a schedule, a model, a data source, an evaluation or a tracker.

A part is a class. For all but trackers it is also the part's section of the config: its fields are the keys, and `kind` chooses it.
Its methods build the part, and say what the rest of the program must know of it. docs/extending.md adds one of each.

The classes here and those of the built-in parts import no torch: commands that only read configs stay quick. What needs torch
imports it in its method.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, StrictBool

from picotrain.section import Int, NonNegative, NonNegativeInt, Number, Positive, Rate, Section, Size, Text
from picotrain.shape import Dims, Kept, Parameters, flops_per_token

if TYPE_CHECKING:
    import torch

    from picotrain.model.decoder import LanguageModel
    from picotrain.parallel import Parallel

Say = Callable[[str], object]


class Part(Section):
    """A section of the config that stands for a part."""

    kind: str


# Optimizers -----------------------------------------------------------------------------------------------


class Optimizer(Part):
    """An optimizer. A model's parameters come in groups, each with a learning rate of its own; only matrices decay."""

    matrix_lr: Rate  # of the blocks' matrices
    embed_lr: Rate  # of the embedding
    head_lr: Rate  # of the output matrix
    scalar_lr: Rate = 0.02  # of vectors: residual scalars, smear, norms with weights
    weight_decay: NonNegative = 0.1  # on matrices only
    scale: StrictBool = True  # learning rates and decay follow batch, width and horizon (picotrain.shape.scale_rates)

    orthogonal: ClassVar[bool] = False  # a matrix's update has the same spectral norm at every width: its rate is not scaled

    def build(self, groups: list[dict[str, Any]], parallel: Parallel, dtype: torch.dtype) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, as `picotrain.optim.param_groups` gives them: each has `name` ("embed", "head",
        "scalars" or "matrices"), `params`, `lr`, `peak_lr` and `weight_decay`, the matrices last.

        The loop sets each group's `lr` before every step. parallel: the ranks, whose gradients are the same by then. dtype: what the
        model computes in. What is kept of a parameter goes into `optimizer.state[parameter]` as tensors of its shape (or scalars called
        "step"); checkpoints save that and nothing else.
        """
        raise NotImplementedError

    def skips(self, device: torch.device) -> bool:
        """Whether a step looks at `optimizer.found_inf` (0-d tensor, 1.0: skip) and then leaves everything as it is. Where it does not,
        an update that is to be skipped costs a wait for the device: gradients are removed instead."""
        return False

    def state_values(self, parameters: Parameters) -> int:
        """How many fp32 values are kept between steps."""
        return 2 * parameters.total

    def step_bytes(self, parameters: Parameters, value_bytes: int, ranks: int) -> int:
        """Memory that a step takes beside that state; value_bytes: of a value in the model's dtype."""
        return 0

    def works_on(self, parameters: Parameters) -> int:
        """How many parameters a step's time is proportional to."""
        return parameters.total

    def step_flops(self, parameters: Parameters, width: int) -> float:
        """Matmul FLOPs of a step, for an estimate of its time before anything was measured."""
        return 0.0


# Schedules ------------------------------------------------------------------------------------------------


class Schedule(Part):
    """The learning-rate factor over the run: 1 at the peak, the same for every parameter group. Fractions are of num_steps."""

    warmup_steps: NonNegativeInt = 0

    def shape(self, step: int, num_steps: int) -> float:
        """The factor for step 0 to num_steps - 1, warm-up aside."""
        raise NotImplementedError

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of a step. The warm-up rises linearly over the first steps and is never 0."""
        return min((step + 1) / self.warmup_steps if self.warmup_steps else 1.0, self.shape(step, num_steps))


# Models ---------------------------------------------------------------------------------------------------


class Model(Part):
    """An architecture. What the plan has to know of it stands here, what computes in the module that `build` gives."""

    depth: Annotated[int, Field(gt=0, le=10_000), Number]  # layers

    @property
    def label(self) -> str:
        """How run names begin."""
        return f"{self.kind}-d{self.depth}"

    @property
    def features(self) -> tuple[str, ...]:
        """Words for work that FLOPs do not count: steps measured with other words tell nothing of this model's time."""
        return (self.kind,)

    @property
    def bench_keys(self) -> tuple[str, ...]:
        """Overrides with which `picotrain bench step --depth N` measures this model."""
        return (f"model.kind={self.kind}",)

    def dims(self) -> Dims:
        """The dimensions of a layer, and how many there are."""
        raise NotImplementedError

    def parameters(self, vocab_size: int) -> Parameters:
        """Weights by part."""
        raise NotImplementedError

    def windows(self, seq_len: int) -> tuple[int, ...]:
        """How many tokens each layer's attention looks back, seq_len: at all of a row."""
        return (seq_len,) * self.depth

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """FLOPs of training on a token, forward and backward."""
        return flops_per_token(self.dims(), self.parameters(vocab_size), self.windows(seq_len), seq_len)

    def kept(self) -> Kept:
        """What is kept of a token for the backward; picotrain.planning.activations makes bytes of it."""
        raise NotImplementedError

    @property
    def logit_cap(self) -> float | None:
        """The bound of a soft-cap on logits; None: there is none."""
        return None

    def build(self, vocab_size: int, seq_len: int, dtype: torch.dtype) -> LanguageModel:
        """The module, not initialised. Weights are fp32 and are cast to `dtype` where they are used."""
        raise NotImplementedError


# Data sources ---------------------------------------------------------------------------------------------


class Source(Part):
    """Where text comes from. A source writes Parquet shards with a `text` column, once: they are kept in the cache folder, under a hash of
    its own keys."""

    name: Text  # shown in run names and reports
    val_shard: Text | None = None  # file name of the validation shard; null: the last one
    licence: Text | None = None  # of the text, in words; shown, and nothing follows from it
    lanes: Size | None = None  # null: the largest power of two <= min(64, units)
    unit_bytes: Positive | None = None  # null: max(1 MiB, 400 x (seq_len + 1))
    on_bad_shard: Literal["stop", "skip"] = "stop"  # what cannot be read: save and end, or pass over it and note an event

    version: ClassVar[int] = 1  # raise it when the same keys come to mean another text

    def write(self, folder: Path, say: Say) -> None:
        """Write at least two shards into an empty folder, DataError where that cannot be: `part_00000.parquet`, ... in the order of their
        names; the last one validates. Row groups of 1 MiB of text or more read well. `say` takes lines for the user. Of several
        processes one calls it; what it wrote is used when it returns, and thrown away when it raises."""
        raise NotImplementedError

    @property
    def text_bytes(self) -> float | None:
        """About how much text that is, for a plan before it is written; None: not known."""
        return None

    @property
    def reads(self) -> str:
        """What is read and from where, as told before a config from a file is used."""
        return f"gets text by the data source {self.kind}"

    # Keys of the built-in sources that the rest asks for.
    @property
    def path(self) -> None:
        return None

    @property
    def mixture(self) -> tuple[()]:
        return ()

    @property
    def cache_bytes(self) -> None:
        return None

    @property
    def num_shards(self) -> None:
        return None


# Evaluations ----------------------------------------------------------------------------------------------


EVALUATED_ROWS = 256  # of the validation text, that an evaluation gets at most


class Evaluation(Part):
    """Something that is measured every so many steps and at the last one, after BPB and CORE and before the samples; not at step 0."""

    every: Int = 0  # steps; <= 0: off

    def measure(self, model: LanguageModel, rows: torch.Tensor, parallel: Parallel) -> dict[str, float]:
        """Figures by name, for a line of metrics.jsonl with this kind, the console, trackers and the checkpoint's metrics.json; "step" and
        "kind" are taken. rows: the first that bits per byte is measured on, at most EVALUATED_ROWS, int64 (N, seq_len + 1), on the device
        of the model.

        All ranks call it with the same rows and forward equally often; rank 0's figures are kept. The model is in evaluation mode and
        not compiled, no gradient is recorded, and what is drawn at random changes nothing of the training. An error that is raised on
        all ranks becomes an event, and training goes on.
        """
        raise NotImplementedError


# Parallel strategies --------------------------------------------------------------------------------------


class Strategy(Part):
    """How the model is spread over processes."""

    def build(self, device: str, meeting: Any) -> Parallel:
        """The ranks of this process group. device: "cpu", "cuda" or "mps"; meeting: where the ranks have met already, or None."""
        raise NotImplementedError


# Trackers -------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """A place, besides metrics.jsonl, that every record goes to. Chosen by name in `logger.trackers`."""

    package: ClassVar[str]  # that has to be installed
    sends: ClassVar[str]  # what leaves this machine and to whom, as told before a config from a file is used; "": nothing does

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        """Begin, or go on where the run in `run_dir` stopped. config: of the run, as plain values."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Take a record as metrics.jsonl has it: plain values with `step` and `kind`."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...
