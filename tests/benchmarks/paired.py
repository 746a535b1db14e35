"""Paired timing: the arms of a comparison take turns in one process, and every ratio is between neighbours."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Comparison:
    """The measurements of a comparison, arm by arm, in order; the first arm is the one to be compared with."""

    unit: str
    values: dict[str, list[float]]

    def ratios(self, arm: str) -> list[float]:
        """What an arm takes as a share of the first one, round by round."""
        first = next(iter(self.values.values()))
        return [ours / theirs for ours, theirs in zip(self.values[arm], first, strict=True)]

    def record(self) -> dict:
        """Medians, ranges and every value, as JSON takes them."""
        arms = {}
        for arm, values in self.values.items():
            ratios = self.ratios(arm)
            arms[arm] = {
                "median": statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "values": values,
            }
        return {"unit": self.unit, "arms": arms}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(arms: dict[str, Callable[[], object]], rounds: int, warm: int = 1) -> Comparison:
    """Times each arm once a round, in turn, after `warm` rounds that do not count; an arm can return its seconds."""
    for _ in range(warm):
        for work in arms.values():
            work()
    values: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, work in arms.items():
            start = time.perf_counter()
            own = work()
            values[arm].append(own if isinstance(own, float) else time.perf_counter() - start)
    return Comparison("s", values)


def rounds_from(default: int) -> int:
    """How many rounds to do; the environment can ask for fewer."""
    return int(os.environ.get("ROUNDS", default))
