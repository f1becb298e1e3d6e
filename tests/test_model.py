"""The model: parity with NanoChat of transformers, and what training, evaluation and sampling rely on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picotrain.model import KVCache, attention_mask, rms_norm, rotate
from picotrain.model import loss as loss_module
from picotrain.model.compiling import set_up_compiler
from picotrain.models.gpt import GPTConfig, attention, module
from picotrain.models.gpt.module import GPT

VOCAB = 300  # no multiple of 64: the last 20 of 320 rows are padding
SEQ_LEN = 32


def small(depth: int = 2, vocab_size: int = VOCAB, seq_len: int = SEQ_LEN, dtype: torch.dtype = torch.float32, **config: object) -> GPT:
    """A model all of whose weights act: redrawn so that attention is sharp and logits reach the soft-cap."""
    model = GPT(GPTConfig.model_validate({"depth": depth, "head_dim": 16, "width": 64} | config), vocab_size, seq_len, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if name == "embed.weight" else (10 if name == "head.weight" else 2) / math.sqrt(parameter.size(-1))
            parameter.normal_(0, std, generator=generator)
    return model


def ids_of(batch: int, tokens: int, vocab_size: int = VOCAB, seed: int = 2) -> Tensor:
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def all_weights_acting(gpt: GPT) -> GPT:
    """The model with every weight drawn at random: the initial zeros would hide what a layer does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in gpt.parameters():
        parameter.normal_(0, 0.1, generator=generator)
    return gpt


# ---------------------------------------------------------------- parity with transformers


def nanochat_name(name: str) -> str:
    """The name in transformers of one of our parameters."""
    if not name.startswith("blocks."):
        return {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[name]
    _, layer, part, matrix, _ = name.split(".")
    theirs = {"attn": f"self_attn.{matrix}_proj", "mlp": {"up": "mlp.fc1", "down": "mlp.fc2"}.get(matrix)}[part]
    return f"model.layers.{layer}.{theirs}.weight"


def nanochat_of(ours: GPT, config: GPTConfig):
    """NanoChat of transformers with the same weights."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    dims = ours.dims
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=ours.vocab_size,
            hidden_size=dims.width,
            intermediate_size=dims.mlp_width,
            num_hidden_layers=dims.depth,
            num_attention_heads=dims.n_heads,
            num_key_value_heads=dims.n_kv_heads,
            max_position_embeddings=ours.seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            final_logit_softcapping=config.logit_softcap,
            attn_implementation="eager",
        )
    )
    state = {nanochat_name(name): parameter.detach() for name, parameter in ours.named_parameters()}
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        state[table] = state[table][: ours.vocab_size]
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


class Parity:
    """Our model and transformers', with a record of what enters the norms of queries and keys.

    A rotation does not change the length of a head, so that "rotate, then norm" and "norm, then rotate" are the same
    function but for rounding: no logits tell them apart. What enters the norm does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, head_dim: int = 64, n_kv_heads: int | None = None):
        self.monkeypatch = monkeypatch
        config = GPTConfig(depth=2, head_dim=head_dim, width=4 * head_dim, n_kv_heads=n_kv_heads, norm_eps=1e-5, rope_theta=5000.0)
        self.ours = small(seq_len=256, **config.model_dump())
        self.theirs = nanochat_of(self.ours, config)
        self.ids = ids_of(2, self.ours.seq_len)
        self.norm: Callable[[Tensor, float], Tensor] = rms_norm  # our norm, or a mutation of it

    @torch.no_grad()
    def differences(self) -> tuple[float, float]:
        """Largest absolute difference of the logits, and of what enters the norms of queries and keys."""
        our_heads: list[Tensor] = []
        their_heads: list[Tensor] = []

        def spy(x: Tensor, eps: float) -> Tensor:
            if x.dim() == 4:  # heads (B, T, H, D), not hidden states (B, T, C)
                our_heads.append(x)
            return self.norm(x, eps)

        self.monkeypatch.setattr(attention, "rms_norm", spy)
        self.monkeypatch.setattr(module, "rms_norm", spy)
        for layer in self.theirs.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.register_forward_hook(lambda module, inputs, output: their_heads.append(inputs[0].transpose(1, 2)))
        logits, reference = self.ours(self.ids), self.theirs(self.ids).logits
        assert logits.shape == reference.shape
        assert reference.std() >= 3
        assert reference.abs().max() > 14  # the soft-cap of 15 acts
        assert len(our_heads) == len(their_heads) == 4
        heads = max(float((a - b).abs().max()) for a, b in zip(our_heads, their_heads, strict=True))
        return float((logits - reference).abs().max()), heads


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_logits_are_those_of_nanochat_in_transformers(monkeypatch, head_dim, n_kv_heads):
    logits, heads = Parity(monkeypatch, head_dim, n_kv_heads).differences()
    assert logits < 1e-4
    assert heads < 1e-4


def test_parity_fails_when_rope_and_norm_are_swapped(monkeypatch):
    parity, angles = Parity(monkeypatch), []
    monkeypatch.setattr(attention, "rotate", lambda x, cos, sin: (angles.append((cos, sin)), x)[1])
    parity.norm = lambda x, eps: rotate(rms_norm(x, eps), *angles[-1]) if x.dim() == 4 else rms_norm(x, eps)
    logits, heads = parity.differences()
    assert heads > 1e-2
    assert logits < 1e-4  # the same function, as `Parity` says


def test_parity_fails_without_the_softcap(monkeypatch):
    parity = Parity(monkeypatch)
    parity.ours.logit_softcap = None
    assert parity.differences()[0] > 1e-2


def test_parity_fails_when_the_rotation_turns_the_other_way(monkeypatch):
    parity = Parity(monkeypatch)
    monkeypatch.setattr(attention, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    assert parity.differences()[0] > 1e-2


def test_parity_fails_when_neighbours_are_rotated_instead_of_halves(monkeypatch):
    def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-1).flatten(-2)

    parity = Parity(monkeypatch)
    monkeypatch.setattr(attention, "rotate", interleaved)
    assert parity.differences()[0] > 1e-2


def test_parity_fails_without_the_norm_of_queries_and_keys(monkeypatch):
    parity = Parity(monkeypatch)
    parity.norm = lambda x, eps: x if x.dim() == 4 else rms_norm(x, eps)
    assert parity.differences()[0] > 1e-2


def test_parity_fails_without_the_norm_after_the_embedding(monkeypatch):
    parity = Parity(monkeypatch)
    parity.ours.embed.weight.data *= 3
    parity.theirs.model.embed_tokens.weight.data *= 3
    calls = []
    parity.norm = lambda x, eps: rms_norm(x, eps) if calls else (calls.append(1), x)[1]
    assert parity.differences()[0] > 1e-2


# ---------------------------------------------------------------- what a position sees


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_a_position_does_not_see_later_tokens(pattern):
    model, ids = small(window_pattern=pattern), ids_of(2, SEQ_LEN)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().amax(dim=-1).min() > 1e-2


def test_a_window_limits_what_a_position_sees():
    model, ids = small(depth=2), ids_of(1, SEQ_LEN)
    model.windows = (4, 4)  # each layer looks back 3 tokens, both together 6
    query = 20

    def effect_of(position: int) -> float:
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        with torch.no_grad():
            return float((model(changed)[:, query] - model(ids)[:, query]).abs().max())

    assert effect_of(query - 7) < 1e-5
    assert effect_of(query - 6) > 1e-3


def test_the_window_pattern_of_the_config_reaches_the_layers():
    ids = ids_of(1, SEQ_LEN)
    assert small(depth=3, window_pattern="SL").windows == (SEQ_LEN // 2, SEQ_LEN, SEQ_LEN)
    with torch.no_grad():
        full, windowed = small(depth=3)(ids), small(depth=3, window_pattern="SL")(ids)
    half = SEQ_LEN // 2
    torch.testing.assert_close(full[:, :half], windowed[:, :half], rtol=0, atol=1e-4)
    assert (full[:, half:] - windowed[:, half:]).abs().amax(dim=-1).min() > 1e-3


def test_a_mask_shows_a_query_itself_and_the_window_before_it():
    mask = attention_mask(start=3, tokens=2, window=3, device=torch.device("cpu"))
    assert mask is not None
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


# ---------------------------------------------------------------- cache


FEATURES = {"value_embeds": True, "residual_scalars": True, "smear": True, "qk_scale": 1.4}


@pytest.mark.parametrize(
    "config", [{}, {"n_kv_heads": 1}, {"window_pattern": "SL"}, {"n_kv_heads": 2, "window_pattern": "SSSL"}, {"n_kv_heads": 2} | FEATURES]
)
@pytest.mark.parametrize("chunks", [[1] * SEQ_LEN, [10] + [1] * 22, [5, 1, 20, 6]], ids=["one by one", "prefill", "chunks"])
def test_decoding_with_a_cache_equals_the_full_forward(config, chunks):
    model, ids = small(depth=4, **config), ids_of(2, SEQ_LEN)
    cache = KVCache(model, batch=2, max_len=SEQ_LEN)
    with torch.no_grad():
        parts = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
        assert cache.length == SEQ_LEN
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("feature", [{key: value} for key, value in FEATURES.items()])
def test_each_feature_changes_the_model_and_no_position_sees_later_tokens(feature):
    model, ids = small(**feature), ids_of(2, SEQ_LEN)
    plain, changed = small(), ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()})
        a, b = model(ids), model(changed)
        assert (a - plain(ids)).abs().max() > 1e-2
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().amax(dim=-1).min() > 1e-2


def test_fresh_features_count_as_planned_and_all_but_value_embeddings_and_scale_begin_as_the_plain_model():
    config = GPTConfig(depth=4, head_dim=16, width=64, **FEATURES)
    model = GPT(config, VOCAB, SEQ_LEN)
    model.init_weights(0)
    planned = config.parameters(VOCAB)
    assert model.num_parameters() == planned.total
    assert planned.value_embeds == 2 * 320 * 64 and planned.scalars == 2 * 4 + 32 + 1
    plain = GPT(GPTConfig(depth=4, head_dim=16, width=64), VOCAB, SEQ_LEN)
    plain.init_weights(0)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    ids = ids_of(1, SEQ_LEN)
    with torch.no_grad():  # o and down are zero: only the residual stream counts, which the last norm rescales
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-5)


def test_a_cleared_cache_starts_anew():
    model, ids = small(), ids_of(1, 8)
    cache = KVCache(model, batch=1, max_len=8)
    with torch.no_grad():
        first = model(ids, cache=cache)
        cache.clear()
        assert torch.equal(model(ids, cache=cache), first)


def test_last_only_gives_the_logits_of_the_last_position():
    model, ids = small(), ids_of(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=0, atol=1e-5)


def test_more_tokens_than_there_is_room_for_are_refused():
    model = small()
    with pytest.raises(ValueError, match="33 tokens, but there is room for 32"):
        model(ids_of(1, SEQ_LEN + 1))
    with pytest.raises(ValueError, match="9 tokens, but there is room for 8"):
        model(ids_of(1, 9), cache=KVCache(model, batch=1, max_len=8))
    with pytest.raises(ValueError, match="a cache of 33 tokens for a model of 32"):
        KVCache(model, batch=1, max_len=SEQ_LEN + 1)


# ---------------------------------------------------------------- loss


def reference_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss by its definition, from the logits, by autograd."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("softcap", [15.0, 60.0, 100.0, 1000.0, None])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_the_loss_and_its_gradients_are_those_of_the_definition(monkeypatch, softcap, chunk_tokens):
    monkeypatch.setitem(loss_module.LOGIT_CHUNK_BYTES, "cpu", 4 * 320 * chunk_tokens)
    model, ids, targets = small(logit_softcap=softcap), ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    targets[:, ::5] = -1  # ignored
    loss, expected = model(ids, targets), reference_loss(model, ids, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected_gradients = gradients(model, expected)
    for name, gradient in gradients(model, 3 * loss).items():
        reference = 3 * expected_gradients[name]
        assert (gradient - reference).abs().max() < 1e-4 * reference.abs().max(), name


@pytest.mark.parametrize("softcap", [1.0, 15.0, 60.0, 61.0, 1000.0, None])
@pytest.mark.parametrize("logit", [0.0, 2000.0, -2000.0])
def test_the_loss_of_equal_logits_is_that_of_a_guess_however_they_are_capped(softcap, logit):
    losses, slopes, totals = loss_module.losses_and_slopes(torch.full((2, 64), logit), torch.tensor([1, 2]), softcap, 50)
    torch.testing.assert_close(losses, torch.full((2,), math.log(50)), rtol=1e-5, atol=1e-4)
    assert torch.isfinite(slopes / totals).all()


def test_losses_without_reduction_average_to_the_mean():
    model, ids, targets = small(), ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    targets[0, :10] = -1
    with torch.no_grad():
        losses, mean = model(ids, targets, reduction="none"), model(ids, targets)
    assert losses.shape == targets.shape
    assert (losses[targets == -1] == 0).all()
    torch.testing.assert_close(losses[targets >= 0].mean(), mean)
    torch.testing.assert_close(mean, model(ids, targets).detach())  # with and without gradients


def test_a_batch_without_targets_has_loss_and_gradients_of_zero():
    model, ids = small(), ids_of(1, 8)
    loss = model(ids, torch.full_like(ids, -1))
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_the_padding_of_the_vocabulary_has_no_probability_and_learns_nothing():
    model, ids, targets = small(), ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    loss = model(ids, targets)
    with torch.no_grad():
        model.head.weight[VOCAB:] = 100.0
        assert model.head.weight.size(0) == 320
        assert model(ids).shape[-1] == VOCAB
    assert torch.equal(model(ids, targets), loss)
    assert not gradients(model, model(ids, targets))["head.weight"][VOCAB:].any()


# ---------------------------------------------------------------- weights and precision


def test_parameter_names_are_those_of_a_checkpoint():
    layer = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    expected = {"embed.weight", "head.weight", *(f"blocks.{i}.{matrix}.weight" for i in range(3) for matrix in layer)}
    model = small(depth=3)
    assert {name for name, _ in model.named_parameters()} == expected
    assert set(model.state_dict()) == expected  # cos and sin are made, not saved
    assert model.num_parameters() == sum(t.numel() for t in model.state_dict().values())


def test_initial_weights_have_the_documented_distributions():
    model = GPT(GPTConfig(depth=2, head_dim=64, width=256), 2048, SEQ_LEN)
    model.init_weights(seed=0)
    for name, weight in model.state_dict().items():
        if name.endswith(("attn.o.weight", "mlp.down.weight")):
            assert not weight.any(), name
            continue
        std = {"embed.weight": 1.0, "head.weight": 0.001}.get(name, 256**-0.5)
        assert float(weight.std()) == pytest.approx(std, rel=0.02), name
        if name.startswith("blocks."):
            assert float(weight.abs().max()) == pytest.approx(math.sqrt(3) * std, rel=0.01), name  # uniform
    with torch.no_grad():
        loss = model(ids_of(2, SEQ_LEN, 2048), ids_of(2, SEQ_LEN, 2048, seed=3))
    assert float(loss) == pytest.approx(math.log(2048), abs=0.01)


def test_initial_weights_depend_on_the_seed_alone():
    a, b, c = small(), small(), small()
    random_state = torch.get_rng_state()
    a.init_weights(seed=5)
    torch.rand(3)
    b.init_weights(seed=5)
    c.init_weights(seed=6)
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())
    assert not torch.equal(a.embed.weight, c.embed.weight)
    torch.set_rng_state(random_state)
    small().init_weights(seed=7)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_initial_weights_are_the_same_on_a_gpu():
    a, b = small(), small().cuda()
    a.init_weights(seed=5)
    b.init_weights(seed=5)
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name].cpu()) for name in a.state_dict())


def test_every_weight_learns_once_it_is_not_zero():
    model, ids, targets = small(n_kv_heads=2, window_pattern="SL"), ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    model.init_weights(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    for name, gradient in gradients(model, model(ids, targets)).items():
        assert gradient.dtype == torch.float32
        assert float(gradient.abs().max()) > 1e-6, name


def test_bf16_computes_close_to_fp32_over_fp32_weights():
    ids, targets = ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    model, reference = small(dtype=torch.bfloat16), small()
    with torch.no_grad():  # milder weights: sharp attention turns rounding into other choices
        for parameter in (*model.blocks.parameters(), *reference.blocks.parameters()):
            parameter *= 0.25
    loss, expected = model(ids, targets), reference(ids, targets)
    ours, theirs = gradients(model, loss), gradients(reference, expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    with torch.no_grad():
        logits = model(ids)
        assert logits.dtype == torch.float32
        assert (logits - reference(ids)).abs().max() > 1e-4  # it is not fp32
    for name in theirs:
        assert ours[name].dtype == torch.float32
        cosine = F.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0)
        assert float(cosine) > 0.98, name


def test_for_inference_the_weights_may_be_cast_once():
    model, ids = small(dtype=torch.bfloat16), ids_of(2, SEQ_LEN)
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(model.to(torch.bfloat16)(ids), expected)


# ---------------------------------------------------------------- compilation


def test_the_compiler_is_set_up_as_far_as_the_environment_leaves_it_open(monkeypatch):
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    key = "autograd_cache_allow_custom_autograd_functions"
    with functorch.patch({key: False}), inductor.patch({"cpp.vec_isa_ok": None}):
        monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "")
        set_up_compiler()
        assert getattr(functorch, key) and inductor.cpp.vec_isa_ok is None


@pytest.mark.slow  # cold, compiling takes half a minute
@pytest.mark.filterwarnings("default")  # inductor's own
@pytest.mark.parametrize(("pattern", "codes"), [("L", 1), ("SL", 2)])
def test_compiled_blocks_give_the_same_losses_and_share_their_code(pattern, codes):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, ids, targets = small(depth=10, window_pattern=pattern), ids_of(2, SEQ_LEN), ids_of(2, SEQ_LEN, seed=3)
    names = list(model.state_dict())
    expected = model(ids, targets)
    expected_gradients = gradients(model, expected)
    with torch.no_grad():
        decoded = model(ids[:, :4], cache=KVCache(model, batch=2, max_len=8))

    model.compile_blocks()
    assert list(model.state_dict()) == names
    loss = model(ids, targets)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4 * float(expected_gradients[name].abs().max()))
    assert counters["stats"]["unique_graphs"] == codes + 1  # windowed and full blocks, and the loss
    assert not counters["aot_autograd"]["autograd_cache_bypass"]  # all of it is kept for the next start

    model(ids, targets)
    with torch.no_grad():
        for _ in range(2):  # with a cache nothing is compiled
            torch.testing.assert_close(model(ids[:, :4], cache=KVCache(model, batch=2, max_len=8)), decoded)
    assert counters["stats"]["unique_graphs"] == codes + 1
