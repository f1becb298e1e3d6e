"""What a config takes of a device's memory, and the micro-batch that fits. Predictions, from the parts of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from picotrain import shape
from picotrain.config.schema import Config
from picotrain.text import size

if TYPE_CHECKING:
    from picotrain.plan import Plan

MEMORY_SHARE = 0.85  # of a device's memory that a prediction may fill
CPU_MICRO_BATCH_TOKENS = 8192  # beyond this a larger micro-batch no longer raises a CPU's speed, it only takes memory


def predict_memory(config: Config, d: shape.Dims, params: shape.Parameters, device_batch: int) -> int:
    """Peak bytes per rank, an estimate: what a checkpoint holds and gradients, all in fp32 (16 bytes a parameter with AdamW), the
    activations the backward needs (about 26 widths a layer and token in the compute precision) and the fp32
    logits with their gradient (three copies at the peak). What Muon's step takes for itself comes when activations are gone."""
    staging = staging_bytes(config, params) if config.hardware.device == "cpu" else 0
    tokens = device_batch * (config.train.seq_len or 0)
    bytes_per_value = 2 if config.train.precision == "bf16" else 4
    activations = tokens * d.depth * d.width * 26 * bytes_per_value
    logits = tokens * shape.pad_vocab(config.tokenizer.vocab_size) * 4 * 3
    return checkpoint_bytes(config, params) + 4 * params.total + staging + activations + logits


def checkpoint_bytes(config: Config, params: shape.Parameters) -> int:
    """Weights and what the optimizer keeps of them, in fp32: two moments, but one of a matrix under Muon."""
    return 12 * params.total - (4 * params.matrices if config.optimizer.kind == "muon" else 0)


def staging_bytes(config: Config, params: shape.Parameters) -> int:
    """The host copies of weights and moments that are kept from save to save."""
    return checkpoint_bytes(config, params) if config.checkpoint.background else 0


def halved(plan: Plan, config: Config) -> Plan | None:
    """The plan with micro-batches of half the rows and twice as many of them, so that all batches of a step stay the same; None
    where the size was chosen by the user, or is one row."""
    if config.train.device_batch_size != "auto" or plan.device_batch_size == 1:
        return None
    rows = plan.device_batch_size // 2
    d, params, _, _ = facts(config)
    memory = predict_memory(config, d, params, rows)
    return plan.model_copy(
        update={"device_batch_size": rows, "grad_accum_steps": 2 * plan.grad_accum_steps, "predicted_memory_bytes": memory}
    )


def lighter_settings(plan: Plan, config: Config) -> list[str]:
    """Three settings that the prediction says take clearly less memory than this plan, those that change least first."""
    rows, train, model = plan.device_batch_size, config.train, config.model
    changed = [(f"train.device_batch_size={fewer}", config, fewer) for fewer in (rows // 2, rows // 4) if fewer]
    if plan.precision == "fp32":
        changed.append(("train.precision=bf16", config.model_copy(update={"train": train.model_copy(update={"precision": "bf16"})}), rows))
    for length in (plan.seq_len // 2, plan.seq_len // 4):
        shorter = train.model_copy(update={"seq_len": length})
        changed.append((f"train.seq_len={length} (a new run)", config.model_copy(update={"train": shorter}), rows))
    for depth in (model.depth // 2, model.depth // 4):
        smaller = config.model_copy(update={"model": model.model_copy(update={"depth": max(1, depth)})})
        changed.append((f"model.depth={max(1, depth)} (a new run)", smaller, rows))
    predicted = [(text, predict_memory(other, *facts(other)[:2], count)) for text, other, count in changed]
    return [f"{text}: about {size(n)}" for text, n in predicted if n < 0.9 * plan.predicted_memory_bytes][:3]


def device_batch(config: Config, d: shape.Dims, params: shape.Parameters, rows: int, dp_size: int) -> int:
    """The largest power of two that divides a rank's rows, fits the memory and, on a CPU, still pays."""
    if config.train.device_batch_size != "auto":
        return config.train.device_batch_size
    hw = config.hardware
    on_gpu = hw.device == "cuda"
    share = 1 if on_gpu else int(hw.nproc_per_node)  # processes on a CPU share its memory
    room = (hw.memory_bytes or 80 * 2**30) * MEMORY_SHARE / share
    best, chosen = 1, 1
    while rows % (chosen * dp_size) == 0:
        fits = predict_memory(config, d, params, chosen) <= room
        pays = on_gpu or chosen * (config.train.seq_len or 1) <= CPU_MICRO_BATCH_TOKENS
        if fits and pays:
            best = chosen
        chosen *= 2
    return best


def facts(config: Config) -> tuple[shape.Dims, shape.Parameters, tuple[int, ...], int]:
    """What the model's shape says: dimensions, parameters, each layer's attention window, FLOPs per token."""
    seq_len = config.train.seq_len or shape.default_seq_len(config.model.depth)
    d = shape.dims(config.model)
    params = shape.parameters(d, config.tokenizer.vocab_size, config.model)
    windows = shape.windows(config.model, seq_len)
    return d, params, windows, shape.flops_per_token(d, params, windows, seq_len)
