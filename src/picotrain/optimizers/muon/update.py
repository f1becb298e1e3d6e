"""Muon: the step of a matrix is its momentum, made orthogonal (https://kellerjordan.github.io/posts/muon/).

`torch.optim.Muon` has the same update, and a test holds this one equal to it. We do not use it for four reasons. It always works in
bf16, hundreds of times slower than fp32 on a CPU without such instructions. It cannot skip an update on the device. It knows
nothing of other ranks. It takes matrices one by one, not those of a shape together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from picotrain.optimizers.muon import STACK_BYTES
from picotrain.parallel import Parallel

Coefficients = tuple[float, float, float]

# Polar Express (arXiv:2505.16932): for each step the odd polynomial a x + b x^3 + c x^5 that, after those before it, brings all
# singular values in [1e-3, 1] nearest to 1. For five steps, with the paper's margin of 2 % for rounding in all but the last,
# as nanochat takes them: the result lies in [0.86, 1.14], where Muon's first coefficients give [0.47, 1.20].
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
TINY_NORM = 1e-7  # a matrix of a smaller norm is as good as 0, and stays that small


def newton_schulz(x: Tensor, coefficients: Sequence[Coefficients] = POLAR_EXPRESS, dtype: torch.dtype | None = None) -> Tensor:
    """x (N, R, C) = U S V^T -> about U V^T for each, in `dtype` (None: that of x), in which the matmuls are done.

    Every step applies a X + b (X X^T) X + c (X X^T)^2 X, on the side where X X^T is small.
    """
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)  # Frobenius: no singular value is larger
    x = (x / norm.clamp_min(TINY_NORM)).to(dtype or x.dtype)  # (N, r, c), r <= c
    for a, b, c in coefficients:
        gram = x @ x.mT  # (N, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@cache
def shares(shapes: tuple[tuple[int, int], ...], world_size: int) -> tuple[int, ...]:
    """The rank that works on each matrix: the costliest first, each to the rank that has least to do (the lowest, if several)."""
    load = [0] * world_size
    ranks = [0] * len(shapes)
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]  # of a step of `newton_schulz`
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        ranks[index] = load.index(min(load))
        load[ranks[index]] += costs[index]
    return tuple(ranks)


class Muon(torch.optim.Optimizer):
    """Muon for one group of matrices, fused AdamW for the groups of `tables`, behind the interface of one optimizer.

    For a matrix W (R, C) with gradient G, learning rate lr and decay d, all in fp32 but the orthogonalisation:

        M <- lerp(M, G, 1 - momentum)                                   kept as `momentum`
        O <- newton_schulz(lerp(G, M, momentum))                        Nesterov
        W <- (1 - lr d) W - lr sqrt(max(1, R / C)) O

    The factor makes the spectral norm of a step lr sqrt(fan-out / fan-in) where the output is the wider side, as the original
    does. There is no warm-up of the momentum. Gradients are the same on every rank, and so is the momentum. Every rank keeps all of
    it. The orthogonalisation takes the time, so `shares` divides it among the ranks, which then gather the results.

    `found_inf` (0-d), where it is 1.0, leaves weights, momentum, moments and counters as they are, without a host sync.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        tables: list[dict[str, Any]],
        matrices: dict[str, Any],
        *,
        adamw: dict[str, Any],  # options of torch's AdamW
        momentum: float = 0.95,
        steps: int = len(POLAR_EXPRESS),
        coefficients: Sequence[Coefficients] = POLAR_EXPRESS,  # the last is repeated where there are more steps
        dtype: torch.dtype = torch.float32,  # of the orthogonalisation
        parallel: Parallel | None = None,
    ):
        if odd := [tuple(parameter.shape) for parameter in matrices["params"] if parameter.ndim != 2]:
            raise ValueError(f"one of the model's parameters beside its tables has the shape {odd[0]}")
        super().__init__([*tables, matrices | {"keeps": ("momentum",)}], {})
        self._momentum, self._dtype, self._parallel = momentum, dtype, parallel or Parallel.single()
        self._coefficients = [*coefficients, *[coefficients[-1]] * steps][:steps]
        for group in self.param_groups[:-1]:
            group["keeps"] = ("step", "exp_avg", "exp_avg_sq")
        self._adamw = torch.optim.AdamW(self.param_groups[:-1], **adamw)  # shares the groups, which hold the rates,
        self._adamw.state = self.state  # and the state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        if self.found_inf is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        group = self.param_groups[-1]
        if matrices := [parameter for parameter in group["params"] if parameter.grad is not None]:
            self._update(matrices, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        grads: list[Tensor] = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self._momentum_of(matrix) for matrix in matrices]
        keep = torch.ones((), device=grads[0].device)  # 0 where this update is skipped
        if self.found_inf is not None:
            keep = keep - self.found_inf
            # Then the gradient may not be finite. The momentum takes its place, and its average with itself is what it was.
            grads = [torch.where(keep > 0, grad, momentum) for grad, momentum in zip(grads, momenta, strict=True)]
        # The lists at once, as torch's own optimizers do, which have no other name for it.
        torch._foreach_lerp_(momenta, grads, 1 - self._momentum)  # type: ignore
        updates = self._directions(grads, momenta)
        torch._foreach_mul_(updates, [math.sqrt(max(1.0, update.size(0) / update.size(1))) for update in updates])  # type: ignore
        torch._foreach_mul_(updates, keep * lr)  # type: ignore
        torch._foreach_mul_(matrices, 1 - keep * (lr * weight_decay))  # type: ignore
        torch._foreach_sub_(matrices, updates)  # type: ignore

    def _momentum_of(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        return state["momentum"]

    def _directions(self, grads: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
        """The orthogonalised look-ahead of every matrix, fp32. Each rank fills its part of one flat buffer, and gathers all."""
        shapes = tuple((grad.size(0), grad.size(1)) for grad in grads)
        ranks = shares(shapes, self._parallel.world_size)
        filled = [0] * self._parallel.world_size
        start = []  # of each matrix, in the buffer of its rank
        for rank, (rows, columns) in zip(ranks, shapes, strict=True):
            start.append(filled[rank])
            filled[rank] += rows * columns
        own = torch.empty(max(filled), dtype=self._dtype, device=grads[0].device)
        mine = [index for index, rank in enumerate(ranks) if rank == self._parallel.rank]
        for batch in self._batches(mine, shapes):
            ahead = torch.stack([grads[i] for i in batch]).lerp_(torch.stack([momenta[i] for i in batch]), self._momentum)
            for i, direction in zip(batch, newton_schulz(ahead, self._coefficients, self._dtype), strict=True):
                own[start[i] : start[i] + direction.numel()].view(shapes[i]).copy_(direction)
        found = self._parallel.gather_tensor(own).float()  # (world_size, max(filled))
        return [found[rank, at : at + math.prod(shape)].view(shape) for rank, at, shape in zip(ranks, start, shapes, strict=True)]

    def _batches(self, indices: list[int], shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The matrices of one shape together, up to STACK_BYTES of them."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            by_shape.setdefault(shapes[index], []).append(index)
        batches = []
        for shape, equal in by_shape.items():
            count = max(1, STACK_BYTES // (4 * math.prod(shape)))
            batches += [equal[first : first + count] for first in range(0, len(equal), count)]
        return batches
