"""Attention kernels: all compute the same, and one that does not work, or works wrongly, is found out by a call."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import lines, picotrain
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention

from picotrain import hardware
from picotrain.errors import ConfigError
from picotrain.model import KVCache, attention_mask, decoder, kernels
from picotrain.model.kernels import (
    KERNELS,
    Attend,
    Banded,
    Blocked,
    Case,
    Choice,
    FlashWindow,
    Flex,
    Names,
    Sdpa,
    choose,
    probe,
    reference,
    select,
)
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT

CPU = torch.device("cpu")


def drawn(tokens: int, heads: int = 2, kv_heads: int = 2, rows: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v and an output's gradient, laid out in memory as the model does it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(size, generator=generator).transpose(1, 2).requires_grad_() for size in shapes)


def results(attend: Callable[..., Tensor], tensors: Sequence[Tensor], scale: float | None = None) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    q, k, v, grad = tensors
    y = attend(q, k, v, scale)
    return [y, *torch.autograd.grad(y, (q, k, v), grad)]


def small_model(seq_len: int = 160, **config: Any) -> GPT:
    """One whose attention acts: at first a model's would be nothing."""
    model = GPT(GPTConfig.model_validate({"depth": 4, "head_dim": 16, "width": 64} | config), 100, seq_len)
    model.init_weights(0)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.o.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def dense(window: int) -> Attend:
    """A window by one mask of T x T."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        distance = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
        return Sdpa((distance >= 0) & (distance < window))(q, k, v, scale)

    return attend


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- what they compute


def windows_and_lengths() -> list[tuple[int, int]]:
    rng = random.Random(5)
    drawn = [(tokens := rng.randint(1, 600), rng.randint(1, tokens + 5)) for _ in range(12)]
    return [(1, 1), (5, 1), (64, 64), (65, 64), (129, 64), (512, 256), (500, 129), (300, 301), *drawn]


@pytest.mark.parametrize(("tokens", "window"), windows_and_lengths())
def test_the_banded_path_equals_a_dense_mask_in_outputs_and_gradients(tokens: int, window: int):
    kv_heads = (1, 2, 4)[tokens % 3]
    tensors = drawn(tokens, heads=4, kv_heads=kv_heads, seed=window)
    assert_same(results(Banded(window), tensors, scale=0.5), results(dense(window), tensors, scale=0.5))


def test_the_banded_path_makes_no_call_with_all_keys_under_a_mask(monkeypatch):
    calls: list[tuple[int, int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.size(2), k.size(2)))
        assert options["attn_mask"] is None or options["attn_mask"].shape == calls[-1]
        return original(q, k, v, **options)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v, _ = drawn(2048, dim=2)
    Banded(512)(q, k, v)
    assert sum(queries for queries, _ in calls) == 2048
    assert max(keys for _, keys in calls) <= 512 + 128
    assert sum(queries * keys for queries, keys in calls) < 0.35 * 2048**2


def test_the_reference_of_the_probe_is_attention_by_its_definition():
    tensors = drawn(50, heads=4, kv_heads=2)
    assert_same(reference(*tensors, window=20, scale=0.3), results(dense(20), tensors, scale=0.3))
    assert_same(reference(*tensors, window=50, scale=8**-0.5), results(Sdpa(), tensors))


@pytest.mark.filterwarnings("default")  # inductor's own, and that it is called uncompiled
@pytest.mark.parametrize(("tokens", "window"), [(200, 64), (256, 1), (130, 129)])
def test_flex_attention_under_its_block_mask_gives_the_output_of_a_dense_mask(tokens: int, window: int):
    attend = KERNELS["flex"](tokens, window, CPU)
    assert isinstance(attend, Flex)
    q, k, v = (x.detach() for x in drawn(tokens, heads=4, kv_heads=2)[:3])  # on a CPU there is no backward
    found = Flex(attend.block_mask, flex_attention.flex_attention)(q, k, v, 0.5)
    torch.testing.assert_close(found, dense(window)(q, k, v, 0.5), rtol=1e-4, atol=1e-5)


def test_a_window_by_flash_attention_is_asked_for_as_torch_documents_it():
    def varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int, **options: Any) -> Tensor:
        """The documented meaning of varlen_attn: (T, H, D), a query at i sees keys i - left .. i + right of its own sequence."""
        assert starts.dtype == starts_k.dtype == torch.int32
        assert longest == longest_k == int(starts.diff().max())
        left, right = options["window_size"]
        assert right == 0
        pieces = []
        for a, b in pairwise(starts.tolist()):
            own = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            pieces.append(dense(left + 1)(*own, options["scale"])[0].transpose(0, 1))
        return torch.cat(pieces)

    tensors = drawn(40, heads=4, kv_heads=2, rows=3)
    assert_same(results(FlashWindow(16, varlen), tensors, scale=0.5), results(dense(16), tensors, scale=0.5))


def test_torch_takes_the_arguments_of_a_window_by_flash_attention():
    attend = KERNELS["flash"](64, 16, CPU)
    assert isinstance(attend, FlashWindow)
    q, k, v = (torch.empty(3, 64, heads, 32, dtype=torch.bfloat16, device="meta").transpose(1, 2) for heads in (4, 2, 2))
    assert attend(q, k, v, 0.5).shape == (3, 4, 64, 32)


# ---------------------------------------------------------------- in compiled code


def compiled_code(attends: Sequence[Attend]) -> list[set[str]]:
    """The operators in each forward code that compiled blocks make, checked to compute what blocks do; a graph break raises."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    codes: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        codes.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward))
    torch.compiler.reset()
    plain, blocks = (small_model(seq_len=256, n_kv_heads=2) for _ in range(2))
    for block in blocks.blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    x = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(1))
    for attend in attends:
        for ours, theirs in zip(blocks.blocks, plain.blocks, strict=True):
            y = ours(x, plain.cos, plain.sin, attend)
            y.sum().backward()
            torch.testing.assert_close(y, theirs(x, plain.cos, plain.sin, attend))
    return codes


@pytest.mark.filterwarnings("default")  # dynamo's own
def test_kernels_compile_without_graph_breaks_into_what_they_name():
    attends = [Sdpa(), Banded(64), Sdpa(backend=SDPBackend.FLASH_ATTENTION), Sdpa(backend=SDPBackend.MATH), Blocked(64)]
    codes = compiled_code(attends)
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert [flash in code for code in codes] == [True, True, True, False, False]  # one code each: all blocks share it
    assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()  # the backend was pinned in there only


@pytest.mark.filterwarnings("default")  # inductor's own
def test_flex_attention_compiles_as_a_part_of_its_block():
    """Forward only: on a CPU there is no more."""
    torch.compiler.reset()
    attend = KERNELS["flex"](256, 64, CPU)
    model = small_model(seq_len=256, n_kv_heads=2)
    x, block = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(1)), model.blocks[0]
    with torch.no_grad():
        run = torch.compile(block.forward, backend="aot_eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(run(x, model.cos, model.sin, attend), block(x, model.cos, model.sin, dense(64)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- in the model


class Counting:
    """A kernel that computes rightly and says what it was asked for."""

    def __init__(self, name: str = "counting"):
        self.name, self.made, self.calls = name, [], 0

    def available(self) -> bool:
        return True

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        self.made.append((tokens, window))

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
            self.calls += 1
            return Banded(window)(q, k, v, scale)

        return attend


def test_full_rows_go_through_the_kernels_and_all_else_through_masks(monkeypatch):
    model, full, windowed = small_model(window_pattern="SL"), Counting(), Counting()
    masks: list[tuple[int, int]] = []

    def spy(start: int, tokens: int, window: int, device: torch.device) -> Tensor | None:
        masks.append((start, tokens))
        return attention_mask(start, tokens, window, device)

    monkeypatch.setattr(decoder, "attention_mask", spy)
    model.use_kernels(full, windowed)
    ids = torch.randint(100, (2, 160), generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        logits = model(ids)
    assert (full.made, windowed.made) == ([(160, 160)], [(160, 80)])  # made once
    assert (full.calls, windowed.calls) == (4, 4)
    assert not masks
    with torch.no_grad():
        shorter = model(ids[:, :100])
        cached = model(ids, cache=KVCache(model, 2, 160))
    assert (full.calls, windowed.calls) == (4, 4)
    assert {(0, 100), (0, 160)} == set(masks)
    torch.testing.assert_close(shorter, logits[:, :100], rtol=0, atol=1e-4)
    torch.testing.assert_close(cached, logits, rtol=0, atol=1e-4)


def test_a_kernel_made_by_an_evaluation_serves_training():
    model = small_model(window_pattern="SL")
    model.use_kernels(KERNELS["sdpa"], MaskKernel())
    ids = torch.randint(100, (2, 160), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model(ids)
    model(ids, ids).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class MaskKernel(Counting):
    """One that prepares a tensor."""

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        bias = torch.zeros(tokens, tokens).masked_fill_(attention_mask(0, tokens, window, device).logical_not(), -torch.inf)
        return Sdpa(bias)


# ---------------------------------------------------------------- the probe


@dataclass
class Fake:
    """A kernel under test: `attend` gets q, k, v, scale and the window."""

    name: str
    attend: Callable[..., Tensor]
    installed: bool = True
    asked: list[tuple[int, int]] = field(default_factory=list)

    def available(self) -> bool:
        return self.installed

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        self.asked.append((tokens, window))
        return lambda q, k, v, scale=None: self.attend(q, k, v, scale, window)


def right(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return Banded(window)(q, k, v, scale)


def raising(*_: Any) -> Tensor:
    raise RuntimeError("No available kernel. Aborting execution.\nmore")


class WrongGradient(torch.autograd.Function):
    """The identity; the gradient of the first row of the batch is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(grads[0][:1]), grads[0][1:]])


def one_key_more(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return right(q, k, v, scale, window + 1)


def its_own_scale(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return right(q, k, v, None, window)


def heads_in_another_order(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return right(q, k.repeat(1, q.size(1) // k.size(1), 1, 1), v.repeat(1, q.size(1) // v.size(1), 1, 1), scale, window)


def only_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return right(q.detach(), k, v, scale, window)


def a_hole(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    y = right(q, k, v, scale, window)
    return torch.cat([y[:, :, :-1], torch.full_like(y[:, :, -1:], torch.nan)], dim=2)


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return right(q, WrongGradient.apply(k), v, scale, window)


def case(window: int = 128, tokens: int = 256, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)) -> Case:
    return Case(*heads, 16, tokens, window, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "banded"])
def test_a_kernel_that_is_right_passes(dtype: torch.dtype, name: str):
    assert probe(KERNELS[name], case(256 if name == "sdpa" else 100, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [one_key_more, its_own_scale, heads_in_another_order, a_hole, wrong_gradient])
def test_a_kernel_with_wrong_results_is_found_out(dtype: torch.dtype, attend: Callable[..., Tensor]):
    reason = probe(Fake("wrong", attend), case(dtype=dtype))
    assert reason is not None
    assert reason.startswith("wrong, its results are off by")


def test_a_wide_window_that_is_off_by_one_is_found_out_in_bf16():
    wide = case(window=1024, tokens=2048, dtype=torch.bfloat16, heads=(1, 1))
    assert probe(KERNELS["banded"], wide) is None
    assert "wrong" in str(probe(Fake("wide", one_key_more), wide))


def test_a_kernel_that_raises_or_is_not_there_is_no_choice():
    assert probe(Fake("none", raising), case()) == "RuntimeError: No available kernel. Aborting execution."
    assert "RuntimeError" in str(probe(Fake("half", only_forward), case()))  # q has no gradient
    missing = Fake("missing", right, installed=False)
    assert probe(missing, case()) == "not installed"
    assert not missing.asked
    assert probe(KERNELS["fa3"], case()) == probe(KERNELS["fa4"], case()) == "not installed"


def test_the_probe_asks_for_the_runs_shape_and_leaves_the_random_state():
    state, fake = torch.get_rng_state(), Fake("fine", right)
    assert probe(fake, case(window=60, tokens=200)) is None
    assert fake.asked == [(200, 60)]
    assert torch.equal(state, torch.get_rng_state())


def test_a_probe_of_long_rows_is_cut_short_in_proportion(monkeypatch):
    monkeypatch.setattr(kernels, "PROBE_TOKENS", 128)
    fake = Fake("fine", right)
    assert probe(fake, case(window=500, tokens=1000)) is None
    assert probe(fake, case(window=1000, tokens=1000)) is None
    assert fake.asked == [(128, 64), (128, 128)]


# ---------------------------------------------------------------- the choice


def test_the_first_kernel_that_works_is_taken_and_the_others_reasons_are_kept():
    order = [Fake("a", raising), Fake("b", one_key_more), Fake("c", right), Fake("d", right)]
    choice = choose("attention", order, [case()], forced=False)
    assert choice.kernel is order[2]
    assert set(choice.rejected) == {"a", "b"}
    assert str(choice).startswith("c (a: RuntimeError: No available kernel. Aborting execution.; b: wrong, its results")
    assert not order[3].asked


def test_a_kernel_must_work_for_every_window():
    def narrow(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
        return right(q, k, v, scale, min(window, 64))

    choice = choose("window_attention", [Fake("narrow", narrow), Fake("last", right)], [case(64), case(128)], forced=False)
    assert choice.kernel.name == "last"


def test_the_last_kernel_is_taken_as_it_is():
    last = Fake("last", raising)
    assert choose("attention", [Fake("a", raising), last], [case()], forced=False).kernel is last
    assert not last.asked


def test_a_forced_kernel_that_does_not_work_is_a_mistake_in_the_config():
    with pytest.raises(ConfigError, match=r"hardware.attention: a does not work here: RuntimeError: No available kernel"):
        choose("attention", [Fake("a", raising)], [case()], forced=True)
    with pytest.raises(ConfigError, match=r"hardware.window_attention: b does not work here: wrong, its results are off by"):
        choose("window_attention", [Fake("b", one_key_more)], [case()], forced=True)
    assert choose("attention", [fine := Fake("c", right)], [case()], forced=True) == Choice(fine)


class FakeFlash(kernels.Flash):
    """flash-attention that computes on a CPU, in one implementation at a time."""

    active: str | None = None

    def available(self) -> bool:
        return True

    def __call__(self, tokens: int, window: int, device: torch.device) -> Attend:
        self.activate()
        return lambda q, k, v, scale=None: self.compute(q, k, v, scale, window)

    def compute(self, *arguments: Any) -> Tensor:
        assert FakeFlash.active == self.implementation
        return (raising if self.name in BROKEN else right)(*arguments)

    def activate(self) -> None:
        FakeFlash.active = self.implementation


BROKEN: set[str] = set()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The kernels and orders of CUDA, on a CPU."""
    fakes: dict[str, Any] = {"fa4": FakeFlash("fa4", "FA4"), "fa3": FakeFlash("fa3", "FA3"), "flash": FakeFlash("flash")}
    fakes |= {name: Fake(name, right) for name in ("cudnn", "sdpa", "flex", "banded")}
    monkeypatch.setattr(kernels, "KERNELS", fakes)
    monkeypatch.setattr(kernels, "TORCH_FLASH", fakes["flash"])
    monkeypatch.setitem(hardware._ATTENTION, "cpu", hardware.attention_kernels("cuda"))
    monkeypatch.setitem(hardware._WINDOW_ATTENTION, "cpu", hardware.window_kernels("cuda"))
    monkeypatch.setattr(hardware, "TRIED_ON", {"cpu"})
    monkeypatch.setitem(globals(), "BROKEN", set())
    FakeFlash.active = "FA3"  # of an earlier user
    return fakes


AUTO = Names()


def names_of(forced: Names = AUTO, kept: Names = AUTO, cases: Sequence[Case] = (case(256), case(64))) -> tuple[str, str]:
    first, second = select(cases, forced, kept)
    return first.kernel.name, second.kernel.name


@pytest.mark.parametrize(
    ("broken", "expected", "active"),
    [
        ((), ("fa4", "fa4"), "FA4"),
        (("fa4",), ("fa3", "fa3"), "FA3"),
        (("fa4", "fa3"), ("cudnn", "flash"), None),
        (("fa4", "fa3", "flash"), ("cudnn", "flex"), None),
        (("fa4", "fa3", "flash", "cudnn", "flex"), ("sdpa", "banded"), None),
    ],
)
def test_kernels_are_tried_in_the_order_of_the_table(gpu, broken, expected, active):
    BROKEN.update(broken)
    for name in set(broken) & {"cudnn", "flex"}:
        gpu[name].attend = raising
    assert names_of() == expected
    assert FakeFlash.active == active


def test_one_process_holds_one_flash_attention(gpu):
    assert names_of(forced=Names("auto", "fa3")) == ("fa3", "fa3")
    assert names_of(forced=Names("flash", "auto")) == ("flash", "flash")
    assert names_of(forced=Names("cudnn", "fa3")) == ("cudnn", "fa3")
    assert FakeFlash.active == "FA3"
    assert names_of(forced=Names("sdpa", "banded")) == ("sdpa", "banded")
    assert FakeFlash.active is None


def test_an_earlier_choice_is_made_again_as_long_as_it_works(gpu):
    assert names_of(kept=Names("cudnn", "flex")) == ("cudnn", "flex")
    assert names_of(kept=Names("sdpa", "banded")) == ("sdpa", "banded")
    gpu["cudnn"].attend = raising
    first, second = select([case(256), case(64)], Names(), Names("cudnn", "flex"))
    assert (first.kernel.name, second.kernel.name) == ("fa4", "flex")
    assert "cudnn" in first.rejected
    assert names_of(forced=Names("sdpa", "auto"), kept=Names("cudnn", "flex")) == ("sdpa", "flex")


def test_without_windows_nothing_is_tried_for_them(gpu):
    assert names_of(cases=[case(256)], forced=Names("cudnn", "flex")) == ("cudnn", kernels.BANDED.name)
    assert not gpu["flex"].asked


def test_off_cuda_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(kernels, "probe", partial(pytest.fail, "a probe"))
    model = small_model(window_pattern="SL")
    assert [str(choice) for choice in model.choose_kernels(Names(), Names())] == ["blocked", "blocked"]
    assert [str(choice) for choice in model.choose_kernels(Names("sdpa"), Names())] == ["sdpa", "blocked"]
    assert [kernel.name for kernel in kernels.default_kernels("mps", 512, 256)] == ["sdpa", "banded"]


def test_a_cpu_attends_in_blocks_up_to_a_length(monkeypatch):
    most = hardware.BLOCKED_TOKENS
    assert [kernel.name for kernel in kernels.default_kernels("cpu", most, 256)] == ["blocked", "blocked"]
    assert [kernel.name for kernel in kernels.default_kernels("cpu", most + 1, 256)] == ["sdpa", "blocked"]
    assert [kernel.name for kernel in kernels.default_kernels("cpu", 2 * most + 2, most + 1)] == ["sdpa", "banded"]


def test_training_on_a_cpu_builds_no_mask_of_all_pairs(monkeypatch):
    monkeypatch.setattr(decoder, "attention_mask", partial(pytest.fail, "a mask"))
    model = small_model(window_pattern="SL")
    ids = torch.randint(100, (2, 160), generator=torch.Generator().manual_seed(2))
    model(ids, ids).backward()


def test_every_kernel_of_the_tables_exists_and_can_be_forced():
    from picotrain.config.keys import leaves

    tables = {"attention": (hardware.attention_kernels, "sdpa"), "window_attention": (hardware.window_kernels, "banded")}
    for key, (kernels_of, last) in tables.items():
        words = leaves()[f"hardware.{key}"].words
        assert set(words) == {"auto", *kernels_of("cuda"), *kernels_of("cpu")}
        assert set(words) - {"auto"} <= set(KERNELS)
        assert kernels_of("mps") == (last,) == kernels_of("cuda")[-1:] == kernels_of("cpu")[-1:]


# ---------------------------------------------------------------- in a run


def test_a_first_start_chooses_and_later_ones_keep_to_it(tiny, tmp_path: Path, monkeypatch):
    """As on a GPU, with the kernels that a CPU has under those names: flash SDPA works there, all before it does not."""
    from picotrain.cli.commands import new_run
    from picotrain.launch import launch

    monkeypatch.setattr(hardware, "TRIED_ON", {"cpu"})
    monkeypatch.setitem(hardware._ATTENTION, "cpu", ("cudnn", "flash", "sdpa"))
    monkeypatch.setitem(hardware._WINDOW_ATTENTION, "cpu", ("fa4", "flash", "banded"))
    run = tmp_path / "run"

    def start(steps: int, *more: str) -> tuple[dict[str, Any], list[str]]:
        """Train to `steps`; the plan, and what was said about attention so far."""
        options = ["model.window_pattern=SL", "train.eval_every=0", f"train.max_steps={steps}"]
        assert launch(lambda: new_run(tiny(run, *options, *more), None, None)) == 0
        return json.loads((run / "plan.json").read_text()), [r["message"] for r in lines(run, "event") if r["name"] == "attention"]

    plan, said = start(1)
    assert (plan["attention"], plan["window_attention"]) == ("flash", "banded")
    assert len(said) == 1
    assert re.fullmatch(r"by flash \(cudnn: \w+: .+\); in windows by banded \(flash: \w+: .+\)", said[0])

    probed: list[str] = []
    monkeypatch.setattr(kernels, "probe", lambda kernel, case: probed.append(kernel.name) or probe(kernel, case))
    again, said_again = start(2)
    assert (again["attention"], again["window_attention"], said_again) == ("flash", "banded", said)
    assert probed == ["flash"]

    monkeypatch.setitem(kernels.KERNELS, "flash", Fake("flash", raising))
    plan, said = start(3)
    assert plan["attention"] == "sdpa"
    assert said[1].startswith("by sdpa (flash: RuntimeError: No available kernel. Aborting execution.; cudnn: ")

    with pytest.raises(ConfigError, match=r"hardware.attention: cudnn does not work here: "):
        start(4, "hardware.attention=cudnn")


def test_a_run_on_a_cpu_says_its_kernels_and_refuses_those_of_a_gpu(tiny, tmp_path: Path):
    run = tmp_path / "run"
    done = picotrain("train", *tiny(run, "model.window_pattern=SL", "train.max_steps=1", "train.eval_every=0"))
    assert done.returncode == 0, done.stderr
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["attention"], plan["window_attention"]) == ("blocked", "blocked")
    assert "fp32, attention by blocked, in windows by blocked" in done.stdout
    assert "attention" not in {record["name"] for record in lines(run, "event")}

    refused = picotrain("train", *tiny(tmp_path / "other", "hardware.attention=cudnn", "hardware.window_attention=flex"))
    assert refused.returncode == 2
    assert "hardware.attention: cudnn does not run on cpu (valid there: auto, blocked, sdpa)" in refused.stderr
    assert "hardware.window_attention: flex does not run on cpu (valid there: auto, blocked, banded)" in refused.stderr


def test_a_plan_for_a_gpu_says_what_will_be_tried():
    said = picotrain("plan", "model=d12", "hardware=1xh100", "model.window_pattern=SSSL", "hardware.window_attention=flex").stdout
    order = "the first of fa4, fa3, cudnn, flash, sdpa that works, which the first start finds out; in windows flex"
    assert order in " ".join(said.split())
    mixed = picotrain("plan", "model=d12", "hardware=1xh100", "hardware.attention=fa4", "hardware.window_attention=flash")
    assert mixed.returncode == 2
    assert "hardware.window_attention: is flash and hardware.attention is fa4, but a process holds one flash-attention" in mixed.stderr
