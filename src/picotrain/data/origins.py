"""The documents of the validation shard one by one, and where each is from: the column `source`, where a corpus has one.

In the given corpora that column reads `name:path`; what stands before the first colon is the origin. Without torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from picotrain.data.corpus import Corpus, opened, raising
from picotrain.data.mixture import Mixture
from picotrain.data.packing import Packed
from picotrain.data.slices import documents
from picotrain.data.units import units
from picotrain.errors import DataError

SOURCE = "source"
UNKNOWN = "unknown"  # the origin of a document whose column is null
OTHER = "other"  # all origins but the MOST most frequent ones
MOST = 30


class Origins(NamedTuple):
    """Where documents are from: document d, numbered as in `validation_rows`, is of names[of[d]]."""

    names: list[str]
    of: NDArray[np.int64]

    def of_tokens(self, packed: Packed) -> NDArray[np.int64]:
        """The origin of every id in `packed.rows`, (N, T + 1): that of the document it belongs to, or leads."""
        return np.repeat(self.of[packed.span_doc], 1 + packed.span_len).reshape(packed.rows.shape)


class Document(NamedTuple):
    """A validation document; origin is "" where the corpus does not say."""

    text: str
    origin: str


def validation_origins(data: Corpus | Mixture) -> Origins | None:
    """Where the validation documents are from; None where nothing tells them apart. Raises DataError."""
    labels = _labels(Mixture.of(data))
    if len(set(labels)) < 2:
        return None
    names, of = np.unique(labels, return_inverse=True)
    return Origins([str(name) for name in names], of.astype(np.int64))


def validation_documents(data: Corpus | Mixture, at_most: int | None = None) -> Iterator[Document]:
    """The documents of the validation shard in file order, of a mixture those of one source after the other.

    at_most: of n documents only the i * n // at_most-th, i = 0, 1, ...: spread evenly, and the same for everybody. Raises DataError.
    """
    mixture = Mixture.of(data)
    labels = _labels(mixture)
    n = len(labels)
    wanted = None if at_most is None or at_most >= n else {i * n // at_most for i in range(at_most)}
    at = 0
    for corpus in mixture.corpora:
        for unit in units([corpus.val], 1):
            for text in documents(corpus.files, corpus.val, unit):
                if wanted is None or at in wanted:
                    yield Document(text, labels[at])
                at += 1


def _labels(mixture: Mixture) -> list[str]:
    """One label a document: its origin, led by its corpus' name in a mixture; of more than MOST the rarest are OTHER."""
    several = len(mixture.sources) > 1
    labels: list[str] = []
    for corpus in mixture.corpora:
        origins = _column(corpus)
        labels += ["/".join(filter(None, (corpus.name if several else "", origin))) for origin in origins]
    kept = {label for label, _ in Counter(labels).most_common(MOST)}
    return [label if label in kept else OTHER for label in labels]


def _column(corpus: Corpus) -> list[str]:
    import pyarrow as pa

    where = corpus.root / corpus.val.name
    why_not = raising(lambda why: DataError(f"{where}: its column {SOURCE!r} cannot be read: {why}"))
    with corpus.files.hold(corpus.val) as path, why_not, opened(path) as file:
        if SOURCE not in file.schema_arrow.names:
            return [""] * corpus.val.rows
        column = file.read(columns=[SOURCE], use_threads=False)[SOURCE].cast(pa.string()).to_pylist()
    return [value.partition(":")[0] if value else UNKNOWN for value in column]
