"""How often the rule for comparisons is wrong, and what it sees, on planted records; prints a table, minutes.

    PYTHONPATH=tests python tests/benchmarks/verdicts.py [repetitions]

The tests in tests/experiments/test_verdicts.py hold the same on fewer repetitions.
"""

import sys
from dataclasses import replace

import numpy as np
from helpers.planted import Plant, by_seed

from lorakit.experiments.verdicts import compare, compare_all

UNDECIDED = "cannot be separated"
PAIRS = {
    "zero, no scatter": Plant((0.5, 0.5), (0, 0)),
    "zero, scatter 5 points": Plant((0.5, 0.5), (0.05, 0.05)),
    "zero, scatter 10 points, 80 %": Plant((0.8, 0.8), (0.1, 0.1)),
    "zero, 4 against 12 points": Plant((0.5, 0.5), (0.04, 0.12)),
    "zero, ceiling": Plant((0.97, 0.97), (0.02, 0.02)),
    "zero, floor": Plant((0.02, 0.02), (0.01, 0.01)),
    "zero, skewed: 93 %, 2 against 6": Plant((0.93, 0.93), (0.02, 0.06)),
    "zero, skewed: 5 %, 1 against 5": Plant((0.05, 0.05), (0.01, 0.05)),
    "small: 50 and 53 %": Plant((0.5, 0.53), (0.05, 0.05)),
    "large: 50 and 70 %": Plant((0.5, 0.7), (0.1, 0.1)),
    "large: 75 and 95 %": Plant((0.75, 0.95), (0.1, 0.03)),
}
MANY = {
    "six zeros, alike": Plant((0.6,) * 7, (0.08,) * 7),
    "six zeros, one unlike": Plant((0.5,) * 7, (0.04,) * 6 + (0.12,)),
    "six zeros, the control unlike": Plant((0.5,) * 7, (0.12,) + (0.04,) * 6),
    "fourteen zeros, ceiling": Plant((0.95,) * 15, (0.03,) * 15),
    "six, all 20 points higher": Plant((0.5,) + (0.7,) * 6, (0.08,) * 7),
}


def one(plant: Plant, shares: np.ndarray) -> list:
    return [compare(by_seed(shares[1]), by_seed(shares[0]), plant.questions)]


def many(plant: Plant, shares: np.ndarray) -> list:
    arms = {str(k): by_seed(row) for k, row in enumerate(shares[1:])}
    return list(compare_all(arms, by_seed(shares[0]), plant.questions).values())


def main(times: int) -> None:
    print(f"{times} repetitions; shares of them in %: any arm separated, the first; intervals that hold the truth")
    for name, plant in (PAIRS | MANY).items():
        for seeds in (3, 5, 10):
            for questions in (64, 256):
                this = replace(plant, seeds=seeds, questions=questions)
                found = this.judged(one if name in PAIRS else many, times)
                truth = plant.means[1] - plant.means[0]
                any_, first, held = (
                    100 * np.mean(list(each))
                    for each in (
                        (any(v.outcome != UNDECIDED for v in row) for row in found),
                        (row[0].outcome != UNDECIDED for row in found),
                        (v.low <= truth <= v.high for row in found for v in row),
                    )
                )
                smallest = 100 * np.mean([row[0].smallest for row in found])
                print(
                    f"{name:32} {seeds:2} seeds, {questions:3} questions: {any_:5.1f} {first:5.1f} {held:5.1f};"
                    f" {smallest:4.1f} points would have been seen",
                    flush=True,
                )
    rng = np.random.default_rng(0)
    for seeds in (5, 10):
        values = rng.normal(size=(2000, seeds))
        means = values[np.arange(2000)[:, None, None], rng.integers(seeds, size=(2000, 999, seeds))].mean(2)
        low, high = np.quantile(means, [0.025, 0.975], axis=1)
        print(
            f"a percentile bootstrap of {seeds} normal values holds the mean in {100 * np.mean(low * high < 0):.1f} %"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
