"""Simulated records whose truth is known: shares of right answers of arms that share seeds, judged by a rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, binom, norm


@dataclass(frozen=True)
class Plant:
    """Arms with known shares; the first is the control."""

    means: Sequence[float]  # the true share of each arm, the mean over all seeds
    scatters: Sequence[float]  # its standard deviation over seeds, before questions are drawn; all 0 without
    seeds: int = 5
    questions: int = 128  # that each seed's share is of
    shared: float = 0.5  # how much of the scatter is the seed's, common to all arms: a correlation of normal scores

    def records(self, rng: np.random.Generator, times: int) -> np.ndarray:
        """Shares of right answers, (times, arms, seeds): a beta distribution over seeds, a binomial over questions.

        The scatter is that of a beta distribution, so that true means are exact beside 0 and 1, too.
        """
        own = rng.normal(size=(times, len(self.means), self.seeds))
        score = np.sqrt(self.shared) * rng.normal(size=(times, 1, self.seeds)) + np.sqrt(1 - self.shared) * own
        uniform, found = norm.cdf(score), np.empty_like(own)
        for k, (mean, scatter) in enumerate(zip(self.means, self.scatters, strict=True)):
            size = mean * (1 - mean) / scatter**2 - 1 if scatter else 0
            truth = beta.ppf(uniform[:, k], mean * size, (1 - mean) * size) if scatter else mean
            found[:, k] = rng.binomial(self.questions, truth, size=found[:, k].shape) / self.questions
        return found

    def judged(self, judge: Callable, times: int, seed: int = 0) -> list:
        """What a rule says of each of many repetitions: `judge(plant, records)` with records (arms, seeds)."""
        return [judge(self, each) for each in self.records(np.random.default_rng(seed), times)]


def by_seed(shares: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(map(float, shares)))


def at_most(share: float, times: int, doubt: float = 1e-3) -> int:
    """The largest count of events that a true rate of `share` reaches with a probability of at least `doubt`."""
    return int(binom.isf(doubt, times, share))
