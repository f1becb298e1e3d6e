"""Parameter groups and AdamW against torch's own textbook version."""

from __future__ import annotations

import torch

from picotrain import optim
from picotrain.config.schema import ModelConfig, OptimizerConfig
from picotrain.model import GPT
from picotrain.shape import Rates

RATES = Rates(matrix_lr=0.01, embed_lr=0.2, head_lr=0.004, weight_decay=0.1)
SECTION = OptimizerConfig(matrix_lr=1, embed_lr=1, head_lr=1, eps=1e-8)


def model(seed: int = 0) -> GPT:
    gpt = GPT(ModelConfig(depth=2, head_dim=16, width=32), 100, 16)
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
    gpt = GPT(ModelConfig(depth=2, head_dim=16, width=32, value_embeds=True, residual_scalars=True, smear=True), 100, 16)
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
