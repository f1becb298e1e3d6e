"""`picotrain compare`: real tiny runs against each other, what is unfair about it, and pages that hold whatever text there is."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_corpus
from test_report import unpadded
from test_report_html import HOSTILE, Page, assert_harmless

from picotrain import hardware
from picotrain.cli import commands, main
from picotrain.cli.fairness import config_differences, loop_problem, warnings
from picotrain.config import load
from picotrain.evaluation import suite
from picotrain.evaluation.bundle import Task
from picotrain.evaluation.comparison import compare_core, compare_documents, confidence, verdict
from picotrain.evaluation.core import Prediction, TaskResult
from picotrain.evaluation.documents import DocumentScores
from picotrain.launch import launch
from picotrain.report import compare as pages

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before():
    """Training and loading set the number of threads of their process, which here is that of other tests, too."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small gain nothing from a second thread, and lose much where other tests run at the same time."""
    monkeypatch.setattr(hardware, "cores", lambda: 1)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `picotrain compare` in this process; its exit code and what it wrote."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["picotrain", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, unpadded(out), err

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """good and slow: trained 40 steps at two rates; new: almost untrained; other: another corpus, tokenizer and row length."""
    root = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(root / "corpus", documents=90, seed=1)
    own = (f"data.path={corpus}", "data.unit_bytes=2048", "tokenizer.vocab_size=280", "train.seq_len=16")
    wanted = {
        "good": ("train.max_steps=40", "train.save_every=20", "sampling.prompts=['the cat']"),
        "slow": ("train.max_steps=40", "optimizer.matrix_lr=0.002"),
        "new": ("train.max_steps=1",),
        "other": ("train.max_steps=1", "run.seed=5", *own),
    }
    for name, more in wanted.items():
        assert launch(lambda name=name, more=more: commands.new_run(tiny(root / name, *more, "train.eval_every=40"), None, None)) == 0
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of a kind each, of 30 examples; a fourth whose file is broken."""
    root = tmp_path_factory.mktemp("bundle")
    (root / "eval_data").mkdir()
    objects = ["the river", "two apples", "the gradient"]
    choice = [{"query": f"the cat sees{' ' * (i % 3)}", "choices": [*objects, "zq%xj"], "gold": i % 3} for i in range(30)]
    schema = [{"context_options": ["the loop", "zq%xj"], "continuation": "paints the river.", "gold": i % 2} for i in range(30)]
    words = [{"context": "a grey dog sees two", "continuation": "apples"} for _ in range(30)]
    tasks = {"choice": ("multiple_choice", choice), "schema": ("schema", schema), "words": ("language_modeling", words)}
    for name, (_, rows) in tasks.items():
        (root / f"eval_data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {name: kind for name, (kind, _) in tasks.items()} | {"broken": "schema"}
    entries = [
        {"label": name, "dataset_uri": f"{name}.jsonl", "num_fewshot": [0], "icl_task_type": kind, "continuation_delimiter": " "}
        for name, kind in kinds.items()
    ]
    (root / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (root / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\nschema,50\nwords,0\nbroken,50\n")
    return root


@pytest.fixture(scope="module")
def twin(runs: Path) -> Path:
    """good again, in another folder."""
    shutil.copytree(runs / "good", runs / "twin")
    return runs / "twin"


def test_a_model_differs_from_itself_by_no_more_than_the_noise(command: Command, runs: Path, twin: Path, bundle: Path):
    code, out, err = command(runs / "good", twin, "--bundle", bundle, "--max-per-task", 20)
    told = [line for line in err.splitlines() if not re.search(r": [\d,]+/[\d,]+|so far$", line)]  # how far it is, if it takes long
    assert code == 0 and all("reads text from" in line for line in told)
    assert out.startswith(
        "# good and twin\n\n**No larger than the noise.** The difference of twin from good is no larger than the noise: 0.0000 "
    )
    assert "the CORE of twin differs by no more than the noise (0.0000" in out
    assert "Nothing speaks against it." in out and "None: the configs are the same." in out
    assert "| all | 200 | " in out and "3 of 4 tasks" in out and "broken.jsonl cannot be read" in out


def test_a_trained_model_is_better_than_an_untrained_one_by_more(command: Command, runs: Path, bundle: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    code, out, err = command(runs / "new", runs / "good", "--bundle", bundle, "--html", page, "--documents", 50)
    assert code == 0 and f"written to {page}" in err
    assert "**Larger than the noise.** good is better than new by more than the noise: " in out
    assert "| train.max\\_steps | 1 | 40 |" in out or "| train.max_steps | 1 | 40 |" in out
    assert "new was trained on 256 tokens, good on 10.2k, a factor of 40." in out
    assert "50 documents (of 200, spread evenly)" in out
    found = Page(page.read_text(encoding="utf-8"))
    assert_harmless(found)
    assert "larger than the noise" in found.text and "CORE by task" in found.text and "Samples side by side" in found.text
    assert "h1" in {tag for tag, _ in found.tags}


def test_the_numbers_are_there_for_programs_and_are_those_of_the_page(command: Command, runs: Path, bundle: Path):
    code, out, _ = command(runs / "good", runs / "slow", f"{runs}/good@20", "--bundle", bundle, "--json")
    found = json.loads(out)
    assert code == 0 and [one["name"] for one in found["subjects"]] == ["good", "slow", "good@20"]
    assert [one["step"] for one in found["subjects"]] == [40, 40, 20]
    assert found["confidence"] == pytest.approx(0.975) and len(found["headline"]) == len(found["verdicts"]) == 2
    (row,) = found["bpb"]["rows"]
    first, slow, earlier = row["bpb"]
    assert first < earlier and first < slow and found["bpb"]["window"] == 32 and row["documents"] == 200
    assert row["differences"][0]["value"] == pytest.approx(slow - first)
    assert row["differences"][1]["low"] < earlier - first < row["differences"][1]["high"]
    assert found["verdicts"][1] == "larger"
    tasks = {task["label"]: task for task in found["core"]["tasks"]}
    assert tasks["choice"]["n"] == 30 and tasks["broken"]["accuracy"] == [None] * 3 and found["core"]["evaluated"] == 3
    centered = [task["centered"][0] for label, task in tasks.items() if label != "broken"]
    assert found["core"]["core_metric"][0] == pytest.approx(math.fsum(centered) / 3)
    assert [row["key"] for row in found["config"] if row["experiment"]] == ["optimizer.matrix_lr"]
    assert found["samples"]["prompts"] == ["the cat", ""] and all(len(texts) == 2 for texts in found["samples"]["texts"])


def test_tasks_that_were_measured_already_are_not_measured_again(
    command: Command, runs: Path, twin: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    original = suite.evaluate_task
    monkeypatch.setattr(
        suite, "evaluate_task", lambda scorer, task, *more, **named: asked.append(task.label) or original(scorer, task, *more, **named)
    )
    arguments = (twin, runs / "slow", "--bundle", bundle, "--max-per-task", 7, "--documents", 12, "--json")
    first = command(*arguments)
    assert sorted(asked) == sorted(["choice", "schema", "words", "broken"] * 2)
    assert (twin / "eval/step_00000040/tasks/choice.json").is_file()
    asked.clear()
    again = command(*arguments)
    assert asked == ["broken"] * 2 and again == first


def test_without_a_bundle_core_is_not_evaluated_and_never_zero(command: Command, runs: Path):
    code, out, _ = command(runs / "good", runs / "good" / "checkpoints" / "step_00000020", "--json")
    found = json.loads(out)
    assert code == 0 and "core_metric" not in found["core"] and "no bundle was given" in found["core"]["problem"]
    assert "CORE was not evaluated" in found["headline"][0]
    assert "Not evaluated: no bundle was given" in pages.markdown(found)
    assert found["subjects"][1]["name"] == "good@20"


def test_what_is_unfair_is_said(command: Command, runs: Path):
    code, out, _ = command(runs / "good", runs / "other")
    assert code == 0
    for words in (
        "The training data differ: good read 'files', other 'files', which is not the same text.",
        "The tokenizers of good and other differ",
        "good was trained on rows of 32 tokens, other of 16",
        "The validation shards of good and other differ",
        "other may have been trained on documents of good's validation shard",
        "in windows of 16 tokens",
        "no: different tokenizer and seq\\_len and validation text",
    ):
        assert words in out or words.replace("\\", "") in out, words
    assert "| vocabulary | 300 | 280 | no |" in out


def test_all_mistakes_come_at_once(command: Command, runs: Path, tmp_path: Path):
    good = runs / "good"
    code, out, err = command(
        good, runs / "nope", f"{good}@7", f"{good}@40", f"{good}@soon", tmp_path, "--html", tmp_path / "no" / "x.html", "--bundle", tmp_path
    )
    assert (code, out) == (2, "") and err.count("error:") == 1 and "Traceback" not in err
    assert "for 7 problems" in err
    for words in (
        "nope holds no run (no config.yaml); runs there: good, new, other, slow",
        "no checkpoint '7'; complete steps: 20, 40; or last, best",
        "no checkpoint 'soon'",
        f"{good}@40 and {good} are the same, step 40 of",
        "is in no folder that there is",
        "a bundle is a folder with core.yaml",
        f"{tmp_path} holds no run",
    ):
        assert words in err, words


@pytest.mark.parametrize("models", [["good"], ["good@best", "good"]])
def test_one_model_is_nothing_to_compare(command: Command, runs: Path, models: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs)
    code, _, err = command(*models)
    assert code == 2 and "nothing can be compared, for 1 problem" in err


def test_a_hugging_face_folder_stands_beside_a_run(command: Command, runs: Path, bundle: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from test_hf import save_tokenizer

    folder = tmp_path / "gpt2"
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 1}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, eos_token="<|eot|>")
    code, out, err = command(folder, runs / "good", "--bundle", bundle, "--max-per-task", 5, "--documents", 20, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [one["kind"] for one in found["subjects"]] == ["hf", "run"] and found["verdicts"] == ["larger"]
    assert found["bpb"]["window"] == 24 and found["bpb"]["text_of"] == "good" and found["bpb"]["rows"][0]["differences"][0]["value"] < 0
    assert found["subjects"][0]["parameters"] > 0 and found["subjects"][0]["vocab_size"] == 257
    assert any("may have been trained on the documents" in warning for warning in found["warnings"])
    assert "good" in pages.page(found)
    code, _, err = command(folder, folder)
    assert code == 2 and "are the same" in err and "none of these is a run" in err


# ---------------------------------------------------------------- numbers


def scores(bits: list[float], sizes: list[int] | None = None) -> DocumentScores:
    return DocumentScores(np.array(bits), np.array(sizes or [10] * len(bits)), np.array(sizes or [10] * len(bits)))


def test_origins_are_parts_of_the_whole_and_a_model_that_failed_has_no_figure():
    bits = [10.0 + i for i in range(24)]
    origins = ["web", "books"] * 12
    whole, books, web = compare_documents([scores(bits), scores([b - 1 for b in bits]), None], origins)
    assert [whole["origin"], books["origin"], web["origin"]] == ["", "books", "web"]
    assert whole["bpb"] == [pytest.approx(sum(bits) / 240), pytest.approx(sum(bits) / 240 - 0.1), None]
    assert whole["differences"] == [{"value": pytest.approx(-0.1), "low": pytest.approx(-0.1), "high": pytest.approx(-0.1)}, None]
    assert books["documents"] == web["documents"] == 12
    assert verdict(*whole["differences"][:1]) == "larger" and verdict(whole["differences"][1]) == "not known"
    (few,) = compare_documents([scores(bits[:3]), scores([b - 1 for b in bits[:3]])], ["", "", ""])
    assert few["differences"][0]["low"] is None and verdict(few["differences"][0]) == "not known"


def result(label: str, right: list[bool | None], problem: str = "") -> TaskResult:
    predictions = [Prediction(i, None if one is None else int(one), bool(one)) for i, one in enumerate(right)]
    known = None if problem else sum(bool(one) for one in right) / len(right)
    return TaskResult(label, len(right), known, known, 0.1, problem, predictions=predictions)


def test_core_counts_the_examples_that_all_answered_and_corrects_for_many_tasks():
    task = [Task(label, Path("x"), "schema", 0, " ", 0.5) for label in ("one", "two")]
    first = [result("one", [None, *[False] * 12]), result("two", [True, False] * 6)]
    other = [result("one", [True, *[True] * 12]), result("two", [True, False] * 6)]
    found = compare_core(task, [first, other])
    one, two = found["tasks"]
    assert one["n"] == 12 and one["accuracy"] == [0.0, 1.0] and one["centered"] == [-1.0, 1.0]
    (difference,) = one["differences"]
    assert (difference["only_first"], difference["only_other"]) == (0, 12)
    assert difference["p"] == pytest.approx(2 / 2**12) and difference["p_holm"] == pytest.approx(4 / 2**12)
    assert two["differences"][0]["p_holm"] == 1.0 and "error" not in difference
    assert found["core_metric"] == [-0.5, 0.5] and found["differences"][0]["value"] == pytest.approx(1.0)
    assert found["differences"][0]["low"] > 0.5


def test_a_task_that_one_could_not_finish_counts_for_nobody_and_a_model_that_finished_none_is_left_out():
    tasks = [Task(label, Path("x"), "schema", 0, " ", 0.0) for label in ("one", "two")]
    fine = [result("one", [True, False]), result("two", [True, True])]
    partly = [result("one", [True, False], "its losses are not finite"), result("two", [False, True])]
    nothing = [result("one", [None], "broken"), result("two", [None], "broken")]
    found = compare_core(tasks, [fine, partly, nothing])
    assert found["tasks"][0]["problem"] == "its losses are not finite" and found["tasks"][0]["accuracy"] == [None] * 3
    assert found["core_metric"] == [1.0, 0.5, None] and found["evaluated"] == 1
    assert found["differences"][0]["value"] == pytest.approx(-0.5) and found["differences"][1] is None
    empty = compare_core(tasks, [nothing, nothing])
    assert empty["core_metric"] == [None, None] and empty["differences"] == [None]


def test_more_comparisons_have_wider_intervals():
    assert [confidence(n) for n in (1, 2, 3, 6)] == pytest.approx([0.95, 0.95, 0.975, 0.99])


# ---------------------------------------------------------------- fairness


def facts(name: str, **changed: Any) -> dict[str, Any]:
    same = {
        "name": name, "kind": "run", "tokens": 1000, "seq_len": 32, "precision": "fp32", "val_bpb": 1.0, "eval_rows": 9, "corpus": "c",
        "corpus_fingerprint": "f", "train_shards": ["t"], "val_shards": ["v"], "tokenizer_fingerprint": "k", "vocab_size": 300,
    }  # fmt: skip
    return same | changed


def test_each_unfairness_has_its_warning_and_nothing_else_has():
    a = facts("a")
    assert warnings([a, facts("b")], a) == []
    for changed, words in (
        ({"precision": "bf16"}, ["a computes in fp32, b in bf16."]),
        ({"tokens": 4000}, ["a was trained on 1,000 tokens, b on 4,000, a factor of 4."]),
        ({"tokens": 0}, ["a was trained on 1,000 tokens, b on 0."]),
        ({"train_shards": ["v"], "val_shards": ["w"]}, ["The validation shards", "b was trained on the validation shard of a"]),
        ({"corpus": "d", "corpus_fingerprint": "g"}, ["The training data differ: a read 'c', b 'd'."]),
    ):
        found = warnings([a, facts("b", **changed)], a)
        assert len(found) == len(words) and all(text.startswith(word) for text, word in zip(found, words, strict=True)), found


def test_tokenizers_differ_only_where_that_is_known():
    def said(**changed: Any) -> str:
        return " ".join(warnings([facts("a"), facts("b", **changed)], facts("a")))

    assert "tokenizer" not in said() and "The tokenizers of a and b differ" in said(tokenizer_fingerprint="l")
    folder = {"kind": "hf", "tokenizer_fingerprint": None}
    assert "The tokenizers of a and b differ" in said(**folder, vocab_size=257)
    for unknown in (300, None):
        assert "same tokenizer is not known" in said(**folder, vocab_size=unknown) and "differ:" not in said(**folder, vocab_size=unknown)
    assert loop_problem(facts("a"), facts("b", tokenizer_fingerprint=None)).startswith("not known")


def test_the_loops_figures_compare_only_where_all_is_the_same():
    a = facts("a")
    assert loop_problem(a, facts("b")) == ""
    assert loop_problem(a, facts("b", seq_len=64, eval_rows=4)) == "no: different seq_len and number of validation rows"
    assert loop_problem(a, facts("b", val_bpb=None)) == "not measured"


def test_keys_that_make_the_experiment_come_first_and_names_do_not_count(runs: Path):
    a, b = load(runs / "good" / "config.yaml"), load(runs / "slow" / "config.yaml")
    found = config_differences([a, None, b])
    assert [(row["key"], row["experiment"]) for row in found] == [
        ("optimizer.matrix_lr", True),
        ("train.save_every", False),
        ("sampling.prompts", False),
    ]
    assert found[0]["values"] == [0.01, None, 0.002]


# ---------------------------------------------------------------- pages


def test_hostile_text_stays_text(command: Command, runs: Path):
    _, out, _ = command(runs / "good", runs / "new", "--documents", 20, "--json")
    found = json.loads(out)
    found["subjects"][0]["name"] = found["subjects"][1]["corpus"] = HOSTILE
    found["warnings"] = [HOSTILE]
    found["headline"] = [HOSTILE]
    found["samples"] |= {"prompts": [HOSTILE], "texts": [["```\n" + HOSTILE], [HOSTILE + "\x1b[31m"]]}
    found["config"] = [{"key": HOSTILE, "values": [HOSTILE, None], "experiment": True}]
    found["core"] = {"problem": HOSTILE}
    page = Page(pages.page(found))
    assert_harmless(page)
    assert HOSTILE in page.text and "\x1b" not in page.source
    text = pages.markdown(found)
    outside = "".join(part for i, part in enumerate(text.split("````")) if i % 2 == 0)
    assert "\x1b" not in text and "\\<script\\>" in outside


def test_runs_that_differ_in_their_seed_alone_show_what_chance_does(command: Command, runs: Path):
    _, out, _ = command(runs / "good", runs / "slow", "--documents", 20, "--json")
    found = json.loads(out)
    assert "only runs with several seeds tell" in pages.markdown(found)
    found["seeds_only"] = True
    assert "These runs differ in their seed alone" in pages.markdown(found)
    found["subjects"][1]["hardware_name"] = "another machine"
    assert "trained on different hardware" in pages.markdown(found)
