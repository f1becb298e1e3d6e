"""CORE against a plain implementation, one example at a time, with prompts by Jinja templates as the reference renders them."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jinja2 import Template

from picotrain.evaluation import core
from picotrain.evaluation.bundle import Example, LanguageModeling, Task, read_bundle, read_examples
from picotrain.evaluation.prompts import Option, Prompts, choose, shots_of
from picotrain.evaluation.scorer import DecoderScorer, LogitsScorer
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.parallel import Parallel
from picotrain.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval_bundle"
SEQ_LEN = 96
REAL_TASKS = ["copa", "piqa", "winograd", "lambada_openai", "bigbench_repeat_copy_logic", "bigbench_language_identification"]
WORDS = ["tin", "silver", "", " old", "new\n", "the cat", "Ümit", "日本", "{{ x }}", "two  apples", "<|bos|>", "a", "ab", "<b>&amp;"]

# What nanochat's templates say, with the blanks that its `{%- -%}` remove already gone.
SHOTS = "{% for e in shots %}{{ RIGHT }}\n\n{% endfor %}"
TEMPLATES = {
    "multiple_choice": SHOTS.replace("RIGHT", "e.query }}{{ d }}{{ e.choices[e.gold]") + "{{ item.query }}{{ d }}{{ option }}",
    "schema": SHOTS.replace("RIGHT", "e.context_options[e.gold] }}{{ d }}{{ e.continuation") + "{{ option }}{{ d }}{{ item.continuation }}",
    "language_modeling": SHOTS.replace("RIGHT", "e.context | trim }}{{ d }}{{ e.continuation")
    + "{{ item.context | trim }}{{ d }}{{ option }}",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors this small gain nothing from a second thread, and lose much where other tests run at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [Path(__file__).read_text(), (Path(__file__).parent / "test_bundle.py").read_text()]
    train_tokenizer(texts * 2, 600, path)
    return load_tokenizer(path)


FEATURES = {"value_embeds": True, "residual_scalars": True, "smear": True, "qk_scale": 1.4}


def build(vocab_size: int, seq_len: int = SEQ_LEN, **options: Any) -> GPT:
    """A model of which every part matters: fresh weights have zero matrices and a head near zero."""
    config = GPTConfig(**{"depth": 3, "width": 64, "head_dim": 16, **options})
    model = GPT(config, vocab_size, seq_len)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("head.weight", "smear.strength", "smear.gate.weight") or name.endswith(
                (".o.weight", ".down.weight", "_gate.weight")
            ):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.size(-1) ** -0.5)
    return model


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return build(tokenizer.vocab_size)


def examples_of(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))) or "x"

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        if kind == "multiple_choice":
            choices = [text(1, 8) for _ in range(rng.randint(2, 4))]
            rows.append({"query": text(1, 12), "choices": [*choices, choices[0]], "gold": rng.randrange(len(choices))})
        elif kind == "schema":
            begin = text(1, 8)
            rows.append({"context_options": [f"{begin} {text(1, 4)}", f"{begin} {text(1, 4)}"], "continuation": text(1, 6), "gold": 1})
        else:
            rows.append({"context": text(1, 12) + rng.choice(["", " ", "\n"]), "continuation": text(1, 3)})
    return rows


def task_of(folder: Path, kind: str, rows: Sequence[dict[str, Any]], shots: int = 0, delimiter: str = " ", baseline: float = 0.0) -> Task:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(f"{kind}_{shots}", path, kind, shots, delimiter, baseline)


def reference(model: GPT, tokenizer: Tokenizer, task: Task, max_per_task: int, seq_len: int) -> list[tuple[Any, float]]:
    """The prediction for each example and the margin that it was made by."""
    examples = [json.loads(line) for line in task.path.read_text().splitlines()]
    random.Random(1337).shuffle(examples)
    examples = examples[:max_per_task] if max_per_task > 0 else examples
    return [reference_example(model, tokenizer, examples, index, task, seq_len) for index in range(len(examples))]


def reference_prompts(examples: list[dict[str, Any]], index: int, task: Task) -> list[str]:
    others = [i for i in range(len(examples)) if i != index]
    shots = [examples[i] for i in random.Random(1234 + index).sample(others, min(task.num_fewshot, len(others)))]
    item = examples[index]
    options = item.get("choices") or item.get("context_options") or ["", item["continuation"]]
    template = Template(TEMPLATES[task.kind])
    prompts = [template.render(shots=shots, item=item, d=task.delimiter, option=option) for option in options]
    return [prompts[0].strip(), prompts[1]] if task.kind == "language_modeling" else prompts


@torch.no_grad()
def reference_example(
    model: GPT, tokenizer: Tokenizer, examples: list[dict[str, Any]], index: int, task: Task, seq_len: int
) -> tuple[Any, float]:
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in reference_prompts(examples, index, task)]
    if task.kind == "schema":
        shared = next((i for i in range(min(map(len, ids))) if len({one[-1 - i] for one in ids}) > 1), min(map(len, ids)))
        starts = [len(one) - shared for one in ids]
    else:
        shared = next((i for i in range(min(map(len, ids))) if len({one[i] for one in ids}) > 1), min(map(len, ids)))
        starts = [shared] * len(ids)
    if task.kind == "language_modeling":
        ids, starts = ids[1:], starts[1:]
    losses, greedy, gaps = [], [], []
    for one, start in zip(ids, starts, strict=True):
        start = max(1, start - max(0, len(one) - seq_len))
        one = one[-seq_len:]
        logits = model(torch.tensor([one]))[0]  # (T, V)
        span = slice(start - 1, len(one) - 1)
        loss = F.cross_entropy(logits[span], torch.tensor(one[start:], dtype=torch.long), reduction="none")
        losses.append(loss.mean().item() if len(loss) else math.inf)
        greedy.append(logits[span].argmax(-1).tolist())
        top = logits[span].topk(2).values
        gaps.append((top[:, 0] - top[:, 1]).min().item() if len(loss) else 0.0)
    if task.kind == "language_modeling":
        return greedy[0], gaps[0]
    best, second = sorted(set(losses))[:2] if len(set(losses)) > 1 else (losses[0], math.inf)
    return losses.index(best), second - best


def assert_equal(result: core.TaskResult, expected: Sequence[tuple[Any, float]]) -> None:
    assert result.problem == "" and result.traceback == ""
    assert [one.index for one in result.predictions] == list(range(len(expected)))
    differing = [(one, answer) for one, answer in zip(result.predictions, expected, strict=True) if one.prediction != answer[0]]
    assert all(margin < 1e-5 for _, (_, margin) in differing), differing
    assert len(differing) <= 1


SINGLE = Parallel.single()


@pytest.mark.parametrize("kind", list(TEMPLATES))
@pytest.mark.parametrize(("shots", "delimiter"), [(0, " "), (3, "\nAnswer: "), (50, "")])
def test_prompts_are_those_of_the_templates(tmp_path: Path, kind: str, shots: int, delimiter: str):
    task = task_of(tmp_path, kind, examples_of(kind, 30), shots, delimiter)
    rows = [json.loads(line) for line in task.path.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    chosen = choose(read_examples(task), 20)
    prompts = Prompts(chosen, shots, delimiter)
    for index in range(20):
        assert prompts.texts(index) == reference_prompts(rows[:20], index, task)


@pytest.mark.parametrize("shots", [0, 1, 10, 39, 60])
def test_shots_are_drawn_as_from_a_list_without_the_example(shots: int):
    for index in range(40):
        others = [i for i in range(40) if i != index]
        assert shots_of(index, 40, shots) == random.Random(1234 + index).sample(others, min(shots, 39))
    assert shots_of(0, 1, 5) == []


def test_examples_are_shuffled_then_cut():
    examples: list[Example] = [LanguageModeling(context=str(i), continuation="x") for i in range(20)]
    order = list(range(20))
    random.Random(1337).shuffle(order)
    for limit, count in ((5, 5), (50, 20), (0, 20), (-1, 20), (None, 20)):
        assert [one.context for one in choose(examples, limit) if isinstance(one, LanguageModeling)] == [str(i) for i in order][:count]


@pytest.mark.parametrize("kind", list(TEMPLATES))
@pytest.mark.parametrize("shots", [0, 2, 6])
@pytest.mark.parametrize("batch_tokens", [1, 400])
def test_predictions_equal_the_plain_ones(tmp_path: Path, model: GPT, tokenizer: Tokenizer, kind: str, shots: int, batch_tokens: int):
    task = task_of(tmp_path, kind, examples_of(kind, 40), shots)
    result = core.evaluate_task(DecoderScorer(model, tokenizer, batch_tokens), task, 32, SINGLE)
    assert_equal(result, reference(model, tokenizer, task, 32, SEQ_LEN))
    assert result.truncated == 0 if shots == 0 else result.truncated > 5 or shots == 2  # both sides of the cut are tried
    assert len({str(one.prediction) for one in result.predictions}) > 1 or kind == "schema"


@pytest.mark.parametrize("options", [{"window_pattern": "SSL"}, {"n_kv_heads": 2}, {"logit_softcap": None}, FEATURES])
@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_predictions_equal_the_plain_ones_for_every_kind_of_model(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], kind: str):
    model = build(tokenizer.vocab_size, **options)
    task = task_of(tmp_path, kind, examples_of(kind, 16), 2)
    assert_equal(core.evaluate_task(DecoderScorer(model, tokenizer), task, None, SINGLE), reference(model, tokenizer, task, 0, SEQ_LEN))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation bundle is not here")
@pytest.mark.parametrize("label", REAL_TASKS)
def test_predictions_equal_the_plain_ones_on_real_tasks(tokenizer: Tokenizer, label: str):
    model = build(tokenizer.vocab_size, 256)
    task = next(task for task in read_bundle(SHARED).tasks if task.label == label)
    assert_equal(core.evaluate_task(DecoderScorer(model, tokenizer), task, 12, SINGLE), reference(model, tokenizer, task, 12, 256))


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_any_function_from_ids_to_logits_is_scored_alike(tmp_path: Path, model: GPT, tokenizer: Tokenizer, kind: str):
    task = task_of(tmp_path, kind, examples_of(kind, 24), 2)
    plain = LogitsScorer(model, tokenizer.encode, tokenizer.bos_id, SEQ_LEN)
    expected = core.evaluate_task(DecoderScorer(model, tokenizer), task, None, SINGLE)
    assert core.evaluate_task(plain, task, None, SINGLE) == expected


def test_losses_of_options_are_means_over_their_spans(model: GPT, tokenizer: Tokenizer):
    ids = np.arange(5, 25)
    longer = np.concatenate((ids, [7, 8, 9]))
    scores = DecoderScorer(model, tokenizer).score([[Option(ids, 12), Option(longer, 12), Option(ids, len(ids))], [Option(longer, 1)]])
    for score, option in zip((*scores[0][:2], scores[1][0]), (Option(ids, 12), Option(longer, 12), Option(longer, 1)), strict=True):
        logits = model(torch.from_numpy(option.ids)[None])[0].detach()
        targets = torch.from_numpy(option.ids[option.start :])
        expected = F.cross_entropy(logits[option.start - 1 : -1], targets).item()
        assert score.loss == pytest.approx(expected, rel=1e-5)
        assert list(score.greedy) == logits[option.start - 1 : -1].argmax(-1).tolist()
    assert scores[0][2].loss == math.inf and scores[0][2].greedy == ()


class Letters:
    """A scorer of which everything is known: a token a character, the loss of a token is its code."""

    seq_len: int | None = None
    bos_id, batch_tokens = 0, 8

    def __init__(self, loss: dict[str, float] | None = None):
        self.loss, self.batches = loss or {}, 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([ord(char) for char in text], dtype=np.int64) for text in texts]

    def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Any]]:
        from picotrain.evaluation.scorer import EMPTY, Score

        self.batches += 1
        return [[EMPTY if o.empty else self._score(o, Score) for o in options] for options in questions]

    def _score(self, option: Option, score: Any) -> Any:
        losses = [self.loss.get(chr(id), float(id)) for id in option.ids[option.start :]]
        return score(sum(losses) / len(losses), tuple(map(int, option.ids[option.start :])))


def choice(*choices: str, gold: int = 0, query: str = "q") -> dict[str, Any]:
    return {"query": query, "choices": list(choices), "gold": gold}


def test_the_first_of_equal_choices_is_chosen_and_an_empty_span_never(tmp_path: Path):
    """ "b" is a token-prefix of both others in the second: the reference computes NaN for it."""
    rows = [choice("x", "a", "a"), choice("b", "bz", "by"), choice("y", "yz")]
    task = task_of(tmp_path, "multiple_choice", rows)
    result = core.evaluate_task(Letters(), task, None, SINGLE)
    order = [rows.index(example.model_dump()) for example in choose(read_examples(task), None)]
    assert {order[one.index]: one.prediction for one in result.predictions} == {0: 1, 1: 2, 2: 1}
    assert result.empty == 2 and result.nonfinite == 0 and result.problem == ""


def test_identical_choices_have_identical_scores(model: GPT, tokenizer: Tokenizer):
    ids = np.arange(3, 40)
    other = np.concatenate((ids[:-4], ids[:6]))
    (scores,) = DecoderScorer(model, tokenizer).score([[Option(ids, 20), Option(other, 20), Option(ids.copy(), 20)]])
    assert scores[0] == scores[2] != scores[1]


def test_contexts_that_do_not_differ_are_scored_from_the_second_token(tmp_path: Path):
    row = {"context_options": ["same", "same"], "continuation": "x", "gold": 0}
    result = core.evaluate_task(Letters(), task_of(tmp_path, "schema", [row]), None, SINGLE)
    assert [(one.prediction, one.correct) for one in result.predictions] == [(0, True)]


def test_a_prompt_that_is_no_prefix_of_prompt_and_continuation_is_scored_from_where_they_part_and_counted(tmp_path: Path):
    task = task_of(
        tmp_path, "language_modeling", [{"context": "", "continuation": " b"}, {"context": "a", "continuation": "b"}], delimiter=" "
    )
    questions = []
    prompts = Prompts(choose(read_examples(task), None), 0, " ")
    for index in range(2):
        questions.append(prompts.question(index, Letters().encode(prompts.texts(index)), 0, None))
    assert [question.unclean for question in questions] == [False, False]
    joined = prompts.question(0, [np.array([1, 2, 3]), np.array([1, 9, 4])], 0, None)  # a token spans the boundary
    assert joined.unclean and joined.options[0].start == 2
    assert core.evaluate_task(Letters(), task, None, SINGLE).accuracy == 1.0


@pytest.mark.parametrize(("seq_len", "start", "kept"), [(10, 4, 6), (4, 2, 4), (2, 1, 2), (1, 1, 1)])
def test_truncation_keeps_the_last_tokens_and_clamps_the_span(seq_len: int, start: int, kept: int):
    prompts = Prompts([LanguageModeling(context="abc", continuation="de")], 0, "")
    question = prompts.question(0, Letters().encode(["abc", "abcde"]), 0, seq_len)
    (option,) = question.options
    assert option.ids.tolist() == [0, *map(ord, "abcde")][-kept:]
    assert option.start == start and question.truncated == (seq_len < 6)


def test_losses_that_are_not_finite_are_no_prediction(tmp_path: Path, model: GPT, tokenizer: Tokenizer):
    rows = [choice("a", "n"), choice("n", "a"), choice("a", "b")]
    result = core.evaluate_task(Letters({"n": math.nan}), task_of(tmp_path, "multiple_choice", rows), None, SINGLE)
    assert result.nonfinite == 2 and result.accuracy is None and result.centered is None
    assert "2 of 3 examples are not finite" in result.problem
    assert sorted(str(one.prediction) for one in result.predictions) == ["0", "None", "None"]
    broken = build(tokenizer.vocab_size)
    torch.nn.init.constant_(broken.head.weight, math.nan)
    for kind in TEMPLATES:
        result = core.evaluate_task(DecoderScorer(broken, tokenizer), task_of(tmp_path, kind, examples_of(kind, 5)), None, SINGLE)
        assert result.nonfinite == 5 and result.accuracy is None
        assert not any(one.correct for one in result.predictions)


def test_scores_are_centred_and_a_failed_task_is_left_out_of_the_mean(tmp_path: Path):
    (tmp_path / "eval_data").mkdir()
    labels = ("right", "half", "broken", "absent")
    entries = [f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}}" for label in labels]
    (tmp_path / "core.yaml").write_text("icl_tasks:\n" + "\n".join(entries))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nright,25\nhalf,40\nbroken,50\nabsent,50\n")
    for label, rows in {"right": [choice("a", "b")] * 3, "half": [choice("a", "b"), choice("b", "a")], "broken": []}.items():
        (tmp_path / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle = read_bundle(tmp_path)
    results = [core.evaluate_task(Letters(), task, 100, SINGLE) for task in bundle.tasks[:3]]
    results = [core.TaskResult.from_dict(json.loads(json.dumps(result.as_dict()))) for result in results]
    found = core.summary(bundle, results, 100)
    assert found.tasks["right"] == {"n": 3, "accuracy": 1.0, "centered": 1.0, "stderr": 0.0}
    assert found.tasks["half"] == pytest.approx({"n": 2, "accuracy": 0.5, "centered": (0.5 - 0.4) / 0.6, "stderr": math.sqrt(0.25 / 2)})
    assert found.tasks["broken"]["accuracy"] is None and "holds no examples" in found.problems["broken"]
    assert found.problems["absent"] == "it was not evaluated"
    assert found.core_metric == pytest.approx((1 + 1 / 6) / 2)
    assert (found.evaluated, found.of) == (2, 4) and "mean over 2 of 4 tasks" in str(found)
    assert found.baseline_table.startswith("eval_meta_data.csv (sha256 ")
    assert core.summary(bundle, [], None).core_metric is None


def test_a_bug_costs_its_task_and_keeps_its_traceback(tmp_path: Path):
    class Buggy(Letters):
        def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Any]]:
            raise IndexError("off by one")

    result = core.evaluate_task(Buggy(), task_of(tmp_path, "multiple_choice", [choice("a", "b")]), None, SINGLE)
    assert result.problem == "IndexError: off by one" and "in score" in result.traceback
    assert result.accuracy is None


class Short(DecoderScorer):
    """Out of memory for more than `room` questions at once."""

    room, failed = 3, 0

    def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Any]]:
        if len(questions) > self.room:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().score(questions)


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_batch_that_memory_does_not_hold_is_tried_in_halves_and_further_ones_are_smaller(tmp_path, model, tokenizer, kind):
    task = task_of(tmp_path, kind, examples_of(kind, 60), 2)
    scorer, plenty = Short(model, tokenizer, 2000), DecoderScorer(model, tokenizer, 2000)
    assert core.evaluate_task(scorer, task, None, SINGLE) == core.evaluate_task(plenty, task, None, SINGLE)
    assert 0 < scorer.failed < 10 and scorer.batch_tokens < 2000 == plenty.batch_tokens
    scorer.room = 0  # not even one
    result = core.evaluate_task(scorer, task, None, SINGLE)
    assert result.accuracy is None and "CUDA out of memory" in result.problem


def test_progress_and_giving_up_between_batches(tmp_path: Path):
    task = task_of(tmp_path, "multiple_choice", [choice("a", "b", query="q" * i) for i in range(1, 20)])
    seen: list[tuple[str, int, int]] = []
    scorer = Letters()
    result = core.evaluate_task(scorer, task, None, SINGLE, lambda: scorer.batches == 3, lambda *at: seen.append(at))
    assert result.given_up and result.accuracy is None and "given up after" in result.problem
    assert scorer.batches == 3 and seen[0] == (task.label, 0, 19) and seen[-1][1] == len(result.predictions) < 19
    core.evaluate_task(scorer, task, None, SINGLE, progress=lambda *at: seen.append(at))
    assert seen[-1] == (task.label, 19, 19)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_every_example_once_and_evenly(ranks: int):
    rng = random.Random(0)
    sizes = [int(rng.uniform(100, 4000)) for _ in range(1000)]
    shares = [core.share_of(sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(i for share in shares for i in share) == list(range(1000))
    for cost in (lambda n: n, lambda n: n * n, lambda n: min(n, 512)):
        costs = [sum(cost(sizes[i]) for i in share) for share in shares]
        assert max(costs) < 1.06 * min(costs)


RANK_SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, os.environ["TEST_DIR"])
import torch
import test_core as t
from picotrain import parallel as p
torch.set_num_threads(1)
ranks = p.build("cpu")
tokenizer = t.load_tokenizer(Path(os.environ["TOKENIZER"]))
scorer = t.DecoderScorer(t.build(tokenizer.vocab_size), tokenizer, 300)
found = []
for kind in t.TEMPLATES:
    task = t.Task(kind, Path(os.environ["TASKS"]) / f"{kind}.jsonl", kind, 2, " ", 0.0)
    found.append(t.core.evaluate_task(scorer, task, None, ranks).as_dict())
missing = replace(task, path=task.path if ranks.rank == 0 else Path("absent"))
found.append(t.core.evaluate_task(scorer, missing, None, ranks).as_dict())
if ranks.rank == 1:
    scorer.score = lambda questions: 1 / 0
found.append(t.core.evaluate_task(scorer, task, None, ranks).as_dict())
found.append(t.core.evaluate_task(t.Letters(), task, None, ranks, should_stop=lambda: ranks.rank == 1).as_dict())
ranks.teardown()
print(json.dumps(found), flush=True)
os._exit(0)  # as a rank does, see picotrain.ranks
"""


def test_two_ranks_find_what_one_finds_and_one_that_fails_is_reported_by_both(tmp_path: Path, model: GPT, tokenizer: Tokenizer):
    tasks = [task_of(tmp_path, kind, examples_of(kind, 21), 2) for kind in TEMPLATES]
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
    }
    shared |= {"TOKENIZER": str(tokenizer.path), "TASKS": str(tmp_path)}
    command = [sys.executable, "-c", RANK_SCRIPT]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output) for output in outputs)
    assert first == second
    *whole, missing, raised, given_up = (core.TaskResult.from_dict(values) for values in first)
    for task, result in zip(tasks, whole, strict=True):
        assert replace(result, label=task.label) == core.evaluate_task(DecoderScorer(model, tokenizer), task, None, SINGLE)
    assert missing.problem.startswith("rank 1: absent cannot be read") and missing.accuracy is None
    assert raised.problem == "rank 1: ZeroDivisionError: division by zero" and "ZeroDivisionError" in raised.traceback
    assert len(raised.predictions) in (10, 11)  # of rank 0
    assert given_up.given_up and "given up after 11 of 21" in given_up.problem
