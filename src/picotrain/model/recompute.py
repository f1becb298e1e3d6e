"""Activation checkpointing: a block drops activations in the forward and computes them again in the backward.

none        everything is kept
selective   the results of matmuls with weights and of attention kernels are kept. Norms, rotations and all else that is cheap is
            computed again (arXiv:2205.05198). So is attention made of plain matmuls, whose T x T probabilities are then not kept
full        only what enters a block is kept, and the block runs again (arXiv:1604.06174)

The operations are the same, on the same numbers, so losses and gradients stay the same. The checkpoint is inside of what
`Decoder.compile_blocks` compiles, and tells the compiler what to keep. Around a compiled block, `selective` would have one opaque
kernel to choose from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from picotrain.config.schema import Recompute

_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default}


def recompute(blocks: Iterable[nn.Module], mode: Recompute) -> None:
    """Let blocks keep less for the backward, in place, so that no name changes. Call it before they are compiled."""
    if mode == "none":
        return
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_concerns_us)
    for block in blocks:
        block.__class__ = _recomputed(type(block), mode)


def _concerns_us(record: logging.LogRecord) -> bool:
    """False for the compiler's advice against changing kept results in place. It always gives it. A block does not do that, and eager
    torch checks it."""
    return "context_fn" not in str(record.msg)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept. Attention kernels have many names, some of them other packages'."""
    kept = operation in _MATMULS or "attention" in (name := str(operation)) or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache  # one class for all layers, so that they share one compiled code
def _recomputed(kind: Any, mode: Recompute) -> type[nn.Module]:
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    class Recomputed(kind):
        """A block that keeps what enters it, and what the mode says. A class and no wrapper, so that names stay."""

        def forward(self, *args: Any) -> Tensor:
            if not torch.is_grad_enabled():  # an evaluation keeps nothing anyway
                return super().forward(*args)
            # Nothing in a block draws random numbers, so their state is not saved and put back.
            return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return Recomputed
