"""Intervals and tests against known cases, and whether they hold as often as they say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from picotrain.evaluation.stats import (
    FEWEST,
    Interval,
    accuracy_difference,
    holm,
    mcnemar,
    normal_interval,
    ratio_interval,
    z,
)


def exact_mcnemar(b: int, c: int) -> Fraction:
    """In whole numbers: the two tails of b + c throws of a coin."""
    n = b + c
    return min(Fraction(1), 2 * sum((Fraction(math.comb(n, k), 2**n) for k in range(min(b, c) + 1)), Fraction(0)))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 1), (0, 5), (5, 0), (1, 9), (7, 13), (20, 31), (400, 520)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int):
    assert mcnemar(b, c) == pytest.approx(float(exact_mcnemar(b, c)), rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_by_hand():
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0


def test_holm_steps_down_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the example of Wikipedia's Holm-Bonferroni
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_ratio_of_equal_parts_has_no_width():
    sizes = np.arange(1, 31)
    assert ratio_interval(2.0 * sizes, sizes) == pytest.approx((2.0, 2.0, 2.0))
    nothing = ratio_interval(np.zeros(30), sizes)
    assert nothing == (0.0, 0.0, 0.0) and not nothing.excludes_zero


def test_the_bootstrap_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = ratio_interval(values, np.ones(400))
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - z(0.95) * error, values.mean() + z(0.95) * error), abs=0.15 * error)
    wider = ratio_interval(values, np.ones(400), confidence=0.99)
    assert wider.low < found.low < found.high < wider.high
    assert ratio_interval(values, np.ones(400)) == found  # nothing is left to chance between two calls


def test_the_bootstrap_holds_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        sizes = rng.lognormal(3, 0.7, 60)
        parts = sizes * rng.normal(0.5, 0.3, 60)
        found = ratio_interval(parts, sizes, seed=trial)
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_too_few_documents_have_no_interval_and_prove_nothing():
    found = ratio_interval(np.full(FEWEST - 1, -1.0), np.ones(FEWEST - 1))
    assert found.value == -1.0 and math.isnan(found.low) and math.isnan(found.high)
    assert not found.excludes_zero
    assert ratio_interval(np.full(FEWEST, -1.0), np.ones(FEWEST)).excludes_zero


@pytest.mark.parametrize(("parts", "sizes"), [([], []), ([1.0] * 20, [0.0] + [1.0] * 19)])
def test_a_ratio_wants_sizes(parts: list[float], sizes: list[float]):
    with pytest.raises(ValueError, match="positive size"):
        ratio_interval(np.array(parts), np.array(sizes))


def paired(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_accuracy_difference_by_hand():
    interval, error = accuracy_difference(*paired(40, 12, 5, 43))
    variance = (12 + 5 + 1 - 7**2 / 102) / 102**2  # half an example more in each cell
    assert error == pytest.approx(math.sqrt(variance))
    assert interval.value == pytest.approx(0.07)
    assert interval.low == pytest.approx(7 / 102 - 1.959964 * error, abs=1e-6)
    reverse, _ = accuracy_difference(*paired(40, 5, 12, 43))
    assert reverse == pytest.approx((-interval.value, -interval.high, -interval.low))


def test_models_that_agree_on_few_examples_are_not_declared_equal_with_certainty():
    interval, _ = accuracy_difference(*paired(8, 0, 0, 8))
    assert interval.value == 0 and interval.low < -0.05 and interval.high > 0.05
    certain, _ = accuracy_difference(*paired(0, 3, 0, 0))
    assert certain.high == 1.0 and not certain.low > 0.5
    with pytest.raises(ValueError, match="examples"):
        accuracy_difference(*paired(0, 0, 0, 0))


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.1, 0.3), (0.2, 0.2, 0.05, 0.55), (0.02, 0.03, 0.02, 0.93)])
def test_the_interval_of_accuracies_holds_about_as_often_as_it_says(shares: tuple[float, ...]):
    counts = np.random.default_rng(2).multinomial(120, shares, size=1000)
    truth = shares[1] - shares[2]
    held = [interval.low <= truth <= interval.high for row in counts for interval in [accuracy_difference(*paired(*row))[0]]]
    assert 0.92 <= np.mean(held) <= 0.995


def test_normal_interval():
    assert normal_interval(1.0, 0.5) == pytest.approx(Interval(1.0, 1 - 0.979982, 1 + 0.979982), abs=1e-6)
    assert not normal_interval(1.0, 0.52).excludes_zero and normal_interval(1.0, 0.5).excludes_zero
