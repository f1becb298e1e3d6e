"""picotrain from Python: what docs/api.md shows, typed in as it stands there, and what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import picotrain as command
from torch import nn

import picotrain

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")
SMALL = ["hardware=cpu", "hardware.threads=1", "train.seq_len=32", "train.total_batch_size=256", "train.eval_tokens=2048"]
SMALL += ["tokenizer.vocab_size=300", "sampling.max_tokens=2", "cadence=none"]


class Bigram(nn.Module):
    def __init__(self, vocab_size: int = 300, width: int = 16):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*words: str) -> picotrain.Config:
    return picotrain.compose("model=d2", "model.width=64", "model.head_dim=32", *SMALL, "train.max_steps=3", *words)


def test_the_names_are_exported_typed_and_cost_no_import_of_torch():
    code = (
        "import sys, picotrain; print(picotrain.__all__); picotrain.compose; print([m for m in ('torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = done.stdout.splitlines()
    functions = ("compose", "plan", "train", "load", "evaluate", "generate")
    assert all(repr(name) in names for name in functions) and heavy == "[]"
    assert all(callable(getattr(picotrain, name)) for name in picotrain.__all__)
    assert (Path(picotrain.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_pages_code_runs(tmp_path: Path):
    code = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)).replace(
        '"model=d2"', '"model=d2", "model.width=64", "model.head_dim=32"'
    )
    script = tmp_path / "page.py"
    script.write_text(code.replace("max_steps=20", "max_steps=3").replace("4096", "512").replace("65536", "2048"))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "finished 3 " in done.stdout and (tmp_path / "runs" / "bigram" / "report.html").is_file()


def test_training_is_that_of_the_command_and_goes_on(here: Path):
    trained = picotrain.train(config("run.name=ours"))
    assert (trained.status, trained.step, trained.summary["status"]) == ("finished", 3, "finished")
    words = ["model=d2", "model.width=64", "model.head_dim=32", *SMALL, "train.max_steps=3"]
    assert command("train", *words, "run.name=theirs").returncode == 0
    losses = [
        [line["loss"] for line in map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()) if line["kind"] == "train"]
        for name in ("ours", "theirs")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert picotrain.train(config("run.name=ours")).step == 3, "it is finished"
    assert picotrain.train(config("run.name=ours", "train.max_steps=5")).step == 5


def test_a_loaded_model_measures_and_writes_as_the_commands_say(here: Path):
    trained = picotrain.train(config("run.name=mine", "train.eval_every=3", "evaluation.bpb.device_batch_size=1"))
    found = picotrain.evaluate(trained.run, "last", tokens=2048)
    assert found["step"] == 3 and found["val_bpb"] == pytest.approx(trained.summary["final_val_bpb"], rel=1e-6)
    model, tokenizer = picotrain.load(trained.run, "last")
    assert not model.training
    texts = [picotrain.generate(model, tokenizer, "def", max_tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] and all(isinstance(text, str) for text in texts)


def test_a_module_of_the_users_own_trains_resumes_to_the_bit_and_is_loaded(here: Path):
    def trained(name: str, *horizons: int) -> dict[str, torch.Tensor]:
        for steps in horizons:
            torch.manual_seed(0)
            module = Bigram()
            before = module.mix.weight.detach().clone()
            done = picotrain.train(picotrain.compose(*SMALL, f"run.name={name}", f"train.max_steps={steps}", "schedule=constant"), module)
            assert not torch.equal(before, module.mix.weight), "the module itself was trained"
        loaded, _ = picotrain.load(done.run, "last", model=Bigram())
        assert sorted(loaded.state_dict()) == ["embed.weight", "head.weight", "mix.bias", "mix.weight"], "names stay"
        return dict(loaded.state_dict())

    whole, resumed = trained("whole", 6), trained("resumed", 2, 6)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    plan = json.loads(Path("runs/whole/plan.json").read_text())
    assert plan["parameters"] == {"embedding": 4800, "matrices": 256, "head": 4800, "scalars": 16, "total": 9872}
    again = command("resume", "runs/whole", "train.max_steps=9")
    assert again.returncode == 2 and "Bigram" in again.stderr and "model=" in again.stderr
    with pytest.raises(picotrain.PicotrainError):
        picotrain.load("runs/whole", "last", model=Bigram(width=8))


class Wrong(Bigram):
    def forward(self, ids: torch.Tensor):
        return super().forward(ids), None


class Looking(Bigram):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + x.mean(dim=1, keepdim=True))


class Counting(Bigram):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(ids)


NO_LANGUAGE_MODELS = {
    "no tensor": (Wrong, "tuple"),
    "no causality": (Looking, "later tokens"),
    "a smaller vocabulary": (lambda: Bigram(100), "every id below"),
    "no logits": (lambda: nn.Sequential(nn.Embedding(300, 32), nn.Flatten(), nn.Linear(32 * 32, 300)), "logits"),
    "nothing to train": (Counting, "train"),
}


@pytest.mark.parametrize("name", NO_LANGUAGE_MODELS)
def test_a_module_that_is_no_language_model_is_refused_before_anything_is_made(name: str, here: Path):
    make, told = NO_LANGUAGE_MODELS[name]
    module = make()
    with pytest.raises(picotrain.ConfigError) as refused:
        picotrain.train(picotrain.compose(*SMALL, "run.name=no"), module)
    (problem,) = refused.value.problems
    assert told in problem.message and type(module).__name__ in problem.message
    assert not Path("runs").exists()
    assert not isinstance(module, Counting) or not module.calls, "the module is as it was"


def test_muon_refuses_a_module_without_matrices_in_words(here: Path):
    module = nn.Sequential(nn.Embedding(300, 16), nn.Linear(16, 300))
    with pytest.raises(picotrain.ConfigError, match="muon works on matrices"):
        picotrain.train(picotrain.compose(*SMALL, "optimizer=muon", "train.max_steps=1"), module)


def test_mistakes_are_raised_with_all_their_problems(here: Path):
    with pytest.raises(picotrain.ConfigError) as refused:
        picotrain.compose("model=d5", "train.seqlen=3")
    assert [problem.path for problem in refused.value.problems] == ["model=d5", "train.seqlen"]
    with pytest.raises(picotrain.ConfigError) as refused:
        picotrain.train(config("hardware.nproc_per_node=2"), Bigram())
    assert refused.value.problems[0].path == "hardware.nproc_per_node"
    with pytest.raises(picotrain.PicotrainError):
        picotrain.load("runs/none")
