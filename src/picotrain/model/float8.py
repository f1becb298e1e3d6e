"""fp8 for the blocks' matmuls, through torchao: one scale for each tensor, found anew at each call (its recipe "tensorwise").

Inputs and weights go to e4m3, gradients to e5m2 (arXiv:2209.05433), each scaled by its largest magnitude. Results are
bf16. Weights stay fp32 and are cast straight from there. Embedding, head and attention compute in bf16.

Forwards without gradients compute in bf16, too. The scale depends on all tokens of a micro-batch. But the result of an evaluation must
depend neither on how its rows are cut into batches nor on whether the machine knows fp8.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotrain.errors import ConfigError, Problem
from picotrain.hardware import FP8_MULTIPLE


def train_in_float8(blocks: nn.Module, emulate: bool = False) -> None:
    """Let the linear layers in `blocks` train in fp8, in place: neither names nor weights change. Before the blocks are compiled.

    A layer with a dimension that is no multiple of 16 (a gate) stays as it is. emulate: round to fp8 and multiply in fp32, on any
    device. Raises ConfigError where torchao cannot be imported.
    """
    torchao = _torchao()
    config = dataclasses.replace(torchao.Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)
    before = set(blocks.modules())
    torchao.convert_to_float8_training(blocks, module_filter_fn=_fits, config=config)
    for layer in set(blocks.modules()) - before:
        layer.__class__ = _in_training(type(layer))


def _fits(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and not any(n % FP8_MULTIPLE for n in layer.weight.shape)


def _torchao() -> Any:
    """torchao.float8, without what its import prints of kernels that are not used here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8
    except ImportError as error:
        hint = "pip install 'picotrain[fp8]', or train.precision=bf16"
        raise ConfigError([Problem("train.precision", f"fp8 needs the package torchao: {error}", hint)]) from error
    finally:
        logging.disable(disabled)
    return torchao.float8


@cache  # one class for all layers, so that they share one compiled code
def _in_training(kind: Any) -> type[nn.Linear]:
    class InTraining(kind):
        """torchao's layer while gradients are recorded, else what `picotrain.model.layers.Linear` does."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.is_grad_enabled() else F.linear(x, self.weight.to(x.dtype))

    return InTraining
