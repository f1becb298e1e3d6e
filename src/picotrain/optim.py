"""Parameter groups and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from picotrain.config.schema import AdamWConfig
from picotrain.shape import Rates


def param_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The embedding, the head and all matrices in between, each with its peak rate; only matrices decay.

    Every parameter is in exactly one group: matrices are what is neither embedding nor head.
    """
    named = dict(model.named_parameters())
    tables = {"embed": named.pop("embed.weight"), "head": named.pop("head.weight")}
    return [
        {"name": "embed", "params": [tables["embed"]], "peak_lr": rates.embed_lr, "weight_decay": 0.0},
        {"name": "head", "params": [tables["head"]], "peak_lr": rates.head_lr, "weight_decay": 0.0},
        {"name": "matrices", "params": list(named.values()), "peak_lr": rates.matrix_lr, "weight_decay": rates.weight_decay},
    ]


def build(section: AdamWConfig, model: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    """Fused AdamW (arXiv:1711.05101): one kernel per group reads and writes every state once."""
    groups = [group | {"lr": group["peak_lr"]} for group in param_groups(model, rates)]
    return torch.optim.AdamW(groups, betas=(section.beta1, section.beta2), eps=section.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its peak times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
