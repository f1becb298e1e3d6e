"""Parameter groups and AdamW against torch's own textbook version."""

from __future__ import annotations

import math

import pytest
import torch

from picotrain import optim
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.optimizers.adamw import AdamWConfig
from picotrain.optimizers.muon import MuonConfig
from picotrain.parallel import Parallel
from picotrain.shape import Rates
from picotrain.state import load_optimizer_tensors

RATES = Rates(matrix_lr=0.01, embed_lr=0.2, head_lr=0.004, weight_decay=0.1)
SECTION = AdamWConfig(matrix_lr=1, embed_lr=1, head_lr=1, eps=1e-8)


def model(seed: int = 0) -> GPT:
    gpt = GPT(GPTConfig(depth=2, head_dim=16, width=32), 100, 16)
    gpt.init_weights(seed)
    return gpt


def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay():
    gpt = model()
    groups = {group["name"]: group for group in optim.param_groups(gpt, RATES)}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in gpt.parameters())
    assert groups["embed"]["params"] == [gpt.embed.weight] and groups["head"]["params"] == [gpt.head.weight]
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"embed": 0.0, "head": 0.0, "matrices": 0.1}


def test_value_embeddings_go_with_the_embedding_and_scalars_have_a_rate_of_their_own():
    gpt = GPT(GPTConfig(depth=2, head_dim=16, width=32, value_embeds=True, residual_scalars=True, smear=True), 100, 16)
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    groups = {g["name"]: g for g in optim.param_groups(gpt, Rates(0.01, 0.2, 0.004, 0.1, scalar_lr=0.02))}
    assert [names[id(p)] for p in groups["embed"]["params"]] == ["embed.weight", "value_embeds.1.weight"]
    assert groups["scalars"]["peak_lr"] == 0.02 and groups["scalars"]["weight_decay"] == 0.0
    assert {names[id(p)].partition(".")[0] for p in groups["scalars"]["params"]} == {"residual_scalars", "smear"}
    assert all(names[id(p)].startswith("blocks.") for p in groups["matrices"]["params"])


def test_fused_adamw_takes_the_steps_of_the_plain_one():
    ours, theirs = model(), model()
    fused = optim.build(SECTION, ours, RATES)
    plain = torch.optim.AdamW(
        [
            {"params": [theirs.embed.weight], "lr": 0.2, "weight_decay": 0.0},
            {"params": [theirs.head.weight], "lr": 0.004, "weight_decay": 0.0},
            {"params": [p for n, p in theirs.named_parameters() if n.startswith("blocks")], "lr": 0.01, "weight_decay": 0.1},
        ],
        betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        for gpt, optimizer in ((ours, fused), (theirs, plain)):
            gpt(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_schedule_scales_every_group_from_its_own_peak():
    optimizer = optim.build(SECTION, model(), RATES)
    optim.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.002, 0.005]
    optim.set_lr(optimizer, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.004, 0.01]


UNLIKE = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adam": lambda groups: torch.optim.Adam(groups, foreach=True),
}


SECTIONS = {"adamw": SECTION, "muon": MuonConfig(**(SECTION.model_dump() | {"kind": "muon", "momentum": 0.9, "ns_steps": 2}))}


def on_mps(kind: str) -> tuple[GPT, torch.optim.Optimizer]:
    gpt = model()
    return gpt, optim.build(SECTIONS[kind], gpt, RATES, Parallel.single("mps"))  # its tensors stay here, its kernels are chosen for MPS


@pytest.mark.parametrize("kind", [*UNLIKE, "adamw on mps", "muon on mps"])
def test_an_update_is_skipped_whatever_the_optimizer_and_the_device(kind):
    """Neither weights nor what it keeps of them change, as if there had been no such step."""
    pairs = []
    for _ in range(2):
        if kind in UNLIKE:
            gpt = model()
            pairs.append((gpt, UNLIKE[kind](optim.param_groups(gpt, RATES))))
        else:
            pairs.append(on_mps(kind.split()[0]))
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    for gpt, optimizer in pairs:
        guard = optim.Guard(None, torch.device("cpu"), on_device=False)
        for loss in (2.0, math.nan, 2.0) if gpt is pairs[0][0] else (2.0, 2.0):
            gpt(ids, ids).backward()
            if math.isnan(loss):
                for parameter in gpt.parameters():
                    parameter.grad = torch.full_like(parameter, math.nan)
            assert bool(guard.skip(optimizer, torch.tensor(loss), torch.tensor(1.0))) == math.isnan(loss)
            optimizer.step()
            optimizer.zero_grad()
    (ours, first), (theirs, second) = pairs
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ours.blocks.parameters(), model().blocks.parameters(), strict=True))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        kept, expected = first.state[a], second.state[b]
        assert kept.keys() == expected.keys() and all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(expected[k])) for k in kept)


def test_on_mps_adamw_is_not_the_fused_one_which_takes_no_decision_there():
    for kind in ("adamw", "muon"):
        optimizer = on_mps(kind)[1]
        assert not any(group.get("fused") for group in optimizer.param_groups)
        assert not SECTIONS[kind].skips(torch.device("mps"))


def test_the_counters_of_an_unfused_adamw_stay_on_the_host_when_they_are_loaded():
    gpt = model()
    name, parameter = next(iter(gpt.named_parameters()))
    saved = {
        f"step.{name}": torch.tensor(3.0),
        f"exp_avg.{name}": torch.zeros_like(parameter),
        f"exp_avg_sq.{name}": torch.ones_like(parameter),
    }
    elsewhere = gpt.to("meta")  # any other device than the tensors'
    moved = optim.build(SECTION, elsewhere, RATES, Parallel.single("mps"))
    load_optimizer_tensors(elsewhere, moved, saved)
    state = moved.state[dict(elsewhere.named_parameters())[name]]
    assert (state["step"].device.type, state["exp_avg"].device.type) == ("cpu", "meta")
