"""Intervals, so that a difference can be told from chance."""

from collections.abc import Sequence

from scipy.stats import binomtest


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
