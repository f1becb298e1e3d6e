"""Bytes that are alive in tensors while torch computes, counted operator by operator: on any device, and on `meta`, where nothing is
computed and a step of a model of any size takes seconds.

A count, no measurement: what a kernel takes for itself, the allocator's rounding and fragmentation, and the device's context are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotrain.config import Config
from picotrain.model import Decoder, blocked, build
from picotrain.model.kernels import TorchKernel
from picotrain.planning import Plan


class LiveBytes(TorchDispatchMode):
    """While it is entered: `now` and `peak`, bytes of all storages that operators have returned and somebody still holds, each once.

    Tensors that were there before are added by `hold`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}  # by id: the storage's weak reference

    def hold(self, *tensors: Tensor) -> None:
        """Count storages of these from now on, until nobody holds them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._known:
                continue
            self._known[id(storage)] = weakref.ref(storage, partial(self._gone, id(storage), storage.nbytes()))
            self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        self._known.pop(key, None)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in blocked.INSIDE:  # what our own operators make on the way counts, too
            with self:
                found = blocked.INSIDE[func](*args, **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        self.hold(*(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)))
        return found


def gpu_step_bytes(config: Config, plan: Plan) -> int:
    """The most that is alive in two steps of AdamW on a GPU, eager, one rank: micro-batches, then an update, which works in place.

    Where a CPU build of torch does otherwise than CUDA, this stands in: flash-attention, and a norm that keeps its input and 1 / rms.
    """
    model = build(config.model, plan.vocab_size, plan.seq_len, plan.precision, plan.recompute).to("meta")
    assert isinstance(model, Decoder)
    model.use_kernels(FLASH, FLASH)
    ids = torch.empty((plan.device_batch_size, plan.seq_len), dtype=torch.int64, device="meta")
    with _cuda_norms(), LiveBytes() as live:
        live.hold(*model.parameters(), *model.buffers(), ids)
        moments: list[Tensor] = []
        for _ in range(2):
            for _ in range(plan.grad_accum_steps):
                model(ids, ids).backward()
            moments = moments or [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
            model.zero_grad(set_to_none=True)
    return live.peak


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=scale)[0]


FLASH = TorchKernel("flash", lambda tokens, window, device: _flash_attention)


@contextmanager
def _cuda_norms() -> Generator[None]:
    def rms_norm(x: Tensor, shape: tuple[int, ...], weight: None = None, eps: float = 1e-6) -> Tensor:
        return _Norm.apply(x, eps)

    with mock.patch("torch.nn.functional.rms_norm", rms_norm):
        yield


class _Norm(torch.autograd.Function):
    """In memory what CUDA's kernel is: it keeps its input and 1 / rms in fp32, and makes its result alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None
