"""A Hugging Face folder goes through the same measures as a run, with the same figures for the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import nanochat_of
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from picotrain.errors import CheckpointError, ConfigError
from picotrain.evaluation import hf
from picotrain.evaluation.bundle import read_bundle
from picotrain.evaluation.core import evaluate_task
from picotrain.evaluation.documents import score_documents
from picotrain.evaluation.hf import HuggingFaceModel, read_context
from picotrain.evaluation.subject import RunModel
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.parallel import Parallel
from picotrain.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["the cat sees the river.", "naïve café 日本の本", "<|bos|>x<|eot|>", "two apples " * 12]
CONTEXT = 32


def save_tokenizer(folder: Path, **special: str) -> None:
    """UTF-8 bytes as tokens, and <|eot|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)} | {"<|eot|>": 256}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder, eos_token="<|eot|>")
    return folder


def test_documents_are_scored_as_transformers_itself_would(gpt2: Path):
    subject = HuggingFaceModel(gpt2)
    assert (subject.name, subject.bos_id, subject.seq_len, subject.vocab_size) == ("gpt2", 256, CONTEXT, 257)
    assert read_context(gpt2) == CONTEXT
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    assert subject.parameters == sum(weight.numel() for weight in model.parameters())
    found = score_documents(subject, TEXTS, 8, Parallel.single())
    for text, bits, tokens in zip(TEXTS, found.bits, found.tokens, strict=True):
        data, nats = text.encode(), 0.0
        order = [subject.encode([text])[0].tolist()[at : at + 8] for at in range(0, len(data), 8)]
        for ids in order:
            with torch.no_grad():
                logits = model(torch.tensor([[256, *ids]])).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        assert (bits, tokens) == (pytest.approx(nats / math.log(2), rel=1e-5), len(data))


def test_text_is_data_and_yields_no_special_token(gpt2: Path):
    (ids,) = HuggingFaceModel(gpt2).encode(["a<|eot|>b"])
    assert len(ids) == 9 and 256 not in ids
    assert HuggingFaceModel(gpt2).encode([]) == []


def test_batches_are_small_where_the_vocabulary_is_large(gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    assert HuggingFaceModel(gpt2).batch_tokens == HuggingFaceModel(gpt2).scorer.batch_tokens == 4096
    monkeypatch.setitem(hf.LOGITS_AT_ONCE, "cpu", 257 * 40)
    small = HuggingFaceModel(gpt2)
    assert small.batch_tokens == small.scorer.batch_tokens == 40


def test_samples_are_seeded_bounded_and_leave_the_random_state_alone(gpt2: Path):
    subject = HuggingFaceModel(gpt2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = [subject.complete("the cat", 10, 0.8, 50, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = subject.complete("the", 6, 0.0, None, 0)
    assert greedy == subject.complete("the", 6, 0.0, None, 1)
    assert isinstance(subject.complete("x" * 500, 100, 0.8, None, 0), str)  # more than the context, which has learned positions
    assert isinstance(subject.complete("", 100, 1.0, None, 0), str)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded by transformers"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no such thing"}'), "cannot be loaded by transformers"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "cannot be loaded by transformers"),
        (lambda folder: save_tokenizer(folder), "neither a beginning- nor an end-of-sequence token"),
    ],
)
def test_a_folder_that_holds_no_such_model_is_refused(gpt2: Path, tmp_path: Path, break_it: Any, message: str):
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceModel(tmp_path)


def test_without_transformers_it_says_what_to_install(gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"transformers is not installed \(pip install 'picotrain\[hf\]'\)"):
        HuggingFaceModel(gpt2)


def test_a_run_and_the_same_weights_as_a_folder_have_the_same_figures(tmp_path: Path):
    """NanoChat in transformers is this model."""
    config = GPTConfig(depth=2, width=32, head_dim=16)
    path = tmp_path / "tokenizer.json"
    train_tokenizer([Path(__file__).read_text()] * 3, 300, path)
    tokenizer = load_tokenizer(path)
    model = GPT(config, tokenizer.vocab_size, CONTEXT)
    model.init_weights(0)
    with torch.no_grad():
        for weight in model.parameters():  # fresh blocks are the identity
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.2)
    run = RunModel("run", model.eval(), tokenizer)
    folder = HuggingFaceModel(as_nanochat(model, config, tmp_path / "nano"))
    folder.encode = run.encode  # type: ignore[method-assign]
    folder.bos_id = folder.scorer.bos_id = run.bos_id
    folder.scorer._encode = lambda text: run.encode([text])[0].tolist()
    a, b = (score_documents(subject, TEXTS, CONTEXT, Parallel.single()) for subject in (run, folder))
    assert a.bits == pytest.approx(b.bits, rel=1e-4) and a.tokens.tolist() == b.tokens.tolist()
    (task,) = read_bundle(write_bundle(tmp_path / "bundle")).tasks
    own, theirs = (evaluate_task(subject.scorer, task, None, Parallel.single()) for subject in (run, folder))
    assert own.problem == theirs.problem == "" and own.predictions == theirs.predictions


def as_nanochat(model: GPT, config: GPTConfig, folder: Path) -> Path:
    nanochat_of(model, config).save_pretrained(folder)
    save_tokenizer(folder, bos_token="<|eot|>")
    return folder


def write_bundle(folder: Path) -> Path:
    rows = [
        {"query": f"the {word} sees", "choices": ["the river", "two apples", word], "gold": 0} for word in ("cat", "dog", "ship", "loop")
    ]
    (folder / "eval_data").mkdir(parents=True)
    (folder / "eval_data/t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"label": "t", "dataset_uri": "t.jsonl", "num_fewshot": [1], "icl_task_type": "multiple_choice"}
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,33.3\n")
    return folder
