"""Intervals and comparisons, so that a difference can be told from chance, and so that "cannot be told" can be said."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from scipy.stats import bootstrap, chi2, t, ttest_ind

from lorakit._numbers import check_integer, check_list, is_number
from lorakit._words import short


def accuracy_interval(
    correct: Sequence[bool], confidence: float = 0.95, groups: Sequence[Hashable] | None = None
) -> tuple[float, float, float]:
    """The share of correct answers and its Wilson interval (Wilson 1927), as (share, low, high), all in [0, 1].

    The interval holds for questions drawn from the same generator, with this one trained model; it says nothing about
    other seeds.

    Args:
        correct: whether each answer is.
        confidence: in (0, 1).
        groups: what each question belongs to, such as its table; None if all are independent. Questions of a group may
            succeed or fail together, so that n of them tell as much as fewer independent ones; the interval is
            Wilson's for that effective number (Korn and Graubard 1998, Survey Methodology 24, 193-201), and holds for
            other groups of the kind. Where all answers are alike, nothing shows how groups differ, and it is n.

    Raises:
        ValueError: no answers; fewer than two groups, or not one for each answer.
    """
    check_list("answers", correct)
    check_confidence(confidence)
    if not len(correct) or any(answer not in (0, 1) for answer in correct):
        raise ValueError(f"expected at least one answer, each right or wrong, got {short(correct)}")
    if groups is not None and len(groups) != len(correct):
        raise ValueError(f"expected a group for each of {len(correct)} answers, got {len(groups)}")
    n, share = len(correct), fmean(correct)
    size: float = n
    if groups is not None and share not in (0, 1):
        excess: dict[Hashable, float] = defaultdict(float)  # right answers of a group beyond the mean
        for answer, group in zip(correct, groups, strict=True):
            excess[group] += answer - share
        k = len(excess)
        if k < 2:
            raise ValueError(f"expected at least two groups, got {k}")
        variance = k / (k - 1) * sum(each**2 for each in excess.values()) / n**2
        size = _effective_size(share, variance, n, k, confidence)
    return _wilson(share, size, confidence)


def share_interval(shares: Sequence[float], questions: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of the shares that several seeds reach, and its interval over seeds, as (mean, low, high) in [0, 1].

    `mean_interval` knows no ends and may pass 100 %. This is Wilson's interval for the number of independent answers
    that would scatter as the seeds do, `p (1 - p) / var(p)`, and at most for all answers (Korn and Graubard 1998, as in
    `accuracy_interval`, with seeds as groups): seeds that agree do not make it narrower than their questions allow.

    Args:
        shares: of right answers, one a seed.
        questions: how many each share is of.
        confidence: in (0, 1).

    Raises:
        ValueError: fewer than two shares, or one that is not in [0, 1].
    """
    _check_values(shares)
    check_confidence(confidence)
    check_integer("questions", questions)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"expected shares between 0 and 1, got {short(list(shares))}")
    mean, k = fmean(shares), len(shares)
    size = _effective_size(mean, stdev(shares) ** 2 / k, k * questions, k, confidence)
    return _wilson(mean, size, confidence)


def _wilson(share: float, size: float, confidence: float) -> tuple[float, float, float]:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, half = share + z**2 / (2 * size), z * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    low, high = ((middle + side * half) / (1 + z**2 / size) for side in (-1, 1))
    return share, max(low, 0.0), min(high, 1.0)


def _effective_size(share: float, variance: float, n: int, k: int, confidence: float) -> float:
    """How many independent answers tell as much about a share as n answers in k groups, with this variance of it."""
    few = t.ppf((1 + confidence) / 2, n - 1) / t.ppf((1 + confidence) / 2, k - 1)  # a variance from k groups alone
    return min(n, float(share * (1 - share) / variance * few**2)) if variance else n


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of independent runs and its interval by Student's t (1908), as (mean, low, high).

    With n values it is `mean ± t s / sqrt(n)`: few seeds give a wide interval, and that is the message.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    _check_values(values)
    check_confidence(confidence)
    mean = fmean(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _check_values(values: Any) -> None:
    check_list("values", values)
    if len(values) < 2 or not all(is_number(value) and math.isfinite(value) for value in values):
        raise ValueError(f"expected at least two finite values, got {short(list(values))}")


def check_confidence(confidence: Any) -> None:
    """Refuses what is no number between 0 and 1."""
    if not is_number(confidence) or not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {short(confidence)}")


def deviation_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The standard deviation of independent runs and its interval, as (deviation, low, high).

    `(n - 1) s² / sigma²` is chi-squared with n - 1 degrees of freedom for values of a normal distribution (Helmert
    1876). With five values the interval reaches from 0.6 to 2.9 times what they show.

    Raises:
        ValueError: as in `mean_interval`.
    """
    mean_interval(values, confidence)
    sides, n = ((1 + confidence) / 2, (1 - confidence) / 2), len(values) - 1
    low, high = (math.sqrt(n / float(chi2.ppf(side, n))) for side in sides)
    found = stdev(values)
    return found, low * found, high * found


@dataclass(frozen=True)
class Difference:
    """A difference of means with its interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, or `"cannot be separated"` if the interval holds zero."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "cannot be separated"

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}], {self.verdict}"


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, paired: bool = False) -> Difference:
    """By how much the mean of a exceeds that of b, with its interval over seeds.

    Args:
        a: one value a run.
        b: the same of the other arm.
        confidence: of the interval.
        paired: whether the runs belong together by their places (one seed, one order of data): the interval is then
            that of the differences (Student). Else it is Welch's (1947), which lets the arms scatter differently.

    Raises:
        ValueError: fewer than two values in an arm, one that is not finite, or paired arms of different lengths.
    """
    for values in (a, b):
        _check_values(values)
    check_confidence(confidence)
    if paired and len(a) != len(b):
        raise ValueError(f"expected pairs, got {len(a)} values and {len(b)}")
    mean = fmean(a) - fmean(b)
    if paired:
        gaps = [x - y for x, y in zip(a, b, strict=True)]
        return Difference(*mean_interval(gaps, confidence))
    if stdev(a) == stdev(b) == 0:
        return Difference(mean, mean, mean)
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    return Difference(mean, float(interval.low), float(interval.high))


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = fmean,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Any statistic of independent runs and its bootstrap interval (BCa, Efron 1987), as (statistic, low, high).

    For statistics that Student's t does not know, such as medians. It needs more values than t: below about ten the
    interval is too narrow, and for means of few seeds `mean_interval` is the honest one.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    _check_values(values)
    check_confidence(confidence)
    whole = float(statistic(values))
    if len(set(values)) == 1:
        return whole, whole, whole
    found = bootstrap(
        (values,), lambda x: statistic(list(x)), vectorized=False, confidence_level=confidence, rng=seed
    ).confidence_interval
    return whole, float(found.low), float(found.high)
