"""The checks of lesson 06's exercises: how many seeds, the rank table, a paired verdict, confounds, a design."""

import math
import re
from collections.abc import Iterator
from statistics import fmean, pstdev, stdev
from typing import Any

from scipy.stats import norm, t

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import CheckFailed, ask, require
from lorakit.experiments.records import expand
from lorakit.experiments.stats import difference, mean_interval

SCATTERS = [
    (17.0, 5.0),
    (5.0, 5.0),
    (5.0, 2.0),
    (2.0, 0.5),
    (1.0, 9.0),
    (3.0, 1.0),
    (8.0, 5.0),
]  # points: scatter, half width
ACCURACY = {  # rank -> rate -> accuracy of seeds 0, 1, 2
    16: {1e-3: [0.80, 0.60, 0.62], 4e-3: [0.61, 0.60, 0.95], 1.6e-2: [0.10, 0.05, 0.30]},
    1: {1e-3: [0.16, 0.48, 0.52], 4e-3: [0.11, 0.46, 0.57], 1.6e-2: [0.27, 0.56, 0.17]},
    64: {1e-3: [0.45, 0.51, 0.44], 4e-3: [0.46, 0.50, 0.30], 1.6e-2: [0.18, 0.07, 0.42]},
    4: {1e-3: [0.13, 0.28, 0.10], 4e-3: [0.12, 0.20, 0.38], 1.6e-2: [0.39, 0.50, 0.20]},
}
PAIRS = [  # two arms, seed -> accuracy
    ({0: 0.60, 1: 0.80, 2: 0.95, 3: 0.70}, {0: 0.57, 1: 0.76, 2: 0.92, 3: 0.66}, "in every pair, by 3 or 4 points"),
    ({0: 0.57, 1: 0.76, 2: 0.92, 3: 0.66}, {3: 0.70, 2: 0.95, 1: 0.80, 0: 0.60}, "the same, turned round"),
    ({0: 0.90, 1: 0.80, 2: 0.94}, {0: 0.85, 1: 0.83, 2: 0.86}, "a mean that is higher, pairs that disagree"),
    ({0: 0.50, 1: 0.75}, {0: 0.25, 1: 0.50}, "equal differences"),
    ({0: 0.50, 1: 0.75}, {0: 0.50, 1: 0.75}, "equal arms"),
    ({0: 0.90, 1: 0.91, 2: 0.92}, {2: 0.50}, "one shared seed"),
    ({0: 0.9, 4: 0.91}, {1: 0.5, 2: 0.51}, "no shared seed"),
    ({0: 0.61, 1: 0.70, 2: 0.66, 9: 0.0}, {2: 0.60, 0: 0.55, 1: 0.65, 7: 0.99}, "seeds that the other lacks"),
    ({0: 0.70, 1: 0.74, 2: 0.72}, {0: 0.66, 1: 0.73, 2: 0.69}, "three pairs, 1 to 4 points apart"),
]
BASE = {"rank": 4, "alpha": 8, "lr": 1e-3, "steps": 100, "batch_size": 8, "n": 400, "seed": 0, "correct": 0.5}
NAMES = ("alpha", "edge", "epochs", "range", "rates", "scale", "seeds", "steps")
LEAST = 5  # seeds, as for a ranking by `compare`
DESIGNS = [  # ranks, alphas, rates, seconds a run, minutes
    ([1, 8, 64], [16, 128], [1e-3, 4e-3], 10, 15),
    ([4, 16], [32], [5e-4, 1e-3, 2e-3], 30, 20),
    ([1, 4], [16, 64], [1e-3], 7.5, 2.5),
    ([2, 8], [16], [1e-3, 2e-3], 60, 19),
    ([2], [16], [1e-3], 1, 1.0),
]


@exercise("right: what a difference costs in seeds")
def check_seeds_needed() -> Iterator[Case]:
    """Checks `seeds_needed(scatter, half) -> n`: how many seeds give a mean's 95 % interval that half width."""
    for scatter, half in SCATTERS:
        want = _enough(lambda n: t.ppf(0.975, n - 1) / math.sqrt(n), scatter, half)
        hints = {hint: _enough(width, scatter, half) for hint, width in WIDTHS.items()}
        hints["is the last one that is too few"] = want - 1
        yield Case(f"scatter {scatter:g}, half {half:g}", (scatter, half), want, hints)


WIDTHS = {  # mistake -> half an interval's width for n seeds of scatter 1
    "has z = 1.96: with few seeds Student's t is larger": lambda n: norm.ppf(0.975) / math.sqrt(n),
    "has t with n degrees of freedom: the mean uses up one": lambda n: t.ppf(0.975, n) / math.sqrt(n),
    "takes the whole width for half of it": lambda n: 2 * t.ppf(0.975, n - 1) / math.sqrt(n),
    "is that of a 90 % interval: 2.5 % lie on either side": lambda n: t.ppf(0.95, n - 1) / math.sqrt(n),
    "lets the standard error be as large as the half width: where is t?": lambda n: 1 / math.sqrt(n),
    "divides by n: a mean of n scatters by 1 / sqrt(n)": lambda n: t.ppf(0.975, n - 1) / n,
    "is one too many: `scatter` over sqrt(n), not sqrt(n - 1), and at most `half`": lambda n: (
        t.ppf(0.975, n - 1) / (n - 1) ** 0.5
    ),
    "is 1: one run has no scatter and no interval": None,
}


def _enough(width: Any, scatter: float, half: float) -> int:
    """The first n of at least two whose interval is narrow enough; 1 without a width."""
    return next(n for n in range(2, 10_000) if scatter * width(n) <= half) if width else 1


def _rows(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    try:
        rows = [tuple(float(value) for value in row) for row in got]
    except (TypeError, ValueError, RuntimeError):
        rows = []
    ranks = [row[0] for row in case.right]
    require(bool(rows) and {len(row) for row in rows} == {5}, case.on, "expected a list of tuples of five numbers")
    require(len(rows) == len(ranks), case.on, f"expected {len(ranks)} rows, one a rank, got {len(rows)}")
    sorts = [row[0] for row in rows] == ranks
    require(sorts, case.on, "the rows should be sorted by rank, the smallest first")
    for rank, *row in rows:
        yield from zip((f"rank {rank:g}, {name}" for name in ("trainable", "mean", "low", "high")), row, strict=True)


@exercise("right: each seed at the rate that the others choose, with an interval over seeds", _rows)
def check_rank_table() -> Iterator[Case]:
    """Checks `rank_table(runs) -> [(rank, trainable, mean, low, high), ...]`: seeds at the others' rate."""
    runs = [
        {"rank": rank, "lr": lr, "seed": seed, "trainable": 1000 * rank, "correct": correct}
        for rank, rates in ACCURACY.items()
        for lr, accuracies in rates.items()
        for seed, correct in enumerate(accuracies)
    ]
    runs = runs[5::-1] + runs[:5:-1]
    for ranks in (sorted(ACCURACY), [4, 64]):
        chosen = [run for run in runs if run["rank"] in ranks]
        rows = [in_parts((rank, {}), *_row(rank, [ACCURACY[each] for each in ranks])) for rank in ranks]
        wrong = {hint: [wrong[hint] for _, wrong in rows] for hint in rows[0][1]}
        on = f"{len(chosen)} runs of ranks {', '.join(map(str, ranks))}"
        yield Case(on, (chosen,), [right for right, _ in rows], wrong)


def _row(rank: int, all_rates: list[dict]) -> list[tuple[float, dict[str, float]]]:
    """Trainable, mean, low and high of a rank, each with what mistakes make of it."""
    rates = ACCURACY[rank]
    every = [value for values in rates.values() for value in values]
    common = max(rates, key=lambda lr: fmean(fmean(each[lr]) for each in all_rates))
    luckiest, of_seed_0 = max(rates.values(), key=max), max(rates.values(), key=lambda values: values[0])
    scored = _scored(rates, min)
    means = {
        "is at the rate with the best single run: compare means over seeds": fmean(luckiest),
        "is at the rate that is best on all seeds: the scored one has taken part in the choice, which flatters it": max(
            map(fmean, rates.values())
        ),
        "is the best single run: one lucky seed is no result": max(every),
        "is the mean over all rates: bad rates are not the rank's fault": fmean(every),
        "is at the rate that is best for seed 0": fmean(of_seed_0),
        "is at one rate for all ranks: each should have its own best": fmean(rates[common]),
        "is at the smallest rate": fmean(rates[min(rates)]),
        "is at the largest rate": fmean(rates[max(rates)]),
        "is the mean of each seed's best rate: a seed must not choose for itself": fmean(
            map(max, zip(*rates.values(), strict=True))
        ),
        "takes the larger rate where two are equally good for the other seeds": fmean(_scored(rates, max)),
        "is the median": sorted(scored)[1],
    }
    half = mean_interval(scored)[2] - fmean(scored)
    error = stdev(scored) / math.sqrt(len(scored))
    widths = {
        "is that of the normal distribution: three seeds need Student's t": 1.959964 * error,
        "is one standard error away": error,
        "is one standard deviation away: that is how runs scatter, not how sure the mean is": stdev(scored),
        "is from the population's standard deviation: divide by n - 1": half * pstdev(scored) / stdev(scored),
        "has t with n degrees of freedom: the mean uses up one": half * t.ppf(0.975, 3) / t.ppf(0.975, 2),
        "is that of a 90 % interval: 2.5 % lie on either side": half * t.ppf(0.95, 2) / t.ppf(0.975, 2),
        "is t times the standard deviation: a mean scatters less, by sqrt(n)": half * math.sqrt(3),
    }
    row: list[tuple[float, dict[str, float]]] = [
        (1000 * rank, {"is the rank: `trainable` is asked for": rank}),
        (fmean(scored), means),
    ]
    for sign, extreme in ((-1, min(scored)), (1, max(scored))):
        hints = {hint: fmean(scored) + sign * width for hint, width in widths.items()}
        hints["is the worst or best seed"] = extreme
        hints["is on the other side of the mean: first low, then high"] = fmean(scored) - sign * half
        hints["is the half width: add it to the mean"] = half
        row.append((fmean(scored) + sign * half, hints))
    return row


def _scored(rates: dict[float, list[float]], of_equals: Any) -> list[float]:
    """Each seed's accuracy at the rate that has the best mean over the other seeds."""
    seeds = range(len(next(iter(rates.values()))))
    found = []
    for seed in seeds:
        means = {lr: fmean(row[each] for each in seeds if each != seed) for lr, row in rates.items()}
        found.append(rates[of_equals(lr for lr in rates if math.isclose(means[lr], max(means.values())))][seed])
    return found


def check_verdict(verdict: Any) -> None:
    """Checks `verdict(a, b) -> "a is higher", "b is higher" or "cannot be separated"`, by pairs of one seed."""
    for a, b, on in PAIRS:
        got = ask(verdict, a, b, on=on)
        answers = ("a is higher", "b is higher", "cannot be separated")
        require(got in answers, on, f"expected one of {', '.join(map(repr, answers))}, got {got!r}")
        seeds = sorted(set(a) & set(b))
        want = answers[2]
        if len(seeds) > 1:
            found = difference([a[s] for s in seeds], [b[s] for s in seeds], paired=True)
            want = {"higher": answers[0], "lower": answers[1]}.get(found.verdict, answers[2])
        if got == want:
            continue
        if len(seeds) < 2:
            hint = "fewer than two shared seeds leave no differences to take an interval of"
        elif want == answers[2]:
            hint = "the interval of the mean difference holds zero: Student's t, n - 1 degrees of freedom, both sides"
        elif got == answers[2]:
            hint = "take the differences seed by seed, for shared seeds: what a seed does to both arms cancels"
        else:
            hint = "the sign is turned round: a minus b"
        raise CheckFailed(f"{on}: it should be {want!r}, got {got!r}: {hint}")
    print("right: pairs decide what arms alone cannot")


def check_confounds(confounds: Any) -> None:
    """Checks `confounds(a, b) -> names`: what else than the rank may stand behind a difference between two arms."""
    for on, first, second, want in _confounded():
        got = ask(confounds, first, second, on=on)
        require(isinstance(got, list | tuple | set), on, "expected a list of names")
        got = list(map(str, got))
        strange = sorted(set(got) - set(NAMES))
        require(not strange, on, f"expected names out of {', '.join(NAMES)}, got {strange}")
        for name in NAMES:
            require(name in got or name not in want, on, f"{name} is not in the answer, and should be: {_WHY[name]}")
            require(name in want or name not in got, on, f"{name} should not be in the answer: {_WHY[name]}")
        require(got == sorted(want), on, "the names should be a sorted list, each once")
    print("right: nothing hides behind the rank")


_WHY = {
    "alpha": "it is the set of alphas that each arm's runs have",
    "scale": "it is alpha / rank of each run, not alpha",
    "steps": "it is the set of steps that each arm's runs have",
    "epochs": "it is steps * batch_size / n, how often each example is seen",
    "rates": "it is how many learning rates were tried, not which: each arm may have its own",
    "range": "it is the largest rate over the smallest, which tells how far an arm was searched, whatever they are",
    "edge": "an arm's best rate, by the mean of `correct` over its runs, is the smallest or the largest that it tried",
    "seeds": "it is which seeds there are, whatever their order, in all runs of the arm",
}


def _confounded() -> list[tuple[str, list[dict], list[dict], set[str]]]:
    """Arms of rank 4 and 16: what they are, the runs of each, what differs."""

    def arm(rank=16, rates=(5e-4, 1e-3, 2e-3), seeds=(0, 1), best=1, **changed):
        rows = [BASE | {"rank": rank, "lr": lr, "seed": seed} | changed for lr in rates for seed in seeds]
        return [row | {"correct": 0.5 - 0.2 * (row["lr"] != rates[best]) + 0.1 * row["seed"]} for row in rows]

    small = arm(rank=4)
    lucky = [row | {"correct": 0.75 if (row["lr"], row["seed"]) == (2e-3, 1) else row["correct"]} for row in arm()]
    four = (2.5e-4, 5e-4, 1e-3, 2e-3)
    return [
        ("alpha = 2r", small, arm(alpha=32), {"alpha"}),
        ("one alpha", small, arm(), {"scale"}),
        ("one alpha, and other rates", small, arm(rates=(2.5e-4, 5e-4, 1e-3)), {"scale"}),
        ("one alpha, rates closer together", small, arm(rates=(7e-4, 1e-3, 1.4e-3)), {"scale", "range"}),
        ("alpha = 2r, and a fourth rate", small, arm(rates=four, alpha=32), {"alpha", "rates", "range"}),
        ("one alpha, a fourth rate between", small, arm(rates=(5e-4, 7e-4, 1e-3, 2e-3)), {"scale", "rates"}),
        ("one alpha, a fixed rate", small, arm(rates=(1e-3,), best=0), {"scale", "rates", "range", "edge"}),
        ("one alpha, the best rate is the last", small, arm(best=2), {"scale", "edge"}),
        ("alpha = 2r, the first arm's best rate is its first", arm(rank=4, best=0), arm(alpha=32), {"alpha", "edge"}),
        ("one alpha, the best single run at the last rate", small, lucky, {"scale"}),
        ("alpha = 2r, twice the steps", small, arm(alpha=32, steps=200), {"alpha", "steps", "epochs"}),
        ("alpha = 2r, half the batch, more steps", small, arm(alpha=32, steps=200, batch_size=4), {"alpha", "steps"}),
        ("one alpha, half the data", small, arm(n=200), {"scale", "epochs"}),
        ("one alpha, half the batch", small, arm(batch_size=4), {"scale", "epochs"}),
        ("one alpha, other seeds", small, arm(seeds=(2, 3)), {"scale", "seeds"}),
        ("one alpha, seeds in another order", small, arm(seeds=(1, 0))[::-1], {"scale"}),
        ("one alpha, a longer last run", small, [*arm()[:-1], arm(steps=300)[-1]], {"scale", "steps", "epochs"}),
        ("both alphas in both arms", small + arm(rank=4, alpha=32), arm() + arm(alpha=32), {"scale"}),
        ("alpha and scale both different", small, arm(alpha=64), {"alpha", "scale"}),
    ]


def check_design(design: Any) -> None:
    """Checks `design(ranks, alphas, rates, seconds, minutes) -> grid`: as many seeds as fit, never below five."""
    for ranks, alphas, rates, seconds, minutes in DESIGNS:
        settings = len(ranks) * len(alphas) * len(rates)
        on = f"{len(ranks)} ranks, {len(alphas)} alphas, {len(rates)} rates, {seconds:g} s a run, {minutes:g} minutes"
        fit = int(60 * minutes / (seconds * settings) + 1e-9)
        try:
            grid = ask(design, ranks, alphas, rates, seconds, minutes, on=on)
        except CheckFailed as failed:
            if fit >= LEAST or not isinstance(failed.__cause__, ValueError):
                raise
            least = LEAST * settings * seconds / 60
            said = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(failed.__cause__))]
            told = any(abs(number - least) < 0.06 for number in said)
            require(told, on, f"the ValueError should say how many minutes five seeds need, {least:.1f}")
            continue
        require(fit >= LEAST, on, f"{fit} seeds fit, and five are needed: expected a ValueError")
        require(isinstance(grid, dict), on, "expected a grid: a dict of parameter -> list of values")
        require(sorted(grid) == ["alpha", "lr", "rank", "seed"], on, "expected exactly rank, alpha, lr and seed")
        wanted: dict[str, list] = {"rank": ranks, "alpha": alphas, "lr": rates, "seed": list(range(fit))}
        for name, values in wanted.items():
            given = list(grid[name]) if isinstance(grid[name], list | tuple | range) else [grid[name]]
            if name != "seed":
                require({*map(str, given)} == {*map(str, values)}, on, f"{name} should be all that was given")
                continue
            hints = {
                "a number is one seed: a list of them is needed": given == [fit],
                "all settings need their runs: ranks times alphas times rates": len(given) > 2 * fit,
                "the last one does not fit any more: round down": len(given) == fit + 1,
                "one more fits": len(given) == fit - 1,
            }
            hint = next((f": {text}" for text, holds in hints.items() if holds), "")
            require(given == values, on, f"seeds should be 0 to {fit - 1}, got {given[:12]}{hint}")
        require(len(expand(grid)) == settings * fit, on, "some runs are there twice")
    print("right: it fits, and five seeds are the least")
