"""What speaks against train.precision=fp8: the device, the model's dimensions, the micro-batch."""

from __future__ import annotations

import math

from picotrain import hardware, shape
from picotrain.config.schema import Config
from picotrain.errors import Problem


def problems(config: Config, d: shape.Dims, micro_tokens: int) -> list[Problem]:
    """All that is wrong with fp8 for a decided config. micro_tokens: of one micro-batch of one rank."""
    if config.train.precision != "fp8":
        return []
    name, device = config.hardware.name or "", config.hardware.device
    found = device_problems(device, name, hardware.compute_capability(name) if device == "cuda" else None)
    wanted = hardware.FP8_MULTIPLE
    rule = f"fp8 matmuls want multiples of {wanted}"
    if d.width % wanted:
        unit = math.lcm(wanted, d.head_dim)
        choices = sorted({max(unit, d.width // unit * unit), -(-d.width // unit) * unit})
        found.append(Problem("model.width", f"{rule}, and the width is {d.width}", f"nearest: {' or '.join(map(str, choices))}"))
    elif d.mlp_width % wanted:
        choices = sorted({max(wanted, d.mlp_width // wanted * wanted), -(-d.mlp_width // wanted) * wanted})
        text = f"{rule}, and the MLP is {d.mlp_width} wide"
        found.append(Problem("model.mlp_width", text, f"nearest: {' or '.join(map(str, choices))}"))
    if (kv_width := d.n_kv_heads * d.head_dim) % wanted and d.n_kv_heads < d.n_heads:
        text = f"{rule}, and keys and values are {d.n_kv_heads} x {d.head_dim} = {kv_width} wide"
        found.append(Problem("model.n_kv_heads", text, f"another number of heads, or a model.head_dim that {wanted} divides"))
    if micro_tokens % wanted:
        text = f"{rule}, and a micro-batch has {micro_tokens} tokens"
        found.append(Problem("train.seq_len", text, f"a train.seq_len that {wanted} divides"))
    return found


def device_problems(device: str, name: str, capability: float | None) -> list[Problem]:
    """The problem of a device that knows no fp8 matmuls. capability: CUDA's; None: no CUDA device, or not known."""
    least = hardware.FP8_CAPABILITY
    if device == "cuda" and (capability is None or capability >= least):
        return []
    has = f"{name} has {capability}" if device == "cuda" else f"this is {name or device} ({device})"
    text = f"fp8 needs an NVIDIA GPU of compute capability {least} or higher (Ada, Hopper, Blackwell), and {has}"
    return [Problem("train.precision", text, "train.precision=bf16, or auto")]


def notes(config: Config) -> list[str]:
    """What a plan says of fp8 beside its problems."""
    if config.train.precision != "fp8":
        return []
    found = ["fp8 is for the blocks' matmuls while training; evaluations and samples are computed in bf16, and MFU counts the bf16 peak"]
    if not config.hardware.compile:
        found.append("warning: fp8 wants hardware.compile=true: without it each cast is a pass over memory of its own")
    if hardware.compute_capability(config.hardware.name or "") is None:
        found.append(f"whether {config.hardware.name} has fp8 matmuls (compute capability {hardware.FP8_CAPABILITY}) is not known here")
    return found
