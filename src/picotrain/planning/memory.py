"""What a config takes of a device's memory, and the micro-batch that fits. Predictions, made of the parts of a training step.

On a GPU it is what torch allocates there, without CUDA's context and fragmentation; on a CPU the process' resident memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from picotrain import shape
from picotrain.config.schema import LEAST_SEQ_LEN, Config
from picotrain.data.mixture import Mixture
from picotrain.data.units import default_lanes, default_unit_bytes
from picotrain.planning.activations import FP32, Step
from picotrain.text import size

if TYPE_CHECKING:
    from picotrain.planning import Plan

MEMORY_SHARE = 0.85  # of a device's memory that a prediction may fill
CPU_MICRO_BATCH_TOKENS = 8192  # beyond this a larger micro-batch no longer raises a CPU's speed, it only takes memory

# Measured of a CPU process (docs/log.md, 2026-11-25): what is resident beside tensors and text, and by which share of activations and
# logits the C library's heap outgrows them. No freed block is given back. glibc (up to 2.37) hardly finds a freed aligned block
# again. bf16 kernels also copy what they multiply. By whether blocks are compiled.
PROCESS_BYTES = {False: 480 * 2**20, True: 520 * 2**20}
HEAP_WASTE = {False: {"fp32": 0.5, "bf16": 0.8}, True: {"fp32": 0.3, "bf16": 0.55}}

SLICE_BYTES = 8 * 2**20  # of text that the loader packs at once, at most
WORKERS = 2  # of the loader


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's process when it holds most, by part."""

    weights: int
    optimizer: int  # its state and, while it steps, what it takes for itself
    gradients: int
    activations: int
    loss: int  # logits of a chunk, and the head's gradient
    heap: int = 0  # CPU: freed blocks that nothing fits into
    staging: int = 0  # CPU: copies for saves in the background, and the file that is being written
    data: int = 0  # CPU: text and rows on their way, rows that validate
    process: int = 0  # CPU: Python and libraries

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))

    def parts(self) -> dict[str, int]:
        """Those that are not zero, by name."""
        return {name: n for name, n in dataclasses.asdict(self).items() if n}


def predict(config: Config, d: shape.Dims, params: shape.Parameters, device_batch: int, data_bytes: int = 0) -> Memory:
    """The memory of a rank in the phase that takes most: the loss, the begin or the end of the backward, the optimizer, on a CPU also a
    save. data_bytes: what the function of that name gives. It counts on a CPU."""
    step = Step(config, d, params, device_batch)
    whole, head = FP32 * params.total, FP32 * params.head
    accumulated = whole if _accumulates(config, params, device_batch) else 0
    buckets = whole if _world_size(config) > 1 else 0  # of DDP: gradients live in them, but for those of accumulation
    kept, state = step.layers(), checkpoint_bytes(config, params) - whole
    one_layer = kept // d.depth + step.recomputed_layer() + step.backward()
    tied = not params.embedding
    last_gradients = FP32 * params.value_embeds + (head if tied else FP32 * params.embedding)  # are made whole, beside what they add to
    summed = 2 * head if tied else 0  # the gradients of a table that was looked up in and was the head, beside their sum
    phases = [
        Memory(whole, state, accumulated + buckets, kept, step.head_gradients() + step.logits()),
        Memory(whole, state, accumulated + buckets, kept + step.recomputed_layer() + step.backward(), step.head_gradients() + head),
        Memory(whole, state, whole + summed + (last_gradients + buckets if accumulated else 0), one_layer, 0),
        Memory(whole, state + config.optimizer.step_bytes(params, step.value, _world_size(config)), whole, 0, 0),
    ]
    if config.hardware.device == "cpu":
        phases = [_on_cpu(step, phase, data_bytes) for phase in phases]
        copies = checkpoint_bytes(config, params) + _written_bytes(config, params)
        phases.append(replace(_on_cpu(step, Memory(whole, state, buckets, 0, 0), data_bytes), staging=copies))
    return max(phases, key=lambda phase: phase.peak)


def _on_cpu(step: Step, phase: Memory, data_bytes: int) -> Memory:
    """A phase with what a process on a CPU holds beside it: all of it is one memory there."""
    config, compiled = step.config, step.compiled
    copies = staging_bytes(config, step.params)
    return replace(
        phase,
        heap=int(HEAP_WASTE[compiled]["fp32" if step.value == FP32 else "bf16"] * (phase.activations + phase.loss)),
        staging=copies + (_written_bytes(config, step.params) if copies else 0),
        data=data_bytes,
        process=PROCESS_BYTES[compiled],
    )


def _written_bytes(config: Config, params: shape.Parameters) -> int:
    """What torch's writer of a checkpoint takes: its largest file twice, tensor by tensor and as a whole."""
    weights = FP32 * params.total
    return 2 * min(config.checkpoint.shard_bytes, max(weights, checkpoint_bytes(config, params) - weights))


def predict_memory(config: Config, d: shape.Dims, params: shape.Parameters, device_batch: int, data_bytes: int = 0) -> int:
    """The peak of `predict`, in bytes."""
    return predict(config, d, params, device_batch, data_bytes).peak


def _world_size(config: Config) -> int:
    return int(config.hardware.nproc_per_node) * config.launch.nnodes


def _accumulates(config: Config, params: shape.Parameters, device_batch: int) -> bool:
    """Whether a step has several micro-batches: then all but the first find gradients there."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    return total_batch(config, params) > device_batch * seq_len * _world_size(config)


def total_batch(config: Config, params: shape.Parameters) -> int:
    """Tokens per step."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    return shape.derive_batch_tokens(params, seq_len) if config.train.total_batch_size == -1 else config.train.total_batch_size


def data_bytes(config: Config, mixture: Mixture | None, bytes_per_token: float) -> int:
    """What a CPU rank's loader holds once all of its lanes are open (see `picotrain.data.stream.Loader`), and the rows that validate."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    unit_bytes = config.data.unit_bytes or default_unit_bytes(seq_len)
    lanes = config.data.lanes or default_lanes(max((len(found) for found in mixture.units(unit_bytes)), default=1) if mixture else 64)
    sources = len(mixture.sources) if mixture else max(1, len(config.data.mixture))
    id_bytes = 2 if config.tokenizer.vocab_size <= 2**16 else 4
    sliced = min(unit_bytes, SLICE_BYTES)
    loader = 2 * lanes // _world_size(config) * sources * sliced / bytes_per_token * id_bytes + WORKERS * sliced * (9 + id_bytes)
    validates = sum(corpus.val.text_bytes for corpus in mixture.corpora) / bytes_per_token if mixture else 0
    evaluated = min(config.train.eval_tokens, validates) * id_bytes if config.train.eval_every > 0 else 0
    return int(loader + evaluated)


def checkpoint_bytes(config: Config, params: shape.Parameters) -> int:
    """Weights and what the optimizer keeps of them, in fp32."""
    return FP32 * (params.total + config.optimizer.state_values(params))


def staging_bytes(config: Config, params: shape.Parameters) -> int:
    """The host copies of weights and moments that are kept from save to save."""
    return checkpoint_bytes(config, params) if config.checkpoint.background else 0


def halved(plan: Plan, config: Config) -> Plan | None:
    """The plan with twice as many micro-batches of half the rows, so that a step has the same rows. None where the user chose the size,
    or where it is one row."""
    if config.train.device_batch_size != "auto" or plan.device_batch_size == 1:
        return None
    rows = plan.device_batch_size // 2
    memory = predict(config, *facts(config)[:2], rows, plan.predicted_memory.get("data", 0))
    update = {"device_batch_size": rows, "grad_accum_steps": 2 * plan.grad_accum_steps}
    return plan.model_copy(update=update | {"predicted_memory_bytes": memory.peak, "predicted_memory": memory.parts()})


def lighter_settings(plan: Plan, config: Config) -> list[str]:
    """Three settings that take clearly less memory than this plan, by the prediction. Those that change least come first."""
    rows, train, model = plan.device_batch_size, config.train, config.model
    changed = [(f"train.device_batch_size={fewer}", config, fewer) for fewer in (rows // 2, rows // 4) if fewer]
    for mode in ("selective", "full") if config.hardware.recompute == "none" else ():
        hw = config.hardware.model_copy(update={"recompute": mode})
        changed.append((f"hardware.recompute={mode}", config.model_copy(update={"hardware": hw}), rows))
    if plan.precision == "fp32":
        changed.append(("train.precision=bf16", config.model_copy(update={"train": train.model_copy(update={"precision": "bf16"})}), rows))
    for length in (plan.seq_len // 2, plan.seq_len // 4):
        if length < LEAST_SEQ_LEN:
            continue
        shorter = train.model_copy(update={"seq_len": length})
        changed.append((f"train.seq_len={length} (a new run)", config.model_copy(update={"train": shorter}), rows))
    for depth in (model.depth // 2, model.depth // 4):
        smaller = config.model_copy(update={"model": model.model_copy(update={"depth": max(1, depth)})})
        changed.append((f"model.depth={max(1, depth)} (a new run)", smaller, rows))
    changed = [(text, other, count) for text, other, count in changed if _divides(other, count)]
    data = plan.predicted_memory.get("data", 0)
    fixed = data + plan.predicted_memory.get("process", 0)  # which no setting changes
    predicted = [(text, predict_memory(other, *facts(other)[:2], count, data)) for text, other, count in changed]
    clearly_less = fixed + 0.9 * (plan.predicted_memory_bytes - fixed)
    return [f"{text}: about {size(n)}" for text, n in predicted if n < clearly_less][:3]


def _divides(config: Config, rows: int) -> bool:
    """Whether a step's batch is whole micro-batches of so many rows."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    return total_batch(config, facts(config)[1]) % (rows * seq_len * _world_size(config)) == 0


def device_batch(config: Config, d: shape.Dims, params: shape.Parameters, rows: int, dp_size: int, data: int = 0) -> int:
    """The largest power of two that divides a rank's rows, fits the memory and, on a CPU, still pays."""
    if config.train.device_batch_size != "auto":
        return config.train.device_batch_size
    hw = config.hardware
    on_gpu = hw.device == "cuda"
    share = 1 if on_gpu else int(hw.nproc_per_node)  # processes on a CPU share its memory
    room = (hw.memory_bytes or 80 * 2**30) * MEMORY_SHARE / share
    best, chosen = 1, 1
    while rows % (chosen * dp_size) == 0:
        fits = predict_memory(config, d, params, chosen, data) <= room
        pays = on_gpu or chosen * (config.train.seq_len or 1) <= CPU_MICRO_BATCH_TOKENS
        if fits and pays:
            best = chosen
        chosen *= 2
    return best


def facts(config: Config) -> tuple[shape.Dims, shape.Parameters, tuple[int, ...], int]:
    """What the model's shape says: dimensions, parameters, each layer's attention window, FLOPs per token."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    model, vocab_size = config.model, config.tokenizer.vocab_size
    return model.dims(), model.parameters(vocab_size), model.windows(seq_len), model.flops_per_token(vocab_size, seq_len)
