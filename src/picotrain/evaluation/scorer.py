"""Token ids in, losses and likeliest tokens of their scored spans out: for a `Decoder`, and for any function ids -> logits.

`DecoderScorer` computes nothing twice, and nothing that is not looked at:

* The tokens that an example's options share are forwarded once. The options go on from their keys and values.
* The last token of an option predicts nothing, so it is not forwarded.
* Only positions whose predictions are scored go past the last block's keys and values, and through the head.

Options that were cut differently on the left share no prefix, because their tokens stand at other positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from picotrain.evaluation.prompts import Option, common_prefix
from picotrain.model import Decoder, KVCache, LanguageModel
from picotrain.tokenizer import Tokenizer

# Tokens in one forward pass: on a CPU, activations that its cache holds; on an accelerator, enough to fill it.
BATCH_TOKENS = {"cpu": 4096}
BATCH_TOKENS_DEFAULT = 65536
LOGITS_BYTES = {"cpu": 4 << 20}  # fp32 logits at a time, that are gone through several times
LOGITS_BYTES_DEFAULT = 1 << 30
PLAIN_BATCH_TOKENS = 4096  # of a model that gives logits for every position


@dataclass(frozen=True)
class Score:
    """The score of a span. loss: mean nats over it, not finite where the model's numbers are not. greedy: the likeliest token at each of
    its places, given the right tokens before. An empty span has an infinite loss, so that it is never chosen."""

    loss: float
    greedy: tuple[int, ...]


EMPTY = Score(math.inf, ())


class Scorer(Protocol):
    """A model with its tokenizer, as CORE needs it. seq_len: the longest sequence it takes, None: any."""

    seq_len: int | None
    bos_id: int
    batch_tokens: int  # about how many tokens `score` should get at once; less once memory has run out

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without `<|bos|>`."""
        ...

    def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Score]]:
        """The score of every option of every question."""
        ...


class LogitsScorer:
    """Any causal language model as a function ids int64 (B, T) -> logits (B, T, V), a Hugging Face one for example.

    Rows are padded on the right, which a causal model does not see. `encode` gives the ids of one text without special tokens.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        encode: Callable[[str], Sequence[int]],
        bos_id: int,
        seq_len: int | None,
        device: torch.device | str = "cpu",
        batch_tokens: int = PLAIN_BATCH_TOKENS,
    ):
        self._logits, self._encode, self._device = logits, encode, device
        self.bos_id, self.seq_len, self.batch_tokens = bos_id, seq_len, batch_tokens

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._encode(text), dtype=np.int64) for text in texts]

    @torch.inference_mode()
    def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Score]]:
        options = [option for question in questions for option in question if not option.empty]
        scores = iter(self._scores(options) if options else ())
        return [[EMPTY if option.empty else next(scores) for option in question] for question in questions]

    def _scores(self, options: Sequence[Option]) -> list[Score]:
        ids = torch.from_numpy(padded([option.ids[:-1] for option in options], self.bos_id)).to(self._device)
        logits = self._logits(ids)  # (B, T, V)
        rows = [row for row, option in enumerate(options) for _ in option.ids[option.start :]]
        places = [place for option in options for place in range(option.start - 1, len(option.ids) - 1)]
        targets = np.concatenate([option.ids[option.start :] for option in options])
        judged = judge(logits[rows, places].float(), torch.from_numpy(targets).to(self._device))
        return spans([len(option.ids) - option.start for option in options], *judged)


@dataclass
class _Tree:
    """Options with a common beginning. inputs[:shared] is forwarded once, and what follows is a branch for each option."""

    options: list[Option]
    members: list[int]  # places of the options in the flat list of all
    shared: int = 0
    wanted: list[int] = field(default_factory=list)  # positions of the shared part that predict scored tokens

    @property
    def prefix(self) -> np.ndarray:
        return self.options[0].ids[: self.shared]

    @property
    def branches(self) -> list[np.ndarray]:
        return [option.ids[self.shared : -1] for option in self.options]

    def settle(self) -> None:
        scored = {place for option in self.options for place in range(option.start - 1, min(self.shared, len(option.ids) - 1))}
        self.wanted = sorted(scored) or [self.shared - 1]


def scorer_of(model: LanguageModel, tokenizer: Tokenizer) -> Scorer:
    """The quickest scorer that a model allows."""
    if isinstance(model, Decoder):
        return DecoderScorer(model, tokenizer)
    return LogitsScorer(model, tokenizer.encode, tokenizer.bos_id, model.seq_len, model.device)


class DecoderScorer:
    """A decoder-only transformer. `model.to(model.compute_dtype)` beforehand saves casting its weights at every call."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, batch_tokens: int | None = None):
        self._model, self._tokenizer, self._device = model, tokenizer, model.device
        self.seq_len: int | None = model.seq_len
        self.bos_id = tokenizer.bos_id
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self._device.type, BATCH_TOKENS_DEFAULT)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = self._tokenizer.encode_flat(texts)
        return np.split(ids, offsets[1:-1])

    @torch.inference_mode()
    def score(self, questions: Sequence[Sequence[Option]]) -> list[list[Score]]:
        flat: list[Option] = []
        trees: list[_Tree] = []
        places: list[list[int | None]] = []  # of each option in `flat`: equal options are one, so that they are really equal
        for question in questions:
            known: dict[tuple[bytes, int], int] = {}
            places.append([])
            own: list[_Tree] = []
            for option in question:
                key = (option.ids.tobytes(), option.start)
                if not option.empty and key not in known:
                    known[key] = len(flat)
                    _plant(own, option, len(flat))
                    flat.append(option)
                places[-1].append(known.get(key))
            trees += own
        scores = self._scores(flat, trees) if trees else []
        return [[EMPTY if place is None else scores[place] for place in question] for question in places]

    def _scores(self, flat: list[Option], trees: list[_Tree]) -> list[Score]:
        """Forward all trees, then the head on what is scored, in the order of `flat`."""
        for tree in trees:
            tree.settle()
        prefixes = padded([tree.prefix for tree in trees], self.bos_id)  # (B, P)
        wanted = padded([np.array(tree.wanted) for tree in trees], None)  # (B, W)
        packed = [np.concatenate(tree.branches) for tree in trees]
        slots = max(map(len, packed))  # S
        model = self._model
        cache = KVCache(model, len(trees), prefixes.shape[1], more=slots) if slots else None
        hidden = model.hidden(self._tensor(prefixes), cache, self._tensor(wanted)).flatten(0, 1)  # (B W, C)
        first_branch = len(hidden)
        if cache is not None:
            hidden = torch.cat((hidden, self._branches(trees, packed, slots, cache).flatten(0, 1)))  # (B W + B S, C)

        rows: list[list[int]] = [[] for _ in flat]
        for b, tree in enumerate(trees):
            column = {place: b * wanted.shape[1] + w for w, place in enumerate(tree.wanted)}
            slot = first_branch + b * slots
            for member, option, branch in zip(tree.members, tree.options, tree.branches, strict=True):
                for place in range(option.start - 1, len(option.ids) - 1):
                    rows[member].append(column[place] if place < tree.shared else slot + place - tree.shared)
                slot += len(branch)
        targets = np.concatenate([option.ids[option.start :] for option in flat])
        index = self._tensor(np.concatenate(rows))
        chunk = max(1, LOGITS_BYTES.get(self._device.type, LOGITS_BYTES_DEFAULT) // (4 * model.head_weight().size(0)))
        parts = zip(index.split(chunk), self._tensor(targets).split(chunk), strict=True)
        losses, greedy = zip(*(judge(model.logits(hidden[i]), t) for i, t in parts), strict=True)
        return spans([len(row) for row in rows], torch.cat(losses), torch.cat(greedy))

    def _branches(self, trees: list[_Tree], packed: list[np.ndarray], slots: int, cache: KVCache) -> Tensor:
        """Hidden states (B, S, C) of the branches. A row holds the branches of one tree end to end. No branch sees another."""
        room = cache.length  # P
        shared = np.array([tree.shared for tree in trees])
        branch = np.full((len(trees), slots), -1)  # (B, S), which one a slot belongs to; -1: padding
        depth = np.zeros((len(trees), slots), dtype=np.int64)  # how deep in it
        for b, tree in enumerate(trees):
            lengths = [len(one) for one in tree.branches]
            branch[b, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
            depth[b, : sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
        positions = self._tensor(depth + shared[:, None])
        members, length = self._tensor(branch), self._tensor(shared)
        older = torch.arange(room, device=self._device).expand(len(trees), -1)  # (B, P)
        in_prefix = (older < length[:, None])[:, None].expand(-1, slots, -1)  # (B, S, P)
        in_branch = (members[:, :, None] == members[:, None]).tril()  # (B, S, S)
        visible = torch.cat((in_prefix, in_branch), dim=2)
        key_positions = torch.cat((older, positions), dim=1)
        return self._model.branches(self._tensor(padded(packed, self.bos_id)), positions, visible, key_positions, cache)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self._device)


def _plant(trees: list[_Tree], option: Option, place: int) -> None:
    """Put an option into the tree with which it shares most of its tokens, or into a new one."""
    inputs = option.ids[:-1]
    for tree in trees:
        shared = common_prefix([tree.options[0].ids[: tree.shared], inputs])
        if 2 * shared >= len(inputs):
            tree.options.append(option)
            tree.members.append(place)
            tree.shared = shared
            return
    trees.append(_Tree([option], [place], len(inputs)))


def judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats (N,) fp32 and likeliest token (N,) of logits (N, V). A logit that is NaN or +inf makes the loss NaN."""
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1)


def spans(lengths: Sequence[int], losses: Tensor, greedy: Tensor) -> list[Score]:
    """The scores of spans of these lengths that lie end to end in `losses` and `greedy` (N,)."""
    nats, likeliest, scores, start = losses.double().cpu().numpy(), greedy.tolist(), [], 0
    for length in lengths:
        end = start + length
        scores.append(Score(float(nats[start:end].mean()), tuple(likeliest[start:end])))
        start = end
    return scores


def padded(rows: Sequence[np.ndarray], fill: int | None) -> np.ndarray:
    """Rows of ids as one int64 array, padded on the right with `fill`, or each with its last value."""
    table = np.full((len(rows), max(map(len, rows))), 0 if fill is None else fill, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
        if fill is None:
            line[len(row) :] = row[-1]
    return table
