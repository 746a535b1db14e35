"""Intervals, so that a difference can be told from chance."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import binomtest, t


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float, float]:
    """The share of correct answers and its Wilson interval (Wilson 1927), as (share, low, high), all in [0, 1].

    The interval holds for questions drawn from the same generator, with this one trained model; it says nothing about
    other seeds.

    Raises:
        ValueError: no answers.
    """
    if not correct:
        raise ValueError("expected at least one answer, got none")
    interval = binomtest(sum(correct), len(correct)).proportion_ci(confidence, method="wilson")
    return sum(correct) / len(correct), float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of independent runs and its interval by Student's t (1908), as (mean, low, high).

    With n values it is `mean ± t s / sqrt(n)`: few seeds give a wide interval, and that is the message.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"expected at least two finite values, got {list(values)}")
    mean = fmean(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
