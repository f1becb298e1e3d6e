"""Muon: the orthogonalisation, one update against torch's own, the guard, checkpoints, sharing among ranks, whole runs."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines, losses, picotrain, start
from test_loop import assert_same_run, wait_for
from torch import Tensor

from picotrain import checkpoint, minimal, optim
from picotrain.config import compose
from picotrain.errors import CheckpointError, ConfigError
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.optimizers.adamw import AdamWConfig
from picotrain.optimizers.muon import MuonConfig
from picotrain.optimizers.muon.update import POLAR_EXPRESS, Muon, newton_schulz, shares
from picotrain.shape import Rates
from picotrain.state import load_optimizer_tensors, optimizer_tensors

RATES = Rates(matrix_lr=0.02, embed_lr=0.2, head_lr=0.004, weight_decay=0.1)
SECTION = MuonConfig(matrix_lr=1, embed_lr=1, head_lr=1, momentum=0.95, ns_steps=5)
JORDAN = ((3.4445, -4.7750, 2.0315),)  # torch.optim.Muon's, at every step


def model(seed: int = 0) -> GPT:
    gpt = GPT(GPTConfig(depth=2, head_dim=16, width=32), 100, 16)
    gpt.init_weights(seed)
    return gpt


def muon(gpt: GPT, section: AdamWConfig = SECTION) -> Muon:
    optimizer = optim.build(section, gpt, RATES)
    assert isinstance(optimizer, Muon)
    return optimizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give_gradients(gpt: GPT, seed: int) -> None:
    """The same pseudo-random gradients for the same seed."""
    for number, parameter in enumerate(gpt.parameters()):
        parameter.grad = noise(*parameter.shape, seed=1000 * seed + number)


def snapshot(gpt: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = dict(gpt.state_dict()) | optimizer_tensors(gpt, optimizer)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# -- the orthogonalisation


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)], ids=["square", "wide", "tall"])
def test_singular_values_of_a_thousandth_and_more_come_near_one_and_the_directions_stay(shape: tuple[int, int]):
    rank = min(shape)
    u, _, vt = torch.linalg.svd(noise(3, *shape), full_matrices=False)  # three matrices with their own directions
    values = torch.logspace(0, -2.5, rank)
    out = newton_schulz(u * values @ vt)
    assert out.shape == (3, *shape)
    inner = u.mT @ out @ vt.mT  # (3, rank, rank): diagonal, if the directions stayed
    assert inner.diagonal(dim1=-2, dim2=-1).min() > 0.85 and inner.diagonal(dim1=-2, dim2=-1).max() < 1.15
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.01
    torch.testing.assert_close(torch.linalg.matrix_norm(out, ord="fro"), torch.full((3,), math.sqrt(rank)), rtol=0.1, atol=0.0)


def test_matrices_in_a_stack_do_not_see_one_another_and_their_scale_does_not_matter():
    stack = noise(4, 16, 40)
    together = newton_schulz(stack * torch.tensor([1.0, 1e4, 1e-5, 0.0])[:, None, None])
    for number in range(3):
        torch.testing.assert_close(together[number], newton_schulz(stack[number : number + 1])[0], rtol=1e-3, atol=1e-4)
    assert not together[3].any()  # a gradient of 0 moves nothing


def test_it_works_in_bf16_where_that_is_the_models_dtype():
    out = newton_schulz(noise(2, 32, 64), dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    values = torch.linalg.svdvals(out.float())
    assert values.min() > 0.8 and values.max() < 1.2


def test_without_all_of_the_steps_it_is_cruder():
    x = noise(1, 64, 64)
    spread = [torch.linalg.svdvals(newton_schulz(x, POLAR_EXPRESS[:steps])).std().item() for steps in (2, 5)]
    assert spread[1] < 0.5 * spread[0]


# -- one update


def test_matrices_take_the_steps_of_torchs_muon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())  # torch's own has no other way to fp32
    shapes = [(24, 24), (24, 24), (64, 16), (16, 64)]
    ours = [torch.nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    table = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Muon(
        [{"params": [table], "lr": 0.1, "weight_decay": 0.0}],
        {"params": ours, "lr": 0.02, "weight_decay": 0.1},
        adamw={"fused": True}, momentum=0.9, coefficients=JORDAN,
    )  # fmt: skip
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for step in range(4):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = noise(*a.shape, seed=100 * step + number)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(optimizer.state[a]["momentum"], reference.state[b]["momentum_buffer"])


def test_embedding_and_head_take_the_steps_of_adamw_to_the_bit():
    ours, theirs = model(), model()
    optimizers = (muon(ours), optim.build(AdamWConfig(matrix_lr=1, embed_lr=1, head_lr=1), theirs, RATES))
    for step in range(3):
        for gpt, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(gpt, step)
            optim.set_lr(optimizer, 1 / (step + 1))
            optimizer.step()
    assert torch.equal(ours.embed.weight, theirs.embed.weight) and torch.equal(ours.head.weight, theirs.head.weight)
    assert not torch.equal(ours.blocks[0].mlp.up.weight, theirs.blocks[0].mlp.up.weight)


def test_the_schedule_scales_tables_and_matrices_from_their_own_peaks():
    gpt = model()
    optimizer = muon(gpt)
    assert [group["name"] for group in optimizer.param_groups] == ["embed", "head", "matrices"]
    optim.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.002, 0.01]
    optim.set_lr(optimizer, 0.0)
    before = snapshot(gpt, optimizer)
    give_gradients(gpt, 0)
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in gpt.named_parameters())


def test_a_step_has_the_spectral_norm_of_the_rate_and_the_root_of_the_aspect():
    gpt = model()
    optimizer = muon(gpt)
    before = snapshot(gpt, optimizer)
    give_gradients(gpt, 0)
    optimizer.step()
    for name, factor in (("attn.q", 1.0), ("mlp.up", 2.0), ("mlp.down", 1.0)):  # up is (128, 32)
        weight = f"blocks.0.{name}.weight"
        step = gpt.get_parameter(weight) - (1 - RATES.matrix_lr * RATES.weight_decay) * before[weight]
        assert torch.linalg.matrix_norm(step, ord=2).item() == pytest.approx(RATES.matrix_lr * factor, rel=0.15)


def test_what_is_no_matrix_is_refused_and_what_has_no_gradient_stays():
    with pytest.raises(ValueError, match="shape"):
        Muon([], {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1, "weight_decay": 0.0}, adamw={"fused": True})
    gpt = model()
    optimizer = muon(gpt)
    give_gradients(gpt, 0)
    still = gpt.blocks[1].attn.k.weight
    still.grad, before = None, still.detach().clone()
    optimizer.step()
    assert torch.equal(still, before) and "momentum" not in optimizer.state[still]


# -- the guard


@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later one"])
def test_a_skipped_update_changes_neither_weights_nor_momentum_nor_counters(first: bool):
    gpt, twin = model(), model()
    optimizer, other = muon(gpt), muon(twin)
    guard = optim.Guard(None, torch.device("cpu"), on_device=True)
    good = torch.tensor(2.0)

    def update(which: GPT, its: Muon, seed: int, loss: Tensor) -> bool:
        give_gradients(which, seed)
        if not torch.isfinite(loss):
            for parameter in which.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
        skipped = guard.skip(its, loss, torch.tensor(1.0))
        its.step()
        its.zero_grad(set_to_none=True)
        return bool(skipped)

    if not first:
        assert not update(gpt, optimizer, 0, good) and not update(twin, other, 0, good)
    before = snapshot(gpt, optimizer)
    assert update(gpt, optimizer, 1, torch.tensor(math.nan))
    after = snapshot(gpt, optimizer)
    assert_equal({name: after[name] for name in before}, before)
    assert not update(gpt, optimizer, 2, good) and not update(twin, other, 2, good)
    assert_equal(snapshot(gpt, optimizer), snapshot(twin, other))  # as if there had been no bad one


# -- checkpoints


def test_what_is_saved_has_names_and_goes_on_to_the_bit():
    gpt, again = model(), model(1)
    optimizer, fresh = muon(gpt), muon(again)
    for step in range(2):
        give_gradients(gpt, step)
        optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(gpt, optimizer).items()}
    matrices = [name for name, _ in gpt.named_parameters() if name.startswith("blocks.")]
    tables = [f"{key}.{name}.weight" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("embed", "head")]
    assert sorted(tensors) == sorted([f"momentum.{name}" for name in matrices] + tables)
    again.load_state_dict(gpt.state_dict())
    load_optimizer_tensors(again, fresh, tensors)
    for which, its in ((gpt, optimizer), (again, fresh)):
        give_gradients(which, 7)
        its.step()
    assert_equal(snapshot(gpt, optimizer), snapshot(again, fresh))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"momentum.blocks.0.attn.q.weight": torch.zeros(32, 31)}),
        lambda tensors: tensors.update({"momentum.blocks.0.attn.q.weight": torch.zeros(())}),
        lambda tensors: tensors.update({"exp_avg.blocks.0.attn.q.weight": torch.zeros(32, 32)}),
        lambda tensors: tensors.pop("exp_avg.embed.weight"),
        lambda tensors: tensors.update({"step.head.weight": torch.zeros(128, 32)}),
    ],
    ids=["another shape", "a scalar", "AdamW's", "a moment is missing", "a counter for each weight"],
)
def test_state_that_is_not_this_optimizers_is_refused(change: Any):
    gpt = model()
    optimizer = muon(gpt)
    give_gradients(gpt, 0)
    optimizer.step()
    tensors = optimizer_tensors(gpt, optimizer)
    change(tensors)
    with pytest.raises(CheckpointError):
        load_optimizer_tensors(gpt, muon(gpt), tensors)


# -- ranks


def test_the_work_is_shared_evenly_and_always_in_the_same_way():
    shapes = ((64, 64),) * 8 + ((256, 64),) * 2 + ((64, 256),) * 2
    assert set(shares(shapes, 1)) == {0}
    for world_size in (2, 4):
        ranks = shares(shapes, world_size)
        assert ranks == shares.__wrapped__(shapes, world_size)
        cost = [
            sum(min(s) ** 2 * (2 * max(s) + min(s)) for s, r in zip(shapes, ranks, strict=True) if r == rank) for rank in range(world_size)
        ]
        assert max(cost) <= 1.01 * sum(cost) / world_size
    assert len(set(shares(shapes, 64))) == len(shapes)  # more ranks than matrices: some have none


# Run by each of two ranks; the same gradients on both, as DDP leaves them.
RANK_SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, os.environ["TEST_DIR"])
from picotrain import optim, parallel
from picotrain.optimizers.muon import update as module
from picotrain.state import optimizer_tensors
from test_muon import RATES, SECTION, give_gradients, model

ranks = parallel.build("cpu")
seen, whole = [], module.newton_schulz
def counting(x, *rest):
    seen.append(x.numel())
    return whole(x, *rest)
module.newton_schulz = counting
gpt = model()
optimizer = optim.build(SECTION, gpt, RATES, ranks)
for step in range(3):
    give_gradients(gpt, step)
    optimizer.step()
torch.save({"weights": gpt.state_dict(), "optimizer": optimizer_tensors(gpt, optimizer), "worked_on": sum(seen)},
           os.environ["OUT"] + f"/{ranks.rank}.pt")
half = ranks.gather_tensor(torch.full((2, 3), ranks.rank + 0.5, dtype=torch.bfloat16))
ranks.teardown()
print(json.dumps([list(half.shape), half.flatten(1)[:, 0].tolist()]), flush=True)
os._exit(0)  # as a rank does, see picotrain.ranks
"""


def test_two_ranks_do_half_the_work_each_and_end_where_one_process_does(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TEST_DIR": str(Path(__file__).parent),
        "OUT": str(tmp_path),
    }
    command = [sys.executable, "-W", "error", "-c", RANK_SCRIPT]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [json.loads(output) for output in outputs] == [[[2, 2, 3], [0.5, 1.5]]] * 2  # what gather_tensor gave
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for part in ("weights", "optimizer"):
        assert_equal(found[0][part], found[1][part])  # the replicas stay one model
    gpt = model()
    optimizer = muon(gpt)
    for step in range(3):
        give_gradients(gpt, step)
        optimizer.step()
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(found[0]["weights"][name], parameter, rtol=1e-5, atol=1e-6, msg=name)
    matrices = 3 * sum(parameter.numel() for name, parameter in gpt.named_parameters() if name.startswith("blocks."))
    assert [rank["worked_on"] for rank in found] == [matrices // 2] * 2


# -- runs

MUON = ("optimizer=muon", "optimizer.scale=false", "optimizer.matrix_lr=0.02")


def test_a_run_learns_is_resumed_to_the_bit_and_needs_the_disk_that_was_planned(tmp_path: Path, tiny):
    more = (*MUON, "train.max_steps=16", "train.save_every=8", "train.eval_every=8", "train.total_batch_size=2048")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = picotrain("train", *tiny(straight, *more))
    assert done.returncode == 0, done.stderr
    values = losses(straight)
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    process = start("train", *tiny(broken, *more))
    wait_for(broken / "checkpoints/step_00000008")
    process.kill()
    process.communicate()
    assert not (broken / "summary.json").exists()
    resumed = picotrain("resume", str(broken))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(straight, broken)
    last = [checkpoint.load_tensors(checkpoint.find(run / "checkpoints", "last"), "optimizer") for run in (straight, broken)]
    assert_equal(*last)
    folder = straight / "checkpoints" / "step_00000016"
    sizes = [json.loads(path.read_text())["metadata"]["total_size"] for path in folder.glob("*.index.json")]
    plan = json.loads((straight / "plan.json").read_text())
    assert sum(sizes) == pytest.approx(plan["checkpoint_bytes"], abs=100)


def test_two_processes_train_like_one(tmp_path: Path, tiny):
    words = tiny(tmp_path / "two", *MUON, "train.max_steps=6", "train.eval_every=0", "train.grad_clip=null")
    done = picotrain("train", *words, "hardware.nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "two", "train")[0]["world_size"] == 2
    assert losses(tmp_path / "two") == pytest.approx(list(minimal.losses(compose(words))), rel=1e-4)


# -- the config


def test_the_rate_of_the_matrices_is_the_same_for_every_width_and_batch_and_a_checkpoint_has_one_moment_of_them(tiny, tmp_path: Path):
    from picotrain import planning as plan

    def made(*words: str) -> plan.Plan:
        return plan.make(plan.decide(compose([*tiny(tmp_path), *words])), "x")

    narrow, wide = (made("optimizer=muon", "optimizer.scale=true", f"model.width={width}") for width in (64, 256))
    assert narrow.matrix_lr == wide.matrix_lr == 0.01
    larger = made("optimizer=muon", "optimizer.scale=true", "train.total_batch_size=512")
    assert larger.matrix_lr == 0.01 and larger.embed_lr == pytest.approx(math.sqrt(2) * narrow.embed_lr)
    assert larger.weight_decay == pytest.approx(narrow.weight_decay)  # batch / tokens: as many steps, the same decay in each
    assert narrow.embed_lr == pytest.approx(2 * wide.embed_lr)
    adamw = made()
    assert adamw.checkpoint_bytes == 12 * adamw.parameters["total"]
    saved = adamw.checkpoint_bytes - narrow.checkpoint_bytes
    assert saved == 4 * adamw.parameters["matrices"] == adamw.staging_bytes - narrow.staging_bytes
    # On a CPU predicted four times: the moment, its copy for a save, and twice the file that this is written to.
    assert adamw.predicted_memory_bytes - narrow.predicted_memory_bytes == 4 * saved


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.kind=muon"], "optimizer.momentum"),
        (["optimizer=muon", "optimizer.ns_steps=0"], "optimizer.ns_steps"),
        (["optimizer=muon", "optimizer.kind=adamw"], "optimizer.momentum"),
    ],
)
def test_keys_of_the_other_kind_are_refused(words: list[str], key: str):
    with pytest.raises(ConfigError) as refused:
        compose(words)
    assert refused.value.problems[0].path == key
