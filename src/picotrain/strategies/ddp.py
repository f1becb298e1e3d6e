"""parallel.kind=ddp: every process holds the whole model and a share of each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from picotrain.contracts import Strategy

if TYPE_CHECKING:
    from picotrain.parallel import Parallel


class DDPConfig(Strategy):
    kind: Literal["ddp"] = "ddp"

    def build(self, device: str, meeting: Any) -> Parallel:
        from picotrain import parallel

        return parallel.build(device, meeting)
