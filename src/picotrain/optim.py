"""Parameter groups, and the guard that decides whether a step is skipped. The optimizers themselves: `picotrain.optimizers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from picotrain import first_calls
from picotrain.contracts import Optimizer
from picotrain.model.decoder import LanguageModel
from picotrain.parallel import Parallel
from picotrain.shape import Rates

__all__ = ["Guard", "build", "param_groups", "set_lr"]

first_calls.settle()


def param_groups(model: LanguageModel, rates: Rates) -> list[dict[str, Any]]:
    """Groups of parameters, each with its peak learning rate: embeddings, head, scalars if there are any, and last the matrices.

    Only matrices decay. Every parameter is in the one group that `LanguageModel.group_of` names.
    """
    rate_of = {"embed": rates.embed_lr, "head": rates.head_lr, "scalars": rates.scalar_lr, "matrices": rates.matrix_lr}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rate_of}
    for name, parameter in model.named_parameters():
        members[model.group_of(name, parameter)].append(parameter)
    return [
        {"name": name, "params": members[name], "lr": rate, "peak_lr": rate, "weight_decay": rates.weight_decay * (name == "matrices")}
        for name, rate in rate_of.items()
        if members[name]
    ]


def build(section: Optimizer, model: LanguageModel, rates: Rates, parallel: Parallel | None = None) -> torch.optim.Optimizer:
    """The optimizer of a config's section, with the groups of `param_groups`. parallel: the ranks that share its work; None: no others."""
    return section.build(param_groups(model, rates), parallel or Parallel.single(str(model.device)), model.compute_dtype)


class Guard:
    """Decides on the device whether an update is skipped: when loss or gradient norm is not finite. With `max_z` it is skipped, too, when
    the loss is more than `max_z` standard deviations above the mean of the last WINDOW good losses.

    Every rank decides the same, since loss and norm are the same. on_device: whether the optimizer looks at `found_inf` and then leaves
    weights, moments and step counters as they are (its section's `skips` says so). Any other optimizer finds no gradients, so its step
    does nothing. For that the host has to wait for the decision.
    """

    WINDOW = 100

    def __init__(self, max_z: float | None, device: torch.device, on_device: bool):
        self._max_z, self._on_device = max_z, on_device
        self._recent = torch.full((self.WINDOW,), torch.nan, device=device)  # NaN: not there yet

    def skip(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 or 0.0 (0-d): whether the optimizer's next step is skipped. loss: the step's mean over all ranks."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._max_z is not None:
            spread = self._recent.std().clamp_min(1e-6)
            bad = bad | (loss > self._recent.mean() + self._max_z * spread)  # false until the window is full: NaN compares so
            self._recent = torch.where(bad, self._recent, torch.cat([self._recent[1:], loss.reshape(1)]))
        found_inf = bad.to(torch.float32)
        if self._on_device:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # where torch's gradient scaler puts it
        elif bad:
            optimizer.zero_grad(set_to_none=True)
        return found_inf

    def state_dict(self) -> list[float]:
        """The window, for the checkpoint."""
        return self._recent[torch.isfinite(self._recent)].tolist()

    def load_state_dict(self, recent: list[float]) -> None:
        if recent:
            self._recent[-len(recent) :] = torch.tensor(recent[-self.WINDOW :], device=self._recent.device)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
