"""Problems of a config whose numbers are known: each function looks at one matter."""

from __future__ import annotations

from picotrain import hardware
from picotrain.config.schema import Config, TrainConfig
from picotrain.errors import Problem


def nearest(value: float, valid: list[int]) -> str:
    """The valid values next to one that is not, in words."""
    below, above = [v for v in valid if v <= value], [v for v in valid if v > value]
    return " or ".join(f"{v:,}" for v in [*below[-1:], *above[:1]])


def batch_problems(train: TrainConfig, seq_len: int, batch: int, dp_size: int) -> list[Problem]:
    """The batch has to be whole rows of every rank's micro-batches."""
    rows_per_rank = 1 if train.device_batch_size == "auto" else train.device_batch_size
    quantum = seq_len * dp_size * rows_per_rank
    if batch > 0 and batch % quantum == 0:
        return []
    factors = f"seq_len {seq_len:,} x dp_size {dp_size}" + (f" x device_batch_size {rows_per_rank}" if rows_per_rank > 1 else "")
    below = batch // quantum * quantum
    choices = nearest(batch, [v for v in (below, below + quantum) if v > 0])
    problem = f"{batch:,} tokens are no multiple of {factors} = {quantum:,}"
    derived = "" if train.total_batch_size == -1 else "; -1 derives it from the model"
    return [Problem("train.total_batch_size", problem, f"nearest that work: {choices}{derived}")]


def lane_problems(config: Config, lanes: int | None, num_units: int | None, dp_size: int) -> list[Problem]:
    """Every lane needs a unit, and every rank reads equally many lanes."""
    if lanes is None:
        return []
    problems = []
    if num_units is not None and lanes > num_units:
        problems.append(Problem("data.lanes", f"{lanes} lanes need as many units, the corpus has {num_units}", f"at most {num_units}"))
    if lanes % dp_size:
        fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
        problems.append(
            Problem(
                "hardware.nproc_per_node",
                f"dp_size {dp_size} does not divide the {lanes} lanes of the data stream",
                f"valid sizes: {', '.join(map(str, fitting))}; or another data.lanes before the run is created",
            )
        )
    return problems


def attention_problems(config: Config) -> list[Problem]:
    """A kernel that was asked for has to be one of the device's."""
    hw = config.hardware
    asked = (("attention", hw.attention, hardware.attention_kernels), ("window_attention", hw.window_attention, hardware.window_kernels))
    return [
        Problem(f"hardware.{key}", f"{name} does not run on {hw.device}", f"valid there: auto, {', '.join(kernels(hw.device))}")
        for key, name, kernels in asked
        if name not in ("auto", *kernels(hw.device))
    ]


def profiler_problems(config: Config, num_steps: int) -> list[Problem]:
    """The step that a profile begins at has to come."""
    first = config.profiler.first_step if config.profiler.enabled else None
    if first is None or first < num_steps:
        return []
    return [Problem("profiler.first_step", f"step {first:,} does not come: the run has {num_steps:,} steps", f"at most {num_steps - 1:,}")]


MOST_TOKENS = 2**53  # whole numbers up to here survive JSON and a double


def total_problems(tokens: float, num_steps: float, horizon: str) -> list[Problem]:
    """A horizon and a batch may each be possible, and their product not."""
    if tokens <= MOST_TOKENS and num_steps <= MOST_TOKENS:
        return []
    return [Problem(horizon, f"asks for {tokens:.3g} tokens in all, more than can be counted", f"at most {MOST_TOKENS:,}")]
