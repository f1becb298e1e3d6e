"""optimizer.kind=adamw: fused AdamW for every parameter (arXiv:1711.05101)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from picotrain.contracts import Optimizer
from picotrain.section import Decay, PositiveFloat

if TYPE_CHECKING:
    import torch

    from picotrain.parallel import Parallel


class AdamWConfig(Optimizer):
    """Fused AdamW: one kernel per group reads and writes every state once."""

    kind: Literal["adamw"] = "adamw"
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: PositiveFloat = 1e-10

    def build(self, groups: list[dict[str, Any]], parallel: Parallel, dtype: torch.dtype) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=self.skips(parallel.device))

    def skips(self, device: torch.device) -> bool:
        return device.type != "mps"  # the fused kernel of MPS does not know `found_inf`, so the other one runs there
