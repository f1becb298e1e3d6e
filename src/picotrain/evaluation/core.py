"""The CORE metric (DCLM, arXiv:2406.11794): accuracy on the tasks of a bundle, each centred on its random baseline.

    results = [evaluate_task(scorer, task, max_per_task, parallel) for task in bundle.tasks]
    core = summary(bundle, results, max_per_task)

Predictions are those of nanochat's core_eval. Multiple choice and schema: the option with the lowest mean loss over its
span, the first of equal ones. Language modelling: right when each token of the continuation is the likeliest one. What
the reference leaves open is defined here:

* An option whose span is empty is never chosen. Its tokens are the first ones of every other option. The reference computes NaN for
  it, and then chooses by the order of the options.
* A loss that is not finite makes its example one without a prediction, and its task one without an accuracy.
* A prompt that is no token-prefix of prompt and continuation: see `Prompts.question`; counted as `unclean`.

Ranks share the examples of a task and meet once, when all are done. A rank that raised or gave up brings that instead of
predictions. So nobody waits for it, and every rank returns the same result.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from picotrain.errors import PicotrainError
from picotrain.evaluation.bundle import Bundle, Task, read_examples
from picotrain.evaluation.prompts import Prompts, Question, choose
from picotrain.evaluation.scorer import Score, Scorer
from picotrain.parallel import Parallel, free_memory, out_of_memory

PREPARED = 512  # examples that are tokenized at a time, and sorted into batches


@dataclass(frozen=True)
class Prediction:
    """What a model answered. index: place of the example in its task, in the order of `choose`. prediction: the option that was chosen, or
    the likeliest tokens; None where a loss was not finite, or every span is empty."""

    index: int
    prediction: int | list[int] | None
    correct: bool


@dataclass(frozen=True)
class TaskResult:
    """A task on `n` examples. accuracy, its centred value (accuracy - b) / (1 - b) and its standard error are None where the task was not
    evaluated. Then `problem` says why, and `traceback` shows where, if that was a bug.

    nonfinite: examples with a loss that is not finite. empty: examples with a choice whose span is empty. unclean and truncated: see
    `Question`. given_up: the evaluation was stopped, and this result counts for nothing.
    """

    label: str
    n: int = 0
    accuracy: float | None = None
    centered: float | None = None
    stderr: float | None = None
    problem: str = ""
    traceback: str = ""
    nonfinite: int = 0
    empty: int = 0
    unclean: int = 0
    truncated: int = 0
    given_up: bool = False
    predictions: list[Prediction] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` gives back an equal result."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskResult:
        """What `as_dict` gave, after JSON: an evaluation that was interrupted goes on with the next task."""
        fields: dict[str, Any] = {**values, "predictions": [Prediction(**one) for one in values["predictions"]]}
        return cls(**fields)


@dataclass(frozen=True)
class Core:
    """core_metric: the mean of the centred accuracies of the `evaluated` ones of `of` tasks, None where there are none.
    problems: by task, why it was not evaluated."""

    core_metric: float | None
    bundle: str
    baseline_table: str
    max_per_task: int | None
    evaluated: int
    of: int
    tasks: dict[str, dict[str, Any]]  # n, accuracy, centered, stderr
    problems: dict[str, str]

    def __str__(self) -> str:
        value = "not evaluated" if self.core_metric is None else f"{self.core_metric:.4f}"
        return f"CORE {value}" + ("" if self.evaluated == self.of else f" (mean over {self.evaluated} of {self.of} tasks)")


@dataclass
class _Share:
    """What one rank found in its share of a task."""

    predictions: list[tuple[int, int | list[int] | None, bool]] = field(default_factory=list)
    n: int = 0  # examples of the whole task
    nonfinite: int = 0
    empty: int = 0
    unclean: int = 0
    truncated: int = 0
    given_up: bool = False
    problem: str = ""
    traceback: str = ""


def evaluate_task(
    scorer: Scorer,
    task: Task,
    max_per_task: int | None,
    parallel: Parallel,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> TaskResult:
    """Evaluate one task on all ranks; every rank calls it and gets the same result.

    max_per_task: examples at most; None or <= 0 means all. should_stop is asked between batches, progress told (label,
    examples done, examples in all) of this rank's share. What goes wrong with the task, a bug included, is in the result and
    not raised.
    """
    share = _Share()
    try:
        _evaluate_share(share, scorer, task, max_per_task, parallel, should_stop, progress)
    except PicotrainError as error:
        share.problem = str(error)
    except Exception as error:
        share.problem, share.traceback = f"{type(error).__name__}: {error}", traceback.format_exc()
    return _merged(task, [_Share(**part) for part in parallel.gather(asdict(share))])


def summary(bundle: Bundle, results: Sequence[TaskResult], max_per_task: int | None) -> Core:
    """The metric over the results of a bundle's tasks, as far as they are there."""
    by_label = {result.label: result for result in results}
    tasks, problems = {}, {}
    for task in bundle.tasks:
        result = by_label.get(task.label, TaskResult(task.label, problem="it was not evaluated"))
        tasks[task.label] = {key: getattr(result, key) for key in ("n", "accuracy", "centered", "stderr")}
        if result.centered is None:
            problems[task.label] = result.problem
    centered = [values["centered"] for values in tasks.values() if values["centered"] is not None]
    mean = math.fsum(centered) / len(centered) if centered else None
    return Core(mean, str(bundle.path), bundle.baseline_table, max_per_task, len(centered), len(tasks), tasks, problems)


def share_of(sizes: Sequence[int], rank: int, ranks: int) -> list[int]:
    """The examples of one rank, the largest first. They are sorted by size and dealt to and fro. So the shares cost about the same as long
    as a larger example costs more."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    return [i for place, i in enumerate(order) if (place % ranks if place // ranks % 2 == 0 else ranks - 1 - place % ranks) == rank]


def predict(question: Question, scores: Sequence[Score]) -> tuple[int | list[int] | None, bool]:
    """What the model answers (see `Prediction`), and whether that is right."""
    candidates = [i for i, option in enumerate(question.options) if not option.empty]
    if not candidates or not all(math.isfinite(scores[i].loss) for i in candidates):
        return None, False
    if question.gold is not None:
        choice = min(candidates, key=lambda i: scores[i].loss)  # the first of equal ones
        return choice, choice == question.gold
    (option,), (score,) = question.options, scores
    return list(score.greedy), option.ids[option.start :].tolist() == list(score.greedy)


def _evaluate_share(
    share: _Share,
    scorer: Scorer,
    task: Task,
    max_per_task: int | None,
    parallel: Parallel,
    should_stop: Callable[[], bool],
    progress: Callable[[str, int, int], None],
) -> None:
    examples = choose(read_examples(task), max_per_task)
    share.n = len(examples)
    prompts = Prompts(examples, task.num_fewshot, task.delimiter)
    mine = share_of([prompts.size(i) for i in range(len(examples))], parallel.dp_rank, parallel.dp_size)
    progress(task.label, 0, len(mine))
    for start in range(0, len(mine), PREPARED):
        for batch in _batches(_questions(scorer, prompts, mine[start : start + PREPARED]), scorer):
            if should_stop():
                share.given_up = True
                return
            for question, scores in zip(batch, _scores(scorer, batch), strict=True):
                prediction, correct = predict(question, scores)
                share.predictions.append((question.index, prediction, correct))
                empty = any(option.empty for option in question.options)
                share.nonfinite += prediction is None and not all(option.empty for option in question.options)
                share.empty, share.unclean = share.empty + empty, share.unclean + question.unclean
                share.truncated += question.truncated
            progress(task.label, len(share.predictions), len(mine))


def _questions(scorer: Scorer, prompts: Prompts, indices: Sequence[int]) -> list[Question]:
    """These examples as token ids, encoded in one call."""
    texts = [prompts.texts(index) for index in indices]
    encoded = scorer.encode([text for group in texts for text in group])
    questions, start = [], 0
    for index, group in zip(indices, texts, strict=True):
        tokens, start = encoded[start : start + len(group)], start + len(group)
        questions.append(prompts.question(index, tokens, scorer.bos_id, scorer.seq_len))
    return questions


def _scores(scorer: Scorer, batch: list[Question]) -> list[list[Score]]:
    """The scores of a batch. Where memory runs out, its halves are scored, and all further batches get half as many tokens."""
    try:
        return scorer.score([question.options for question in batch])
    except Exception as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    free_memory()  # here, since the error's frames held the tensors until now
    scorer.batch_tokens = max(1, scorer.batch_tokens // 2)
    half = len(batch) // 2
    return _scores(scorer, batch[:half]) + _scores(scorer, batch[half:])


def _batches(questions: Sequence[Question], scorer: Scorer) -> Iterator[list[Question]]:
    """Questions of about the same length together, the longest first, in batches of at most the scorer's tokens, padding included."""
    batch: list[Question] = []
    width = 0
    for question in sorted(questions, key=_tokens, reverse=True):
        if batch and width * (len(batch) + 1) > scorer.batch_tokens:
            yield batch
            batch = []
        width = width if batch else _tokens(question)
        batch.append(question)
    if batch:
        yield batch


def _tokens(question: Question) -> int:
    """About how many tokens a question takes: its longest option, and what the other options do not share with it."""
    longest = max(len(option.ids) for option in question.options)
    spans = sorted(len(option.ids) - option.start for option in question.options)
    return longest + sum(spans[:-1])


def _merged(task: Task, parts: list[_Share]) -> TaskResult:
    found = sorted((Prediction(*one) for part in parts for one in part.predictions), key=lambda one: one.index)
    n = max(part.n for part in parts)
    result = TaskResult(
        task.label,
        n,
        nonfinite=sum(part.nonfinite for part in parts),
        empty=sum(part.empty for part in parts),
        unclean=sum(part.unclean for part in parts),
        truncated=sum(part.truncated for part in parts),
        given_up=any(part.given_up for part in parts),
        predictions=found,
    )
    raised = [(rank, part) for rank, part in enumerate(parts) if part.problem]
    if raised:
        rank, part = raised[0]
        everywhere = len(raised) == len(parts)
        return replace(result, problem=part.problem if everywhere else f"rank {rank}: {part.problem}", traceback=part.traceback)
    if result.given_up:
        return replace(result, problem=f"the evaluation was given up after {len(found)} of {n} examples")
    if result.nonfinite:
        return replace(result, problem=f"the losses of {result.nonfinite} of {n} examples are not finite")
    accuracy = sum(one.correct for one in found) / n
    stderr = math.sqrt(accuracy * (1 - accuracy) / n)
    centered = (accuracy - task.baseline) / (1 - task.baseline)
    return replace(result, accuracy=accuracy, centered=centered, stderr=stderr)
