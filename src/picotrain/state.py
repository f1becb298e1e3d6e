"""TrainState: exactly what a checkpoint saves. Named tensors on one side, JSON scalars on the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, ConfigDict, Field, Strict
from torch import nn

from picotrain.errors import CheckpointError

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


@dataclass
class LoopState:
    """What the loop carries from step to step besides weights: small numbers, saved as JSON and checked when they are read."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    min_val_bpb: Number | None = None
    val_bpb: Number | None = None  # last measured
    val_bpb_step: Annotated[int, Strict()] | None = None
    smooth_train_loss: Number | None = None  # the value last shown; `smoother` is what goes on from it
    total_training_time: Annotated[Number, Field(validation_alias=AliasChoices("total_training_time", "total_training_time_s"))] = 0.0
    smoother: dict[str, Number] = field(default_factory=dict)  # of the de-biased training loss
    skipped: Annotated[int, Strict(), Field(ge=0)] = 0  # updates that were left out so far
    recent_losses: list[Number] = field(default_factory=list)  # of the guard against spikes


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
        if tensor.dtype != tensors[name].dtype:
            raise CheckpointError(f"{name} holds {tensors[name].dtype} in the checkpoint, {tensor.dtype} in the model")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises CheckpointError on a parameter the model does not have, a tensor that fits
    none, and a parameter that has less than the others of its group."""
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    unfused = [group for group in optimizer.param_groups if group.get("fused") is False]
    counted_here = {id(parameter) for group in unfused for parameter in group["params"]}
    for flat, tensor in tensors.items():
        key, _, name = flat.partition(".")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint's optimizer state {flat!r} belongs to no parameter of this model")
        # Kernels that update many tensors at once trust these shapes. Counters are scalars.
        if not tensor.is_floating_point() or tensor.shape != (torch.Size() if key == "step" else parameters[name].shape):
            raise CheckpointError(
                f"the checkpoint's optimizer state {flat!r} does not fit its parameter: {tensor.dtype} {tuple(tensor.shape)}"
            )
        # AdamW's step counter is an fp32 scalar. That of the fused one lives where the parameter does, else it is read by the host.
        found[name][key] = tensor if key == "step" and id(parameters[name]) in counted_here else tensor.to(parameters[name].device)
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        of_group = [names[parameter] for parameter in group["params"]]
        wanted = _state_keys(optimizer, group) or set().union(*(found[name] for name in of_group))
        for name in of_group:
            if found[name] and found[name].keys() != wanted:
                odd = ", ".join(sorted(found[name].keys() ^ wanted))
                raise CheckpointError(f"the checkpoint's optimizer state of {name} is not this optimizer's: {odd} on one side only")
    for name, parameter in parameters.items():
        if found[name]:
            optimizer.state[parameter] |= found[name]


def _state_keys(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> set[str]:
    """What an optimizer keeps of each parameter of a group, where that is known before its first step: a group may say it."""
    adamw = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set()
    return set(group.get("keeps", adamw))
