"""TrainState: exactly what a checkpoint saves. Named tensors on one side, JSON scalars on the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from picotrain.errors import CheckpointError


@dataclass
class LoopState:
    """What the loop carries from step to step besides weights: small numbers, saved as JSON."""

    min_val_bpb: float | None = None
    val_bpb: float | None = None  # last measured
    val_bpb_step: int | None = None
    total_training_time_s: float = 0.0
    smoother: dict[str, Any] = field(default_factory=dict)  # of the de-biased training loss


@dataclass
class TrainState:
    """A training run between two steps. `step` updates are done; `loader` describes the last row trained on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    loader: dict[str, Any] | None = None
    loop: LoopState = field(default_factory=LoopState)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name."""
    return dict(model.state_dict())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors, flat: `<state>.<parameter>`, e.g. `exp_avg.embed.weight`. Rates follow from the plan."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy weights in place. Raises CheckpointError when names or shapes are not the model's."""
    own = model.state_dict()
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(f"the checkpoint's tensors are not this model's: {', '.join(missing[:4])} on one side only")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model")
        tensor.copy_(tensors[name])


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises CheckpointError on a parameter the model does not have."""
    parameters = dict(model.named_parameters())
    for flat, tensor in tensors.items():
        key, _, name = flat.partition(".")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint's optimizer state {flat!r} belongs to no parameter of this model")
        parameter = parameters[name]
        # The step counter of fused AdamW is an fp32 scalar; it lives where the parameter does.
        optimizer.state[parameter][key] = tensor.to(parameter.device)
