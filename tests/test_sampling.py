"""Sampling: the right ids with the cache, reproducible, without touching training, and as whole characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from picotrain import sampling
from picotrain.config.schema import SamplingConfig
from picotrain.model import KVCache
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.sampling import Sample, complete, generate, generate_rows, next_ids, stream_text

BOS_ID = 256
VOCAB = 257  # one id a byte, and <|bos|>; the model pads to 320
SEQ_LEN = 16


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model whose logits differ clearly from context to context."""
    gpt = GPT(GPTConfig(depth=2, head_dim=16, width=32), VOCAB, SEQ_LEN)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.normal_(0, 1.0 if name == "embed.weight" else 3 / math.sqrt(parameter.size(1)), generator=generator)
        gpt.head.weight[VOCAB:] = 100.0  # padding that would win, were it not cut off
    return gpt


class Bytes:
    """A tokenizer with one id for each byte."""

    bos_id = BOS_ID
    vocab_size = VOCAB

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


def greedy_without_cache(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """What `generate` must yield at temperature 0, by its definition: the whole context read anew for each token."""
    ids, first = list(prompt), 0
    for _ in range(max_tokens):
        context = ids if first == 0 else [ids[0], *ids[first:]]
        if len(context) > model.seq_len:
            first = len(ids) - model.seq_len // 2
            context = [ids[0], *ids[first:]]
        with torch.no_grad():
            ids.append(int(model(torch.tensor([context]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("prompt_tokens", [1, 5, SEQ_LEN, SEQ_LEN + 5], ids=["bos only", "short", "full", "too long"])
def test_greedy_ids_are_those_of_full_forwards_also_beyond_the_context(model, prompt_tokens):
    prompt = [BOS_ID, *range(40, 40 + prompt_tokens - 1)]
    ids = list(generate(model, prompt, max_tokens=3 * SEQ_LEN, temperature=0, top_k=None, seed=0))
    assert ids == greedy_without_cache(model, prompt, 3 * SEQ_LEN)
    assert len(set(ids)) > 3  # not one id for ever


def test_rows_of_a_batch_are_generated_as_if_alone(model):
    prompts = torch.tensor([[BOS_ID, 1, 2], [BOS_ID, 70, 80], [BOS_ID, 9, 9]])
    rows = torch.stack(list(generate_rows(model, prompts, 10, temperature=0, top_k=None, seed=0)), dim=1)
    for prompt, row in zip(prompts.tolist(), rows.tolist(), strict=True):
        assert row == list(generate(model, prompt, 10, temperature=0, top_k=None, seed=0))


def test_one_candidate_is_greedy_whatever_the_temperature(model):
    greedy = list(generate(model, [BOS_ID], 10, temperature=0, top_k=None, seed=0))
    assert list(generate(model, [BOS_ID], 10, temperature=5.0, top_k=1, seed=3)) == greedy


def test_the_seed_alone_decides_and_training_randomness_is_untouched(model):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [BOS_ID], 30, temperature=2.0, top_k=None, seed=seed))

    state = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert draw(1) == first
    assert draw(2) != first


def test_the_padding_of_the_vocabulary_is_never_drawn(model):
    prompts = torch.full((64, 1), BOS_ID)
    rows = torch.stack(list(generate_rows(model, prompts, 15, temperature=50.0, top_k=None, seed=0)))
    assert int(rows.max()) < VOCAB
    assert int(rows.max()) > 200  # nearly uniform draws reach the end of the vocabulary


def test_draws_follow_the_softmax_at_the_temperature():
    logits, temperature, draws = torch.tensor([2.0, 1.0, 0.0, -1.0]), 0.7, 40_000
    ids = next_ids(logits.expand(draws, -1), temperature, None, torch.Generator().manual_seed(0))
    expected = (logits / temperature).softmax(dim=0)
    assert torch.allclose(ids.bincount(minlength=4) / draws, expected, atol=4 * 0.5 / math.sqrt(draws))


def test_draws_are_among_the_top_k_in_their_proportion():
    logits, draws = torch.tensor([0.0, 3.0, -1.0, 2.0]), 40_000
    ids = next_ids(logits.expand(draws, -1), 1.0, 2, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {1, 3}
    assert float((ids == 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=4 * 0.5 / math.sqrt(draws))
    wide = next_ids(logits.expand(100, -1), 1.0, 50, torch.Generator().manual_seed(0))  # more candidates than ids
    assert len(set(wide.tolist())) > 2


def test_generation_ends_before_the_stop_id(model):
    ids = list(generate(model, [BOS_ID], 30, temperature=2.0, top_k=None, seed=1))
    stop = ids[7]
    assert list(generate(model, [BOS_ID], 30, temperature=2.0, top_k=None, seed=1, stop_id=stop)) == ids[: ids.index(stop)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_and_its_gradients_stay_as_they_are(model, training):
    model.train(training)
    list(generate(model, [BOS_ID], 3, temperature=1.0, top_k=5, seed=0))
    assert model.training is training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("default")  # inductor's own
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_was_cast_once_gives_the_same_logits_and_leaves_the_weights_alone(compiled):
    features = {"residual_scalars": True, "smear": True, "value_embeds": True, "window_pattern": "SL"}
    trained = GPT(GPTConfig(depth=2, head_dim=16, width=32, **features), VOCAB, SEQ_LEN, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    ids = torch.randint(VOCAB, (2, SEQ_LEN), generator=generator)
    trained(ids, ids).backward()
    if compiled:
        trained.compile_blocks()
    cast = trained.cast()
    with torch.no_grad():
        expected, found = (one(ids, cache=KVCache(one, 2, SEQ_LEN)) for one in (trained, cast))
    assert torch.equal(expected, found)
    assert cast.head.weight.dtype == torch.bfloat16
    assert cast.residual_scalars.stream is trained.residual_scalars.stream
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert all(weight.grad is not None for weight in trained.blocks.parameters())


def test_a_caller_that_reads_token_by_token_keeps_its_threads(model):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream = generate(model, [BOS_ID], 3, temperature=0, top_k=None, seed=0)
        next(stream)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_caller_that_reads_token_by_token_keeps_its_own_gradient_mode(model):
    stream = generate(model, [BOS_ID], 3, temperature=0, top_k=None, seed=0)
    next(stream)
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- text


def scripted(monkeypatch: pytest.MonkeyPatch, written: bytes) -> list[list[int]]:
    """Let the model write these bytes; the prompts it was given."""
    prompts = []

    def fake(model: object, prompt_ids: list[int], *args: object, **options: object) -> Iterator[int]:
        prompts.append(list(prompt_ids))
        yield from written

    monkeypatch.setattr(sampling, "generate", fake)
    return prompts


def test_pieces_of_text_are_whole_characters(monkeypatch):
    scripted(monkeypatch, "aé€😀z".encode())
    assert list(stream_text(None, Bytes(), "", SamplingConfig(), seed=0)) == ["a", "é", "€", "😀", "z"]


@pytest.mark.parametrize(("written", "text"), [(b"a\xf0\x9f\x98", "a\ufffd"), (b"a\xe2\x82b", "a\ufffdb"), (b"\x80\xff", "\ufffd\ufffd")])
def test_bytes_that_are_no_character_show_as_replacement_characters(monkeypatch, written, text):
    scripted(monkeypatch, written)
    assert "".join(stream_text(None, Bytes(), "", SamplingConfig(), seed=0)) == text == written.decode(errors="replace")


def test_a_prompt_follows_bos_and_an_empty_one_is_bos_alone(monkeypatch):
    prompts = scripted(monkeypatch, b"!")
    assert complete(None, Bytes(), ("ab", ""), SamplingConfig(), seed=0) == [Sample("ab", "!"), Sample("", "!")]
    assert prompts == [[BOS_ID, 97, 98], [BOS_ID]]


def test_samples_do_not_depend_on_the_prompts_beside_them(model):
    options = SamplingConfig(max_tokens=12, temperature=1.5, top_k=None)
    both = complete(model, Bytes(), ("first", "second"), options, seed=3)
    assert complete(model, Bytes(), ("other", "second"), options, seed=3)[1] == both[1]
    assert complete(model, Bytes(), ("first",), options, seed=3) == both[:1]
    first, second = complete(model, Bytes(), ("", ""), options, seed=3)
    assert first != second  # the same prompt twice gives two samples
    assert complete(model, Bytes(), (), options, seed=3) == []


def test_text_ends_where_the_model_begins_another_document(monkeypatch):
    """The model writes b"hi" and then <|bos|> and more."""
    script = [*b"hi", BOS_ID, *b"no"]

    def fake_rows(*args: object) -> Iterator[Tensor]:
        yield from (torch.tensor([id]) for id in script)

    monkeypatch.setattr(sampling, "generate_rows", fake_rows)
    stub = SimpleNamespace(device="cpu")
    assert "".join(stream_text(stub, Bytes(), "", SamplingConfig(), seed=0)) == "hi"
