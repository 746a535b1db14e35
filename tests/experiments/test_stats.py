"""Intervals and verdicts, against scipy, by hand, and by how often they hold."""

import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lorakit.experiments.stats import (
    Difference,
    accuracy_interval,
    bootstrap_interval,
    deviation_interval,
    difference,
    mean_interval,
)

A, B = [0.90, 0.94, 0.92, 0.95], [0.85, 0.90, 0.88, 0.89]


def test_intervals_of_one_arm():
    share, low, high = accuracy_interval([True] * 8 + [False] * 2)
    assert (share, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4)
    # tables of chi-squared, 4 degrees of freedom: 0.484 and 11.143
    expected = math.sqrt(2.5), math.sqrt(10 / 11.1433), math.sqrt(10 / 0.484419)
    assert deviation_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(expected, rel=1e-4)


def test_an_interval_for_answers_in_groups():
    alone = [True] * 8 + [False] * 2
    assert accuracy_interval(alone * 9, groups=range(90)) == pytest.approx(accuracy_interval(alone * 9), abs=1e-3)
    # alike within each group, ten groups tell as much as ten answers, and a little less: t for z
    share, low, high = accuracy_interval(alone * 9, groups=list("abcdefghij") * 9)
    plain = accuracy_interval(alone)
    assert (share, low < plain[1], high > plain[2]) == (0.8, True, True)
    assert accuracy_interval([True] * 6, groups=list("aabbcc")) == accuracy_interval([True] * 6)
    assert accuracy_interval([True, False] * 3, groups=list("aabbcc")) == accuracy_interval([True, False] * 3)

    rng, held, held_plain = random.Random(0), 0, 0
    for _ in range(400):  # twelve tables that differ, ten questions each: how often does the interval hold 75 %?
        shares = [rng.betavariate(3, 1) for _ in range(12)]
        answers = [rng.random() < share for share in shares for _ in range(10)]
        _, low, high = accuracy_interval(answers, groups=[i // 10 for i in range(120)])
        held += low <= 0.75 <= high
        _, low, high = accuracy_interval(answers)
        held_plain += low <= 0.75 <= high
    assert held_plain < 0.87 * 400 < 0.92 * 400 <= held


def test_differences_are_welchs_or_students():
    expected = scipy_stats.ttest_ind(A, B, equal_var=False).confidence_interval()
    found = difference(A, B)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    expected = scipy_stats.ttest_rel(A, B).confidence_interval(0.9)
    found = difference(A, B, 0.9, paired=True)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "higher"
    assert difference(B, A, paired=True).verdict == "lower"
    assert difference([0.9, 0.5, 0.7], [0.6, 0.8, 0.5]).verdict == "cannot be separated"
    assert str(Difference(0.05, 0.01, 0.09)) == "+0.05 [+0.01, +0.09], higher"


def test_arms_without_scatter():
    assert difference([1.0, 1.0], [1.0, 1.0]) == Difference(0, 0, 0)
    assert difference([1.0, 1.0], [1.0, 1.0]).verdict == "cannot be separated"
    assert difference([1.0, 1.0], [0.5, 0.5]).verdict == "higher"
    assert difference([1.0, 1.0], [0.5, 0.5], paired=True).verdict == "higher"
    assert bootstrap_interval([2.0, 2.0]) == (2, 2, 2)


@pytest.mark.parametrize("paired", [False, True])
def test_an_interval_holds_as_often_as_it_says(paired):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        seeds = rng.normal(size=3) if paired else 0
        found = difference(
            (1 + seeds + rng.normal(size=3)).tolist(), (seeds + rng.normal(size=3)).tolist(), paired=paired
        )
        held += found.low < 1 < found.high
    assert 0.93 < held / 2000 < 0.98


def test_a_bootstrap_of_the_median():
    values = np.random.default_rng(0).normal(size=60).tolist()
    median, low, high = bootstrap_interval(values, np.median)
    assert low < median < high
    assert high - low < 1
    assert bootstrap_interval(values, np.median) == (median, low, high)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([1.0]),
        lambda: mean_interval([1.0, float("nan")]),
        lambda: deviation_interval([1.0]),
        lambda: difference([1.0], [1.0, 2.0]),
        lambda: difference([1.0, 2.0, 3.0], [1.0, 2.0], paired=True),
        lambda: difference([1.0, float("inf")], [1.0, 2.0]),
        lambda: bootstrap_interval([1.0]),
        lambda: accuracy_interval([]),
        lambda: accuracy_interval([True, False], groups="aa"),
        lambda: accuracy_interval([True, False], groups="abc"),
    ],
)
def test_what_cannot_be_computed_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()
