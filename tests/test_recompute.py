"""Activation checkpointing: the same losses and gradients from fewer kept activations, eager and compiled, alone and in runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, picotrain
from test_loop import weights
from test_model import all_weights_acting, ids_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotrain import planning as plan
from picotrain.cli import show
from picotrain.config import compose
from picotrain.config.identity import classify_change
from picotrain.model import KVCache, build, recompute
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT

MODES = ("none", "selective", "full")
WIDTH, SEQ_LEN, ROWS = 64, 64, 4


def model(mode: str, precision: str = "fp32", depth: int = 2, **config: Any) -> GPT:
    section = GPTConfig.model_validate({"depth": depth, "head_dim": 16, "width": WIDTH} | config)
    return all_weights_acting(build(section, 300, SEQ_LEN, precision, mode))  # type: ignore[arg-type]


def trained(gpt: GPT) -> dict[str, Tensor]:
    """The loss and all gradients of two micro-batches, accumulated."""
    for seed in (2, 3):
        loss = gpt(ids_of(ROWS, SEQ_LEN, seed=seed), ids_of(ROWS, SEQ_LEN, seed=seed + 9))
        loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in gpt.named_parameters()}  # type: ignore[dict-item]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class _Alive(TorchDispatchMode):
    """Counts the bytes of what operators have made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def nbytes(self, but: GPT) -> int:
        own = {parameter.untyped_storage()._cdata for parameter in but.parameters()}
        return sum(size for key, (ref, size) in self._made.items() if key not in own and not ref.expired())


def widths_a_token(mode: str, precision: str = "fp32", **config: Any) -> float:
    """What one more layer keeps from the forward, in values a token and unit of width."""
    kept = []
    for depth in (2, 4):
        gpt, ids = model(mode, precision, depth, **config), ids_of(ROWS, SEQ_LEN)
        with _Alive() as alive:
            hidden = gpt.hidden(ids)
        kept.append(alive.nbytes(gpt))
        assert hidden.requires_grad
    return (kept[1] - kept[0]) / 2 / (ids.numel() * WIDTH * hidden.element_size())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("config", [{}, {"window_pattern": "SL", "n_kv_heads": 2}], ids=["plain", "windows and grouped queries"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_the_same_to_the_bit(mode: str, config: dict[str, Any], precision: str):
    assert_equal(trained(model(mode, precision, **config)), trained(model("none", precision, **config)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_selective_keeps_less_than_none_and_full_no_more_than_a_blocks_input(precision: str):
    none, selective, full = (widths_a_token(mode, precision) for mode in MODES)
    assert full == 1
    assert 9 <= selective <= 12 < 1.5 * selective < none  # x, q, k, v, attention's output, o, 4 of up and down


def test_full_recomputes_matmuls_and_selective_does_not():
    counted = {}
    for mode in MODES:
        gpt = model(mode)
        loss = gpt(ids_of(ROWS, SEQ_LEN), ids_of(ROWS, SEQ_LEN))
        with _Matmuls() as matmuls:
            loss.backward()
        counted[mode] = matmuls.count
    assert counted["none"] == counted["selective"] == 2 * 6 * 2  # of two layers six matrices each, by input and by weight
    # The last matmul of a block is not needed again: nothing that the backward looks at comes after it.
    assert counted["full"] == counted["none"] + 2 * 5


class _Matmuls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_names_of_parameters_do_not_change(mode: str):
    assert list(model(mode).state_dict()) == list(model("none").state_dict())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_evaluation_and_sampling_recompute_nothing(mode: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a checkpoint without a backward")

    monkeypatch.setattr(recompute, "checkpoint", refuse)
    ours, plain, ids = model(mode), model("none"), ids_of(2, 9)
    with torch.no_grad():
        assert torch.equal(ours(ids, ids), plain(ids, ids))
        assert torch.equal(ours(ids, cache=KVCache(ours, 2, 12)), plain(ids, cache=KVCache(plain, 2, 12)))
    with pytest.raises(AssertionError, match="without a backward"):
        ours(ids, ids)


@pytest.mark.slow  # cold, compiling takes a minute
@pytest.mark.filterwarnings("default")  # inductor's own
def test_compiled_blocks_keep_as_little_share_their_code_and_say_nothing(capfd: pytest.CaptureFixture[str]):
    from torch._dynamo.utils import counters

    expected, kept = trained(model("none", depth=10)), []
    for mode in MODES:
        torch.compiler.reset()
        counters.clear()
        gpt, sizes = model(mode, depth=10), {}
        gpt.compile_blocks()
        found = trained(gpt)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
        assert counters["stats"]["unique_graphs"] == 2, "all blocks, and the loss"

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = gpt.hidden(ids_of(ROWS, SEQ_LEN))
        own = {parameter.untyped_storage()._cdata for parameter in gpt.parameters()}
        kept.append(sum(size for key, size in sizes.items() if key not in own) / (10 * hidden.nbytes))
    assert "context_fn" not in capfd.readouterr().err
    none, selective, full = kept
    assert full < 1.5 and 9 <= selective <= 12 < 1.5 * selective < none


@pytest.mark.slow
def test_runs_of_two_ranks_have_the_same_losses_and_a_resume_may_change_it(tmp_path: Path, tiny):
    common = ("train.device_batch_size=2", "train.max_steps=4", "train.eval_every=4")
    for mode in ("none", "selective"):
        done = picotrain("train", *tiny(tmp_path / mode, *common, "hardware.nproc_per_node=2", f"hardware.recompute={mode}"))
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "selective") == losses(tmp_path / "none")
    for mode, other in (("none", "none"), ("selective", "full")):
        done = picotrain("train", *tiny(tmp_path / mode, *common, "train.max_steps=6", f"hardware.recompute={other}"))
        assert done.returncode == 0, done.stderr
    assert "rounding may differ from before: hardware.nproc_per_node, hardware.recompute changed" in done.stdout + done.stderr
    assert len(losses(tmp_path / "none")) == 6
    assert losses(tmp_path / "selective") == losses(tmp_path / "none")
    ours, theirs = weights(tmp_path / "selective"), weights(tmp_path / "none")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_plan_says_what_is_recomputed(capsys: pytest.CaptureFixture[str]):
    for mode, said in (("none", None), ("selective", "(selective)"), ("full", "(full)")):
        made = plan.make(plan.decide(compose(["hardware=cpu", "data=pystdlib", f"hardware.recompute={mode}"])), "x")
        assert made.recompute == mode
        show.plan_table(made)
        out = capsys.readouterr().out
        assert said in out if said else "recomputed" not in out


def test_it_belongs_to_the_hardware_and_not_to_the_experiment():
    assert classify_change("hardware.recompute") == "rounding"
