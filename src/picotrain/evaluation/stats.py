"""Is a difference larger than the noise? Intervals by bootstrap, and McNemar's test. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
FEWEST = 10  # documents that a bootstrap needs: of fewer the interval would be far too narrow
DRAWS = 2000  # of a bootstrap: its ends are then good to about a tenth of the interval's width
_CELLS = 1 << 22  # numbers of a bootstrap that are held at once


class Interval(NamedTuple):
    """A figure and its confidence interval. Where there is too little to go by, the ends are NaN."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is larger than the noise, at the interval's confidence."""
        return self.low > 0 or self.high < 0


def ratio_interval(parts: NDArray[np.float64], sizes: NDArray[Any], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """sum(parts) / sum(sizes), e.g. bits and bytes of documents (n,), with the percentile bootstrap's interval over documents
    (Efron and Tibshirani 1993, ch. 13). It says how the figure would vary if other documents of the same kind had been drawn.

    For the difference of two models pass the differences of their bits: the same documents are then drawn for both. Sizes are
    positive. Fewer than FEWEST documents have no interval. Raises ValueError without any document.
    """
    n = len(parts)
    if n == 0 or np.min(sizes) <= 0:
        raise ValueError("a ratio needs parts, each with a positive size")
    value = float(parts.sum() / sizes.sum())
    if n < FEWEST:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    for first in range(0, DRAWS, step := max(1, _CELLS // n)):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(step, DRAWS - first)).astype(np.float64)  # (draws, n)
        drawn.append((counts @ parts) / (counts @ sizes))
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided exact p-value of McNemar's test (1947). `only_a` examples were got right by model a alone, `only_b` by model b alone.
    Equally good models share them like the throws of a coin."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in log_choose))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979), in the order given. The chance that any of those below 0.05 is
    an accident then stays below 0.05, whatever they have to do with each other."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def accuracy_difference(
    correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], confidence: float = CONFIDENCE
) -> tuple[Interval, float]:
    """Accuracy of a minus that of b on the same examples (n,), with its interval and the standard error that the interval uses.

    The interval is paired. b and c are the examples that one model alone got right, and the variance is (b + c - (b - c)^2 / n) / n^2. Half
    an example is added to each of the four cells first (Agresti and Min 2005, "Wald+2"). Without that, two models that agree on
    sixteen examples would be declared equal with certainty. Raises ValueError without examples.
    """
    n = len(correct_a)
    if n == 0:
        raise ValueError("an accuracy needs examples")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    centre = (only_a - only_b) / (n + 2)
    error = math.sqrt(only_a + only_b + 1 - (only_a - only_b) ** 2 / (n + 2)) / (n + 2)
    reach = z(confidence) * error
    return Interval((only_a - only_b) / n, max(-1.0, centre - reach), min(1.0, centre + reach)), error


def normal_interval(value: float, error: float, confidence: float = CONFIDENCE) -> Interval:
    """A figure whose errors are normally distributed with this standard error."""
    reach = z(confidence) * error
    return Interval(value, value - reach, value + reach)


def z(confidence: float) -> float:
    """Standard deviations on either side that hold this share of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
