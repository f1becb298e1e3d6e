"""Kernels for causal attention over full rows, and the choice among them by a real call.

A `Kernel` makes an `Attend` for rows of T tokens and a window of W: the function that a block calls. All of them compute
softmax(scale q k^T) v over the W latest keys of each query. They differ in speed, memory and rounding. `picotrain.hardware` has
the order in which they are tried. Nothing is timed. What a probe rejects is kept with the reason.

Shapes: B rows, T tokens (S keys where there is a cache), H query heads, H_kv key-value heads, D head_dim.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend

from picotrain import hardware
from picotrain.errors import ConfigError, Problem
from picotrain.model.blocked import blocked_attention

MIN_BAND_ROWS = 64  # fewer queries a call cost more than the keys that they spare


class Attend(Protocol):
    """q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D); scale None: 1 / sqrt(D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Sdpa:
    """Torch's scaled_dot_product_attention: under a mask (true where a query sees), else causal. A single query sees every key."""

    mask: Tensor | None = None  # broadcasts to (B, H, T, S)
    backend: SDPBackend | None = None  # None: torch chooses

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        causal = self.mask is None and q.size(2) > 1
        if self.backend is None:
            return _sdpa(q, k, v, scale, self.mask, causal)
        with attention.sdpa_kernel(self.backend):
            return _sdpa(q, k, v, scale, self.mask, causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


@dataclass(frozen=True, eq=False)
class Banded:
    """A sliding window in blocks of queries, each with only those keys that one of them sees.

    The first W queries are plainly causal. Every later block of R queries sees W + R keys, all under the same mask.
    """

    window: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        tokens, window = q.size(2), self.window
        first = min(window, tokens)
        parts = [_sdpa(q[:, :, :first], k[:, :, :first], v[:, :, :first], scale, causal=True)]
        rows = max(MIN_BAND_ROWS, window // 4)
        distance = torch.arange(window, window + rows, device=q.device)[:, None] - torch.arange(window + rows, device=q.device)
        mask = (distance >= 0) & (distance < window)  # (R, W + R)
        for start in range(first, tokens, rows):
            end = min(start + rows, tokens)
            seen = slice(start - window, end)
            band = mask[: end - start, : end - start + window]
            parts.append(_sdpa(q[:, :, start:end], k[:, :, seen], v[:, :, seen], scale, band))
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)  # in memory (B, T, H, D), as from SDPA


@dataclass(frozen=True, eq=False)
class Blocked:
    """Blocks of queries in plain matmuls, for a CPU; see `picotrain.model.blocked`."""

    window: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return blocked_attention(q, k, v, self.window, q.size(-1) ** -0.5 if scale is None else scale)


@dataclass(frozen=True, eq=False)
class Flex:
    """FlexAttention (arXiv:2412.05496) under a block mask: what lies outside of the window is not computed."""

    block_mask: Any  # torch.nn.attention.flex_attention.BlockMask
    run: Callable[..., Tensor]  # flex_attention, compiled: otherwise it holds all T x T scores

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return self.run(q, k, v, block_mask=self.block_mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


@dataclass(frozen=True, eq=False)
class FlashWindow:
    """A sliding window by the flash-attention that is active in torch (see `Flash`): SDPA has no way to ask for one."""

    window: int
    run: Callable[..., Any]  # torch.nn.attention.varlen.varlen_attn

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        rows, tokens = q.size(0), q.size(2)
        starts = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32, device=q.device)  # (B + 1,), the end included
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
        y = self.run(q, k, v, starts, starts, tokens, tokens, scale=scale, window_size=(self.window - 1, 0))
        return y.unflatten(0, (rows, tokens)).transpose(1, 2)


# ---------------------------------------------------------------- kernels


class Kernel(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str: ...

    def available(self) -> bool:
        """Whether what it calls is installed; whether it works is for the probe to say."""
        ...

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        """The attention of full rows of `tokens`. Called outside of compiled code. Anything may be raised, here and by what it gives."""
        ...


@dataclass(frozen=True)
class TorchKernel:
    """What every torch has: `make` is called with tokens, window and device."""

    name: str
    make: Callable[[int, int, torch.device], Attend]

    def available(self) -> bool:
        return True

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        return self.make(tokens, window, device)


def _flex(tokens: int, window: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    block_mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    return Flex(block_mask, torch.compile(flex_attention, dynamic=False))  # within a compiled block it becomes a part of that


@dataclass(frozen=True)
class Flash:
    """flash-attention: torch's own (2), or the package of version 3 or 4 in its place; torch.compile knows all three by torch's names.

    A process has one implementation at a time, for all of torch's calls of flash-attention.
    """

    name: str
    implementation: str | None = None  # by torch's name; None: its own
    module: str | None = None  # of the package

    def available(self) -> bool:
        try:
            return self.module is None or find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        self.activate()
        if window >= tokens:
            return Sdpa(backend=SDPBackend.FLASH_ATTENTION)
        from torch.nn.attention.varlen import varlen_attn

        asked = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does not ask
        return FlashWindow(window, partial(varlen_attn, enable_gqa=True) if asked else varlen_attn)

    def activate(self) -> None:
        """Put this implementation in the place of the one that is active."""
        if attention.current_flash_attention_impl() == self.implementation:
            return
        if self.implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(self.implementation)


SDPA = TorchKernel("sdpa", lambda tokens, window, device: Sdpa())
BANDED = TorchKernel("banded", lambda tokens, window, device: Banded(window))
TORCH_FLASH = Flash("flash")
KERNELS: dict[str, Kernel] = {
    "fa4": Flash("fa4", "FA4", "flash_attn.cute"),
    "fa3": Flash("fa3", "FA3", "flash_attn_interface"),
    "cudnn": TorchKernel("cudnn", lambda tokens, window, device: Sdpa(backend=SDPBackend.CUDNN_ATTENTION)),
    "flash": TORCH_FLASH,
    "sdpa": SDPA,
    "flex": TorchKernel("flex", _flex),
    "banded": BANDED,
    "blocked": TorchKernel("blocked", lambda tokens, window, device: Blocked(window)),
}


# ---------------------------------------------------------------- probe

# The largest error that a kernel may make in a row of its output or gradients, as a share of that row. A window that is off by
# one key makes a larger error.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
PROBE_ROWS = 2
PROBE_TOKENS = 4096  # at most: a probe shall not take much memory


@dataclass(frozen=True)
class Case:
    """What a kernel will be asked for. With all heads: kernels have been wrong for few key-value heads only (pytorch issue 193893)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    tokens: int
    window: int
    dtype: torch.dtype
    device: torch.device


def probe(kernel: Kernel, case: Case) -> str | None:
    """Call a kernel forward and backward and compare with fp32: None where it works and is right, else the reason in a few words."""
    try:
        if not kernel.available():
            return "not installed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns why it takes no backend, and then raises
            error = _largest_error(kernel, case)
    except Exception as problem:  # third-party code, which may raise anything
        text = next(iter(str(problem).splitlines()), "")
        return f"{type(problem).__name__}: {text:.120}".removesuffix(": ")
    return None if error <= TOLERANCE[case.dtype] else f"wrong, its results are off by {error:.1%}"


def _largest_error(kernel: Kernel, case: Case) -> float:
    tokens = min(case.tokens, PROBE_TOKENS)
    window = tokens if case.window >= case.tokens else max(1, case.window * tokens // case.tokens)
    scale = 1.5 / case.head_dim**0.5  # not the default
    generator = torch.Generator().manual_seed(0)  # torch's own state stays as it is

    def draw(heads: int) -> Tensor:
        x = torch.randn(PROBE_ROWS, tokens, heads, case.head_dim, generator=generator)
        return x.to(case.device, case.dtype).transpose(1, 2)

    q, k, v, grad = draw(case.n_heads), draw(case.n_kv_heads), draw(case.n_kv_heads), draw(case.n_heads)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    y = kernel(tokens, window, case.device)(q, k, v, scale)
    found = (y.detach(), *torch.autograd.grad(y, inputs, grad))
    return max(_row_error(a, b) for a, b in zip(found, reference(q, k, v, grad, window, scale), strict=True))


def reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int, scale: float) -> tuple[Tensor, ...]:
    """The output (B, H, T, D) and the gradients of q, k and v where the output's is `grad`: by the definition, in fp32, one key-value
    head of one row at a time."""
    tokens, shared = q.size(2), q.size(1) // k.size(1)
    distance = torch.arange(tokens, device=q.device)[:, None] - torch.arange(tokens, device=q.device)
    unseen = (distance < 0) | (distance >= window)
    results = tuple(torch.empty_like(x, dtype=torch.float32) for x in (q, q, k, v))
    for row in range(q.size(0)):
        for head in range(k.size(1)):
            queries = slice(head * shared, (head + 1) * shared)
            parts = [x.detach().float().requires_grad_() for x in (q[row, queries], k[row, head], v[row, head])]
            scores = scale * parts[0] @ parts[1].T  # (H / H_kv, T, T)
            y = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ parts[2]
            values = (y.detach(), *torch.autograd.grad(y, parts, grad[row, queries].float()))
            for result, heads, value in zip(results, (queries, queries, head, head), values, strict=True):
                result[row, heads] = value
    return results


def _row_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row (of D features), relative to the row's norm, or to the usual norm where that is larger."""
    lengths = expected.norm(dim=-1)
    errors = (found.float() - expected).norm(dim=-1)
    return float((errors / lengths.clamp(min=float(lengths.square().mean().sqrt()))).max())


# ---------------------------------------------------------------- choice


class Names(NamedTuple):
    """Names of kernels, or "auto": for layers that see the whole row, and for those with a window."""

    attention: str = "auto"
    window_attention: str = "auto"


@dataclass(frozen=True)
class Choice:
    """A kernel, and why others were not taken, by name."""

    kernel: Kernel
    rejected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
        return self.kernel.name + (f" ({reasons})" if reasons else "")


def choose(key: str, order: Sequence[Kernel], cases: Sequence[Case], forced: bool) -> Choice:
    """The first kernel that works in all cases. The last one is taken untried, unless the config's key `key` has `forced` it.

    Raises ConfigError when a forced kernel does not work.
    """
    rejected: dict[str, str] = {}
    for kernel in order if forced else order[:-1]:
        reason = next((found for case in cases if (found := probe(kernel, case))), None)
        if reason is None:
            return Choice(kernel, rejected)
        rejected[kernel.name] = reason
    if forced:
        name, reason = rejected.popitem()
        raise ConfigError([Problem(f"hardware.{key}", f"{name} does not work here: {reason}", "auto takes one that does")])
    return Choice(order[-1], rejected)


def select(cases: Sequence[Case], forced: Names, kept: Names) -> tuple[Choice, Choice]:
    """The kernels for a model whose layers ask for `cases`: one for layers that see the whole row, one for those with a window.

    forced: what the config says. kept: an earlier choice, which is tried first where the config says "auto". Nothing is tried on a
    device where all of them work. Raises ConfigError.
    """
    device = cases[0].device.type
    whole = [case for case in cases if case.window >= case.tokens]
    windowed = [case for case in cases if case.window < case.tokens]
    if device not in hardware.TRIED_ON:
        defaults = default_kernels(device, cases[0].tokens, max((case.window for case in windowed), default=0))
        first, second = (Choice(default if name == "auto" else KERNELS[name]) for name, default in zip(forced, defaults, strict=True))
        return first, second
    beside = KERNELS.get(forced.window_attention) if windowed else None
    order = _order(hardware.attention_kernels(device), forced.attention, kept.attention, beside)
    first = choose("attention", order, whole, forced.attention != "auto")
    second = Choice(BANDED)
    if windowed:
        order = _order(hardware.window_kernels(device), forced.window_attention, kept.window_attention, first.kernel)
        second = choose("window_attention", order, windowed, forced.window_attention != "auto")
    flash = [choice.kernel for choice in (first, second) if isinstance(choice.kernel, Flash)]
    (flash or [TORCH_FLASH])[0].activate()  # not what was tried last
    return first, second


def default_kernels(device: str, tokens: int, window: int) -> tuple[Kernel, Kernel]:
    """What works without a trial: for layers that see all `tokens` of a row, and for those with a window."""
    full = hardware.untried_kernel(device, hardware.attention_kernels(device), tokens)
    windowed = hardware.untried_kernel(device, hardware.window_kernels(device), window)
    return KERNELS[full], KERNELS[windowed]


def _order(names: Sequence[str], forced: str, kept: str, beside: Kernel | None) -> list[Kernel]:
    """What to try, best first. Flash-attention in another implementation than `beside` is left out."""
    if forced != "auto":
        return [KERNELS[forced]]
    if kept == names[-1]:
        return [KERNELS[kept]]
    order = [KERNELS[name] for name in dict.fromkeys((kept, *names)) if name != "auto"]
    return [kernel for kernel in order if not (isinstance(kernel, Flash) and isinstance(beside, Flash) and kernel != beside)]
