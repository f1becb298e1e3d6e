"""Several corpora as one stream of rows: which source a row comes from, by weight. A single corpus is a mixture of one.

The source of a lane's k-th row is a function of (seed, lane, k): the golden-ratio sequence. It is so even that after n rows a source
is off its weight by a few rows. Random draws would be off by the square root of n (Kronecker sequences; Niederreiter 1992, ch. 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from picotrain.data.corpus import Corpus, OnBad, hash_bytes, sample_texts
from picotrain.data.units import Units, units
from picotrain.errors import DataError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, odd
_MASK = (1 << 64) - 1
UnitRows = tuple[tuple[Annotated[int, Field(strict=True, ge=0, le=2**31)], ...], ...]  # by unit and slice


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture.

    weight: its share of the rows, relative to the others' weights. repeat: whether it begins anew when it was read once; else it leaves
    the mixture. rows: the rows of each unit's slices in the first epoch, where they were counted. They hold for the tokenizer, seq_len,
    unit_bytes and seed that they were counted with."""

    corpus: Corpus
    weight: float = 1.0
    repeat: bool = True
    rows: UnitRows | None = None

    @property
    def epoch_rows(self) -> int | None:
        """The rows of an epoch; None where they were not counted."""
        return None if self.rows is None else sum(map(sum, self.rows))

    def to_json(self) -> dict[str, Any]:
        """The corpus, and the rows where they are known."""
        return self.corpus.to_json() | ({} if self.rows is None else {"unit_rows": self.rows})

    @classmethod
    def from_json(cls, data: dict[str, Any], weight: float = 1.0, repeat: bool = True) -> Source:
        """Raises DataError where `data` is none of `to_json`."""
        rows = data.get("unit_rows")
        try:
            return cls(Corpus.from_json(data), weight, repeat, None if rows is None else TypeAdapter(UnitRows).validate_python(rows))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(f"the description of a corpus is damaged: unit_rows: {first['msg']}, not {first['input']!r:.60}") from None


@dataclass(frozen=True)
class Mixture:
    """What is trained on: at least one source."""

    name: str
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, corpus: Corpus | Mixture) -> Mixture:
        """A corpus as a mixture of one."""
        return corpus if isinstance(corpus, Mixture) else cls(corpus.name, (Source(corpus),))

    @property
    def corpora(self) -> list[Corpus]:
        return [source.corpus for source in self.sources]

    @property
    def names(self) -> list[str]:
        """The sources' names, each once."""
        return [corpus.name for corpus in self.corpora]

    @property
    def shares(self) -> list[float]:
        """The sources' shares of the rows; they sum to 1."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    @property
    def epoch_rows(self) -> int | None:
        """Rows of one pass over all sources; None while some are not counted."""
        rows = [source.epoch_rows for source in self.sources]
        return None if None in rows else sum(n for n in rows if n is not None)

    @property
    def sizes(self) -> list[int]:
        """What each source counts for in an epoch of all: its rows. While some sources are not counted it is the bytes of text, for all."""
        return [source.corpus.text_bytes if self.epoch_rows is None else source.epoch_rows or 0 for source in self.sources]

    @property
    def text_bytes(self) -> int:
        """Bytes of training text by the footers, of all sources."""
        return sum(corpus.text_bytes for corpus in self.corpora)

    @property
    def documents(self) -> int:
        """Training documents of all sources."""
        return sum(corpus.documents for corpus in self.corpora)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits for sources, weights and what happens at a source's end; of one source, the corpus' own."""
        if len(self.sources) == 1:
            return self.sources[0].corpus.fingerprint
        return hash_bytes(json.dumps([[s.corpus.fingerprint, s.weight, s.repeat] for s in self.sources]).encode())

    def units(self, unit_bytes: int) -> list[Units]:
        """Each source's units."""
        return [units(corpus.shards, unit_bytes) for corpus in self.corpora]

    def sample(self, max_bytes: int, on_bad: OnBad | None = None) -> Iterator[str]:
        """At most about `max_bytes` of training text, of each source by its share of the rows; `on_bad` as in `sample_texts`."""
        for corpus, share in zip(self.corpora, self.shares, strict=True):
            yield from sample_texts(corpus, max(1, round(max_bytes * share)), on_bad)

    def with_val_from_training(self) -> Mixture:
        """The same data with each source's first training shard in the place of the one that validates."""
        return replace(self, sources=tuple(replace(s, corpus=replace(s.corpus, val=s.corpus.shards[0])) for s in self.sources))

    def close(self) -> None:
        """End what fetches shards in the background."""
        for corpus in self.corpora:
            corpus.files.close()

    def to_json(self) -> dict[str, Any]:
        if len(self.sources) == 1:
            return self.sources[0].to_json()
        sources = [{"weight": s.weight, "repeat": s.repeat, "corpus": s.to_json()} for s in self.sources]
        return {"name": self.name, "fingerprint": self.fingerprint, "sources": sources}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Mixture:
        if "sources" not in data:
            source = Source.from_json(data)
            return cls(source.corpus.name, (source,))
        return cls(data["name"], tuple(Source.from_json(s["corpus"], s["weight"], s["repeat"]) for s in data["sources"]))


class Choice:
    """Which source each row of one lane comes from."""

    def __init__(self, shares: Sequence[float], seed: int, lane: int):
        self._shares = list(shares)
        self._live = [True] * len(self._shares)
        self._offset = (_mix(_mix(seed) + lane)) & _MASK
        self._set_bounds()

    def source(self, k: int) -> int:
        """The source of the lane's row k, among those that have not left."""
        if len(self._shares) == 1:
            return 0
        point = (self._offset + k * _GOLDEN) & _MASK
        return next(i for i, bound in enumerate(self._bounds) if point < bound)

    def leave(self, source: int) -> bool:
        """Take a source out; its share goes to the others in proportion. False when none is left."""
        self._live[source] = False
        if not any(self._live):
            return False
        self._set_bounds()
        return True

    def _set_bounds(self) -> None:
        live = [share if alive else 0.0 for share, alive in zip(self._shares, self._live, strict=True)]
        total = sum(live)
        last = max(i for i, share in enumerate(live) if share)
        bounds = [int(part / total * 2**64) for part in accumulate(live)]
        # Rounding must not leave a gap at the top.
        self._bounds = [1 << 64 if i >= last else bound for i, bound in enumerate(bounds)]


def _mix(z: int) -> int:
    """splitmix64's output function (Steele, Lea and Flood 2014) after one step."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
