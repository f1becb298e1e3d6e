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

    # Under DDP a graph is cut where a bucket of gradients ends, so that one of a whole model can send while its backward runs. Blocks
    # are compiled one by one, which gives that anyway: each would only be cut into pieces (5 graphs for 2, on two ranks).
    dynamo.optimize_ddp = False
    # Graphs with an autograd.Function in them are kept, too: without it every start traces the block anew, for 1.2 s. Their key holds
    # forward and backward as they were traced.
    _set(functorch, "autograd_cache_allow_custom_autograd_functions", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD")
    # Torch builds and loads a library for each instruction set that the CPU says it has: 5 s with an empty cache, 0.8 s with a full
    # one. That is for a torch built by gcc 7 or older, which the wheels are not; the set that is chosen is the same without.
    if sys.platform == "linux" and platform.machine() == "x86_64":
        _set(inductor.cpp, "vec_isa_ok", "TORCHINDUCTOR_VEC_ISA_OK")


def _set(section: Any, key: str, variable: str) -> None:
    if hasattr(section, key) and variable not in os.environ:
        setattr(section, key, True)
