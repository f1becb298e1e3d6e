"""The first calls of MKL's vector functions, made by one thread.

MKL chooses the kernel of each vector function at its first call. In MKL 2024.2, which torch's wheels hold, two threads that make
that call together may race, and one of them computes its share with a kernel that is wrong by up to 1.5e-4 (pytorch issue 188792,
pull request 188791). Nothing says so, the next call is right, and every number after it differs from a sound run's. A first call
on one element is no race. So whatever computes here (model, optimizer, ranks, worker) calls `settle` before anything runs in
parallel, and a module that is imported does so at its import.
"""

from __future__ import annotations

from functools import cache

import torch

# What torch computes by MKL's vector functions: IMPLEMENT_VML_MKL in aten/src/ATen/cpu/vml.h; a test compares. Each has two kernels.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64)


@cache
def settle() -> None:
    """Call each of MKL's vector functions and random streams once, on one element; no global random state is touched. Takes 1 ms."""
    generator = torch.Generator()
    for dtype in DTYPES:
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(one)
        one.exponential_(generator=generator)  # multinomial's
        one.bernoulli_(0.5, generator=generator)
