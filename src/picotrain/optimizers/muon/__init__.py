"""optimizer.kind=muon: Muon for the blocks' matrices (`picotrain.optimizers.muon.update`), AdamW for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from picotrain.contracts import Optimizer
from picotrain.errors import ConfigError, Problem
from picotrain.section import Decay, Number, PositiveFloat
from picotrain.shape import Parameters

if TYPE_CHECKING:
    import torch

    from picotrain.parallel import Parallel

STACK_BYTES = 2**28  # of matrices that are worked on at once: enough to fill a GPU, little beside its memory
FP32 = 4


class MuonConfig(Optimizer):
    """Muon for the matrices, fused AdamW for the other groups."""

    kind: Literal["muon"] = "muon"
    beta1: Decay = 0.9  # of AdamW
    beta2: Decay = 0.95
    eps: PositiveFloat = 1e-10
    momentum: Decay  # decay of the gradient's moving average, per step
    ns_steps: Annotated[int, Field(ge=1, le=10), Number]  # of the Newton-Schulz iteration

    orthogonal: ClassVar[bool] = True

    def build(self, groups: list[dict[str, Any]], parallel: Parallel, dtype: torch.dtype) -> torch.optim.Optimizer:
        from picotrain.optimizers.muon.update import Muon

        *tables, matrices = groups
        adamw = {"betas": (self.beta1, self.beta2), "eps": self.eps, "fused": self.skips(parallel.device)}
        try:
            if matrices["name"] != "matrices":
                raise ValueError("the model has none beside its tables")
            return Muon(tables, matrices, adamw=adamw, momentum=self.momentum, steps=self.ns_steps, dtype=dtype, parallel=parallel)
        except ValueError as error:
            raise ConfigError([Problem("optimizer.kind", f"muon works on matrices, and {error}", "optimizer=adamw")]) from error

    def skips(self, device: torch.device) -> bool:
        return device.type != "mps"  # see AdamWConfig

    def state_values(self, parameters: Parameters) -> int:
        """Two moments, but one of a matrix."""
        return 2 * parameters.total - parameters.matrices

    def step_bytes(self, parameters: Parameters, value_bytes: int, ranks: int) -> int:
        """The sources of the look-ahead, the results of this rank and of all ranks, and four times the stack that is being worked on."""
        matrices = parameters.matrices
        gathered = value_bytes * matrices // ranks + (value_bytes * matrices if ranks > 1 else 0)
        stack = min(STACK_BYTES, FP32 * matrices // ranks // 3)  # of a third of the matrices at most: those of the MLP one way
        return FP32 * matrices + gathered + max(4 * stack, FP32 * matrices if value_bytes != FP32 else 0)

    def works_on(self, parameters: Parameters) -> int:
        return parameters.matrices

    def step_flops(self, parameters: Parameters, width: int) -> float:
        return parameters.matrices * 8 * self.ns_steps * width
