"""model.kind=llama: parity with Llama and Qwen3 of transformers, and all that training, evaluation and sampling rely on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines, losses, picotrain
from test_core import SINGLE, TEMPLATES, assert_equal, examples_of, reference, task_of, tokenizer  # noqa: F401
from test_eval_runs import bundle  # noqa: F401
from test_loop import weights
from test_model import ids_of
from torch import Tensor

from picotrain import hardware, optim
from picotrain import planning as plan
from picotrain.config import compose
from picotrain.config.identity import run_name
from picotrain.errors import ConfigError
from picotrain.evaluation import core
from picotrain.evaluation.scorer import DecoderScorer
from picotrain.model import KVCache, build, layers
from picotrain.models.llama import LlamaConfig, module
from picotrain.models.llama.module import Llama
from picotrain.planning import memory
from picotrain.shape import Rates

VOCAB, SEQ_LEN = 300, 32
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "rope_theta": 500.0},
    {"n_kv_heads": 1, "tie_embeddings": True, "norm_eps": 1e-3, "mlp_width": 96},
    {"n_kv_heads": 2, "qk_norm": True},
    {"width": 96, "qk_norm": True, "tie_embeddings": True},
]


def section(**config: Any) -> LlamaConfig:
    return LlamaConfig.model_validate({"depth": 3, "head_dim": 16, "width": 64} | config)


@torch.no_grad()
def acting(model: Llama) -> Llama:
    """The model with weights of which every one matters; fresh ones have zero matrices and a head near zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1, 0.3, generator=generator)
        else:
            parameter.normal_(0, 0.5 if name == "embed.weight" else 1.5 * parameter.size(-1) ** -0.5, generator=generator)
    return model


def small(vocab_size: int = VOCAB, seq_len: int = SEQ_LEN, dtype: torch.dtype = torch.float32, **config: Any) -> Llama:
    return acting(Llama(section(**config), vocab_size, seq_len, dtype))


# ---------------------------------------------------------------- parity with transformers


def their_name(name: str) -> str:
    """The name in transformers of one of our parameters."""
    if not name.startswith("blocks."):
        return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}[name]
    _, layer, part, *inner, _ = name.split(".")
    if part.endswith("_norm"):
        theirs = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}[part]
    else:
        theirs = f"{ {'attn': 'self_attn', 'mlp': 'mlp'}[part] }.{inner[0]}{'' if inner[0].endswith('_norm') else '_proj'}"
    return f"model.layers.{layer}.{theirs}.weight"


def theirs_of(ours: Llama, config: LlamaConfig) -> Any:
    """Llama of transformers, or Qwen3 where queries and keys are normed, with the same weights."""
    import transformers

    dims, name = ours.dims, "Qwen3" if config.qk_norm else "Llama"
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            vocab_size=ours.vocab_size,
            hidden_size=dims.width,
            intermediate_size=dims.mlp_width,
            num_hidden_layers=dims.depth,
            num_attention_heads=dims.n_heads,
            num_key_value_heads=dims.n_kv_heads,
            head_dim=dims.head_dim,
            max_position_embeddings=ours.seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
            attn_implementation="eager",
        )
    )
    state = {their_name(name): parameter.detach() for name, parameter in ours.named_parameters()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        state[table] = state[table][: ours.vocab_size]
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@torch.no_grad()
def difference(ours: Llama, config: LlamaConfig) -> float:
    """Largest absolute difference of the logits of two rows of 160 tokens, more than attention takes at once."""
    ids = ids_of(2, ours.seq_len)
    logits, expected = ours(ids), theirs_of(ours, config)(ids).logits
    assert logits.shape == expected.shape and expected.std() > 1
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_logits_are_those_of_transformers(config: dict[str, Any]):
    assert difference(small(seq_len=160, **config), section(**config)) < 1e-4


def test_parity_fails_where_a_definition_is_another(monkeypatch: pytest.MonkeyPatch):
    config: dict[str, Any] = {"n_kv_heads": 2, "qk_norm": True, "rope_theta": 500.0, "norm_eps": 1e-2}
    ours = small(seq_len=160, **config)
    assert difference(ours, section(**config)) < 1e-4
    assert difference(ours, section(**config | {"rope_theta": 501.0})) > 1e-3
    assert difference(ours, section(**config | {"norm_eps": 1.1e-2})) > 1e-3
    monkeypatch.setattr(module, "rotate", lambda x, cos, sin: layers.rotate(x, cos, -sin))  # the other way
    assert difference(ours, section(**config)) > 1e-2


# ---------------------------------------------------------------- cache and branches


@pytest.mark.parametrize("config", [*VARIANTS, {"window_pattern": "SSL", "n_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * SEQ_LEN, [5, 1, 20, 6]], ids=["one by one", "chunks"])
def test_decoding_with_a_cache_equals_the_full_forward(config: dict[str, Any], chunks: list[int]):
    model, ids = small(**config), ids_of(2, SEQ_LEN)
    cache = KVCache(model, batch=2, max_len=SEQ_LEN)
    with torch.no_grad():
        parts = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [VARIANTS[1] | {"window_pattern": "SSL"}, VARIANTS[-1]], ids=str)
@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_core_by_branches_from_common_beginnings_equals_full_forwards(tmp_path: Path, tokenizer: Any, config: dict[str, Any], kind: str):  # noqa: F811
    model = small(tokenizer.vocab_size, 96, **config)
    task = task_of(tmp_path, kind, examples_of(kind, 12), 2)
    found = core.evaluate_task(DecoderScorer(model, tokenizer), task, None, SINGLE)
    assert_equal(found, reference(model, tokenizer, task, 0, 96))


def test_a_position_does_not_see_later_tokens_nor_beyond_its_window():
    model, ids = small(window_pattern="SL"), ids_of(1, SEQ_LEN)
    assert model.windows == (16, 32, 32)
    later = ids.clone()
    later[:, 20:] = (later[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        a, b, full = model(ids), model(later), small()(ids)
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().amax(dim=-1).min() > 1e-2
    torch.testing.assert_close(a[:, :16], full[:, :16], rtol=0, atol=1e-4)
    assert (a[:, 16:] - full[:, 16:]).abs().max() > 1e-2


# ---------------------------------------------------------------- weights and precision


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_names_counts_and_groups_of_the_weights_are_those_that_are_planned(config: dict[str, Any]):
    model, planned = small(**config), section(**config).parameters(VOCAB)
    layer = ["attn_norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
    layer += ["attn.q_norm", "attn.k_norm"] if config.get("qk_norm") else []
    tied = config.get("tie_embeddings", False)
    expected = {"embed.weight", "norm.weight", *(f"blocks.{i}.{part}.weight" for i in range(3) for part in layer)}
    assert set(model.state_dict()) == expected | (set() if tied else {"head.weight"})
    assert model.num_parameters() == planned.total
    groups = {group["name"]: group for group in optim.param_groups(model, Rates(0.01, 0.2, 0.004, 0.1, scalar_lr=0.02))}
    counts = {"head": planned.head, "embed": planned.embedding, "scalars": planned.scalars, "matrices": planned.matrices}
    assert {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()} == {n: c for n, c in counts.items() if c}
    assert (groups["head"]["params"][0] is model.embed.weight) == tied
    assert groups["scalars"]["weight_decay"] == 0 and all(p.dim() == 1 for p in groups["scalars"]["params"])


def test_the_widths_that_are_left_open():
    assert section(width=None, depth=4, head_dim=64).dims().mlp_width == 704  # 8/3 x 256 = 682.7, in steps of 64
    assert section(width=None, depth=12, head_dim=128).dims().mlp_width == 2048
    assert section(width=None, depth=20, head_dim=128).dims().mlp_width == 3584  # 8/3 x 1,280 = 3,413.3, in steps of 256
    assert section(mlp_width=100).dims().mlp_width == 100
    for wrong, named in (({"width": 72}, "nearest: 64 or 80"), ({"n_kv_heads": 3}, "valid: 1, 2, 4")):
        with pytest.raises(ConfigError, match=named):
            compose(["model.kind=llama", *(f"model.{key}={value}" for key, value in ({"head_dim": 16, "width": 64} | wrong).items())])


@pytest.mark.parametrize("config", [{}, {"qk_norm": True}, {"tie_embeddings": True}], ids=str)
def test_fresh_weights_depend_on_the_seed_alone_and_guess(config: dict[str, Any]):
    a, b, other = (Llama(section(width=128, **config), 2048, SEQ_LEN) for _ in range(3))
    for model, seed in ((a, 5), (b, 5), (other, 6)):
        model.init_weights(seed)
        torch.rand(3)
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())
    assert not torch.equal(a.embed.weight, other.embed.weight)
    ids = ids_of(4, SEQ_LEN, 2048)
    loss = a(ids, ids_of(4, SEQ_LEN, 2048, seed=3))
    assert loss.item() == pytest.approx(math.log(2048), abs=0.02)
    for _ in range(2):  # o and down are zero at first; what stands before them learns after them
        a(ids, ids).backward()
        optim.build(compose([]).optimizer, a, Rates(0.1, 0.1, 0.1, 0, scalar_lr=0.1)).step()
    assert [name for name, parameter in a.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_weights_that_are_cast_once_give_the_same_numbers(config: dict[str, Any]):
    model, ids = small(dtype=torch.bfloat16, **config), ids_of(2, SEQ_LEN)
    with torch.no_grad():
        expected, cast = model(ids), model.cast()
        assert {p.dtype for p in model.parameters()} == {torch.float32} and cast.blocks[0].attn.q.weight.dtype == torch.bfloat16
        assert torch.equal(cast(ids), expected)
        assert cast.head_weight().dtype == torch.bfloat16
        assert torch.equal(model.to(torch.bfloat16)(ids), expected)


def gradients(model: Llama) -> dict[str, Tensor]:
    loss = model(ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3))
    named = dict(model.named_parameters())
    return {"loss": loss.detach()} | dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", VARIANTS[2:], ids=str)
def test_recomputing_gives_the_same_loss_and_gradients_to_the_bit(mode: Any, precision: str, config: dict[str, Any]):
    plain, less = (gradients(acting(build(section(**config), VOCAB, SEQ_LEN, precision, how))) for how in ("none", mode))
    assert [name for name in plain if not torch.equal(plain[name], less[name])] == []


def test_gradients_are_those_of_transformers():
    config = section(**VARIANTS[-1])
    ours = small(**VARIANTS[-1])
    found, theirs, ids = gradients(ours), theirs_of(ours, config), ids_of(2, SEQ_LEN)
    logits = theirs(ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_of(2, SEQ_LEN, seed=3).flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in found.items():
        if name != "loss":
            other = expected[their_name(name)]
            gradient = gradient[:VOCAB] if name == "embed.weight" else gradient  # a table that is embedding and head
            assert (gradient - other).abs().max() < 1e-4 * other.abs().max(), name


@pytest.mark.slow  # cold, compiling takes half a minute
@pytest.mark.filterwarnings("default")  # inductor's own
@pytest.mark.parametrize("config", [{"n_kv_heads": 2}, {"qk_norm": True, "tie_embeddings": True}], ids=str)
def test_compiled_blocks_give_the_same_gradients_and_share_their_code(config: dict[str, Any]):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = small(depth=10, **config)
    names, expected = list(model.state_dict()), gradients(model)
    model.compile_blocks()
    assert list(model.state_dict()) == names
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
    assert counters["stats"]["unique_graphs"] == 2  # all blocks, and the loss


# ---------------------------------------------------------------- plan


def test_a_tied_table_counts_once_and_as_the_head():
    words = ("data=pystdlib", "model=llama_d4", "hardware=cpu", "tokenizer.vocab_size=65536", "train.seq_len=32", "train.max_steps=1")
    own, tied = (plan.decide(compose([*words, f"model.tie_embeddings={value}"])) for value in ("false", "true"))
    table = 65536 * 256
    (_, apart, _, flops), (_, together, _, flops_tied) = memory.facts(own), memory.facts(tied)
    assert apart.total - together.total == table and apart.scaling == together.scaling and flops == flops_tied
    matrices = 4 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 704)
    assert flops == 6 * (matrices + table) + 4 * 12 * 256 * 32


def test_fp8_wants_an_mlp_that_sixteen_divides():
    words = ("data=pystdlib", "train.precision=fp8", "hardware=1xh100", "model=llama_d4")
    assert not any("mlp_width" in note for note in plan.make(plan.decide(compose(words)), "x").notes)
    with pytest.raises(ConfigError, match="nearest: 96 or 112"):
        plan.make(plan.decide(compose([*words, "model.mlp_width=100"])), "x")


@pytest.mark.parametrize("choice", ["llama_d4", "llama_d12"])
def test_a_preset_plans_and_its_run_is_named_for_it(choice: str):
    config = compose([f"model={choice}", "hardware=cpu", "data=pystdlib"])
    assert plan.make(plan.decide(config), "x").parameters["total"] == config.model.parameters(config.tokenizer.vocab_size).total
    assert run_name(config).startswith(f"{choice.replace('_', '-')}-pystdlib-")


def test_a_key_of_another_architecture_is_refused_with_words_that_can_be_given():
    with pytest.raises(ConfigError, match=r"qk_norm: is read for model.kind=llama only, and this is gpt \(add model.kind=llama\)"):
        compose(["model.qk_norm=true"])
    assert compose(["model.qk_norm=true", "model.kind=llama"]).model.kind == "llama"
    with pytest.raises(ConfigError, match="smear: is read for model.kind=gpt only"):
        compose(["model=llama_d4", "model.smear=true"])


# ---------------------------------------------------------------- runs


PLAIN = ("model.n_kv_heads=1", "train.precision=fp32")
OTHER = ("model.qk_norm=true", "model.tie_embeddings=true", "train.precision=bf16", "optimizer=muon", "hardware.recompute=selective")
slow_bf16 = pytest.mark.skipif(not hardware.cpu().fast_bf16, reason="bf16 is emulated on this CPU, hundreds of times slower")


@pytest.fixture(scope="module", params=[PLAIN, pytest.param(OTHER, marks=slow_bf16)], ids=" ".join)
def trained(request: pytest.FixtureRequest, tiny: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    run_dir = tmp_path_factory.mktemp("llama") / "run"
    often = [f"train.{what}=4" for what in ("eval_every", "save_every", "sample_every", "core_metric_every")]
    words = ("model.kind=llama", *request.param, "train.max_steps=8", *often, f"evaluation.core.bundle={bundle}")
    done = picotrain("train", *tiny(run_dir, *words))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_learns_and_resumes_to_the_bit(trained: Path, tmp_path: Path):
    found = losses(trained)
    assert found[0] == pytest.approx(math.log(300), abs=0.05) and found[-1] < found[0] - 0.1
    assert [record["evaluated"] for record in lines(trained, "core")] == [3, 3] and len(lines(trained, "sample")) == 2
    parted = tmp_path / "run"
    shutil.copytree(trained, parted)
    (parted / "summary.json").unlink()
    shutil.rmtree(parted / "checkpoints/step_00000008")
    again = picotrain("resume", str(parted))
    assert again.returncode == 0 and any(event["name"] == "resumed" for event in lines(parted, "event")), again.stderr
    assert losses(parted) == found
    ours, theirs = weights(parted), weights(trained)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("trained", [PLAIN], indirect=True, ids=" ".join)
def test_a_trained_model_is_sampled_and_evaluated(trained: Path):
    sampled, evaluated = picotrain("sample", str(trained), "the cat", "--max-tokens", "8"), picotrain("eval", str(trained))
    assert sampled.returncode == evaluated.returncode == 0, sampled.stderr + evaluated.stderr
    results = json.loads((trained / "eval/step_00000008/results.json").read_text())
    assert results["bpb"]["val"] == pytest.approx(lines(trained, "val")[-1]["val_bpb"], rel=0.05)  # the loop measures part of the shard
    assert results["core"]["core_metric"] == pytest.approx(lines(trained, "core")[-1]["core_metric"])
