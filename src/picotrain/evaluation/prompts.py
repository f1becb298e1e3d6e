"""From examples to token ids with a scored span, as in nanochat's core_eval (and DCLM, arXiv:2406.11794, before it).

    multiple choice      shots, then query + delimiter + each choice; scored: what the choices do not have in common
    schema               shots, then each context + delimiter + continuation; scored: their common end
    language modelling   shots, then context + delimiter + continuation; scored: the continuation

A shot is another example with its right answer and an empty line after it. Every prompt is led by `<|bos|>`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from picotrain.evaluation.bundle import Example, LanguageModeling, MultipleChoice

SHUFFLE_SEED = 1337
SHOTS_SEED = 1234  # plus the index of the example


@dataclass(frozen=True, eq=False)
class Option:
    """Token ids. ids[start:] is scored. start >= 1, because nothing stands before the first id to predict it from."""

    ids: np.ndarray  # (n,) int64
    start: int

    @property
    def empty(self) -> bool:
        return self.start >= len(self.ids)


@dataclass(frozen=True)
class Question:
    """Example `index` as its options: one each choice or context, a single one for language modelling.

    unclean: the tokens of the prompt are not the first ones of prompt and continuation. truncated: it lost tokens on the left.
    """

    index: int
    options: tuple[Option, ...]
    gold: int | None
    unclean: bool = False
    truncated: bool = False


def choose(examples: Sequence[Example], max_per_task: int | None) -> list[Example]:
    """The examples that count: shuffled by a fixed seed, then cut (None or <= 0: all of them)."""
    chosen = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(chosen)
    return chosen[:max_per_task] if max_per_task is not None and max_per_task > 0 else chosen


def shots_of(index: int, n_examples: int, num_fewshot: int) -> list[int]:
    """Which other examples stand before example `index`, in this order; all of them where there are too few."""
    others = n_examples - 1
    drawn = random.Random(SHOTS_SEED + index).sample(range(others), min(num_fewshot, others))  # places in a list without `index`
    return [place + (place >= index) for place in drawn]


class Prompts:
    """The prompts of one task's examples (those that `choose` left)."""

    def __init__(self, examples: Sequence[Example], num_fewshot: int, delimiter: str):
        self._examples, self._num_fewshot, self._delimiter = examples, num_fewshot, delimiter
        self._shots = [self._shot(example) for example in examples] if num_fewshot > 0 else []
        self._shot_bytes = [len(shot.encode()) for shot in self._shots]

    def texts(self, index: int) -> list[str]:
        """One prompt an option; for language modelling the prompt without and with its continuation."""
        example = self._examples[index]
        before = "".join([self._shots[i] for i in self._indices(index)])
        if isinstance(example, LanguageModeling):
            without = f"{before}{example.context.strip()}{self._delimiter}"
            # A blank at the end would be a token of its own. With a continuation, that one's first token begins with the blank.
            return [without.strip(), without + example.continuation]
        if isinstance(example, MultipleChoice):
            return [f"{before}{example.query}{self._delimiter}{choice}" for choice in example.choices]
        return [f"{before}{context}{self._delimiter}{example.continuation}" for context in example.context_options]

    def size(self, index: int) -> int:
        """About how many UTF-8 bytes the prompts of an example have. What they share counts once. Ranks share work by this."""
        example = self._examples[index]
        if isinstance(example, LanguageModeling):
            own = [example.context, example.continuation]
        else:
            own = [*example.options, example.query if isinstance(example, MultipleChoice) else example.continuation]
        return sum(self._shot_bytes[i] for i in self._indices(index)) + sum(len(text.encode()) for text in own)

    def question(self, index: int, tokens: Sequence[np.ndarray], bos_id: int, seq_len: int | None) -> Question:
        """The example with its `texts` as token ids. What does not fit into seq_len is cut off on the left.

        Where that would take the token before the span, too, the span starts at the second token that is left. The reference asserts
        that a prompt is a token-prefix of the prompt with its continuation. Here the span starts where the two part, and the question
        is `unclean`.
        """
        example = self._examples[index]
        ids = [np.concatenate(([bos_id], part)).astype(np.int64) for part in tokens]
        unclean = False
        if isinstance(example, LanguageModeling):
            shared, gold = common_prefix(ids), None
            unclean = shared < len(ids[0])
            ids, starts = ids[1:], [shared]
        elif isinstance(example, MultipleChoice):
            starts, gold = [common_prefix(ids)] * len(ids), example.gold
        else:
            suffix, gold = common_prefix([one[::-1] for one in ids]), example.gold
            starts = [len(one) - suffix for one in ids]
        cuts = [max(0, len(one) - seq_len) if seq_len else 0 for one in ids]
        options = [Option(one[cut:], max(1, start - cut)) for one, start, cut in zip(ids, starts, cuts, strict=True)]
        return Question(index, tuple(options), gold, unclean, any(cuts))

    def _indices(self, index: int) -> list[int]:
        return shots_of(index, len(self._examples), self._num_fewshot)

    def _shot(self, example: Example) -> str:
        """An example with its right answer."""
        if isinstance(example, LanguageModeling):
            return f"{example.context.strip()}{self._delimiter}{example.continuation}\n\n"
        if isinstance(example, MultipleChoice):
            return f"{example.query}{self._delimiter}{example.choices[example.gold]}\n\n"
        return f"{example.context_options[example.gold]}{self._delimiter}{example.continuation}\n\n"


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many leading ids all sequences share."""
    shortest = min(map(len, sequences))
    first = sequences[0][:shortest]
    same = np.ones(shortest, dtype=bool)
    for other in sequences[1:]:
        same &= first == other[:shortest]
    return shortest if same.all() else int(same.argmin())
