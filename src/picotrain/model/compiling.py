"""What torch.compile is told, so that a start takes seconds less (docs/log.md, 2026-11-25: start-up). The code it makes stays the same."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any


def set_up_compiler() -> None:
    """Switch on what torch (2.11 to 2.13) leaves off, unless the environment decides it, or this torch does not know it."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    # Under DDP torch cuts a graph where a bucket of gradients ends: the graph of a whole model can then send while its backward runs.
    # Our blocks are compiled one by one, so they do that anyway. They would only be cut into pieces (5 graphs for 2, on two ranks).
    dynamo.optimize_ddp = False
    # Keep graphs with an autograd.Function in them, too. Without this every start traces the block anew, which takes 1.2 s. Their key
    # holds forward and backward as they were traced.
    _set(functorch, "autograd_cache_allow_custom_autograd_functions", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD")
    # Torch tests each instruction set of the CPU by building and loading a library: 5 s with an empty cache, 0.8 s with a full one. Only
    # a torch built by gcc 7 or older needs that, and the wheels are newer. Without the test torch chooses the same set.
    if sys.platform == "linux" and platform.machine() == "x86_64":
        _set(inductor.cpp, "vec_isa_ok", "TORCHINDUCTOR_VEC_ISA_OK")


def _set(section: Any, key: str, variable: str) -> None:
    if hasattr(section, key) and variable not in os.environ:
        setattr(section, key, True)
