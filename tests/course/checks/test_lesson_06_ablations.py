"""The checks of lesson 06, ablations: what they say to answers that they do not know themselves."""

import numpy as np
from helpers.exercises import SOLVED, assert_refused, each_mistake

from lorakit.experiments import stats


def worded(low, high):
    return "a is higher" if low > 0 else "b is higher" if high < 0 else "cannot be separated"


def by_arms(a, b):
    """The interval of a difference between arms that are not paired."""
    found = stats.difference(list(a.values()), list(b.values()))
    return found.low, found.high


def overlapping(a, b):
    (_, low, high), (_, least, most) = (stats.mean_interval(list(arm.values())) for arm in (a, b))
    return low - most, high - least


def unpaired(interval, least=2):
    return lambda a, b: worded(*interval(a, b)) if min(len(a), len(b)) >= least else "cannot be separated"


def paired(interval, least=2):
    def verdict(a, b):
        gaps = [a[seed] - b[seed] for seed in a if seed in b]
        return worded(*interval(gaps)) if len(gaps) >= least else "cannot be separated"

    return verdict


def around(gaps, factor):
    half = factor * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    return np.mean(gaps) - half, np.mean(gaps) + half


def confounded(**settings):
    """Right, but for runs that all have these settings."""
    return lambda a, b: SOLVED["check_confounds"](*([run | settings for run in arm] for arm in (a, b)))


def with_all_rates(a, b):
    found, rates = SOLVED["check_confounds"](a, b), ({run["lr"] for run in arm} for arm in (a, b))
    return sorted({*found, "rates"} if next(rates) != next(rates) else found)


def flattered(runs):
    """Each rank at the rate that is best on all its seeds, the scored ones included."""
    found = []
    for rank in {run["rank"] for run in runs}:
        own = [run for run in runs if run["rank"] == rank]
        best = max({run["lr"] for run in own}, key=lambda lr: np.mean([r["correct"] for r in own if r["lr"] == lr]))
        found += [run for run in own if run["lr"] == best]
    return SOLVED["check_rank_table"](found)


def edge_of_the_best_run(a, b):
    best = [max(arm, key=lambda run: run["correct"])["lr"] for arm in (a, b)]
    ends = [
        rate in (min(r["lr"] for r in arm), max(r["lr"] for r in arm)) for rate, arm in zip(best, (a, b), strict=True)
    ]
    return sorted({*without("edge")(a, b), "edge"} if any(ends) else without("edge")(a, b))


def edge_of_one_arm(a, b):
    return without("edge")(a, b) if "edge" not in SOLVED["check_confounds"](b, b) else SOLVED["check_confounds"](a, b)


def with_other_ends(a, b):
    found, ends = (
        SOLVED["check_confounds"](a, b),
        ({max(r["lr"] for r in arm), min(r["lr"] for r in arm)} for arm in (a, b)),
    )
    return sorted({*found, "range"} if next(ends) != next(ends) else found)


def without(name):
    return lambda a, b: [each for each in SOLVED["check_confounds"](a, b) if each != name]


def designed(seeds=range, **other):
    """Right, but for the seeds, of which `seeds` gets the number, or other entries of the grid."""

    def design(*inputs):
        grid = SOLVED["check_design"](*inputs)
        return grid | {"seed": list(seeds(len(grid["seed"])))} | other

    return design


def never_refused(ranks, alphas, rates, seconds, minutes, least=0):
    fit = max(least, int(60 * minutes / (seconds * len(ranks) * len(alphas) * len(rates))))
    return {"rank": ranks, "alpha": alphas, "lr": rates, "seed": list(range(fit))}


def refused_in_silence(*inputs):
    try:
        return SOLVED["check_design"](*inputs)
    except ValueError:
        raise ValueError("expected more minutes") from None


def at_the_best_run(runs):
    best = {
        rank: max((r for r in runs if r["rank"] == rank), key=lambda r: r["correct"])["lr"] for rank in (1, 4, 16, 64)
    }
    return SOLVED["check_rank_table"]([run for run in runs if run["lr"] == best[run["rank"]]])


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_seeds_needed": [
        (lambda scatter, half: max(2, round((1.96 * scatter / half) ** 2 + 0.5)), "has z = 1.96"),
        (lambda scatter, half: (1.96 * scatter / half) ** 2, "should be"),
        (lambda scatter, half: str(SOLVED["check_seeds_needed"](scatter, half)), "should be a tensor or a number"),
    ],
    "check_rank_table": [
        (lambda runs: [row[1:] for row in SOLVED["check_rank_table"](runs)], "tuples of five numbers"),
        (lambda runs: {row[0]: row[1:] for row in SOLVED["check_rank_table"](runs)}, "tuples of five numbers"),
        (lambda runs: SOLVED["check_rank_table"](runs)[::-1], "sorted by rank"),
        (lambda runs: SOLVED["check_rank_table"](runs)[:1], "expected 4 rows, one a rank, got 1"),
        (at_the_best_run, "mean is at the rate with the best single run"),
        (
            flattered,
            "mean is at the rate that is best on all seeds: the scored one has taken part in the choice",
        ),
    ],
    "check_verdict": [
        (unpaired(by_arms), "seed by seed"),
        (unpaired(overlapping), "seed by seed"),
        (unpaired(lambda a, b: [np.mean([*a.values()]) - np.mean([*b.values()])] * 2, least=1), "holds zero"),
        (paired(lambda gaps: around(gaps, 0)), "holds zero"),
        (paired(lambda gaps: (min(gaps), max(gaps))), "holds zero"),
        (paired(lambda gaps: around(gaps, 1.96)), "Student"),
        (paired(lambda gaps: stats.mean_interval(gaps, 0.9)[1:]), "both sides"),
        (paired(lambda gaps: (gaps[0], gaps[0]), least=1), "it should be"),
        (lambda a, b: SOLVED["check_verdict"](b, a), "turned round"),
        (lambda a, b: SOLVED["check_verdict"](dict.fromkeys(b, 0) | a, dict.fromkeys(a, 0) | b), "it should be"),
        (lambda a, b: "equal", "expected one of"),
        (lambda a, b: "higher", "expected one of"),
        (lambda a, b: "cannot be separated", "what a seed does to both arms cancels"),
    ],
    "check_confounds": [
        *((without(name), f"{name} is not in the answer, and should be") for name in ("alpha", "scale", "rates")),
        (without("seeds"), "which seeds there are"),
        (confounded(rank=1), "it is alpha / rank of each run"),
        (with_all_rates, "how many learning rates were tried, not which"),
        (without("range"), "the largest rate over the smallest"),
        (with_other_ends, "which tells how far an arm was searched, whatever they are"),
        (without("edge"), "edge is not in the answer, and should be: an arm's best rate"),
        (edge_of_one_arm, "edge is not in the answer, and should be: an arm's best rate"),
        (edge_of_the_best_run, "edge should not be in the answer: an arm's best rate, by the mean"),
        (confounded(batch_size=1), "steps * batch_size / n"),
        (confounded(batch_size=1, n=1), "steps * batch_size / n"),
        (confounded(n=1), "steps * batch_size / n"),
        (lambda a, b: SOLVED["check_confounds"](a[:1], b[:1]), "edge should not be in the answer"),
        (lambda a, b: SOLVED["check_confounds"](a, b)[::-1], "a sorted list"),
        (lambda a, b: SOLVED["check_confounds"](a, b) * 2, "each once"),
        (lambda a, b: [*SOLVED["check_confounds"](a, b), "rank"], "expected names out of"),
        (lambda a, b: ",".join(SOLVED["check_confounds"](a, b)), "expected a list of names"),
        (lambda a, b: [], "is not in the answer"),
    ],
    "check_design": [
        (lambda *inputs: never_refused(*inputs, least=5), "expected a ValueError"),
        (never_refused, "five are needed"),
        (refused_in_silence, "should say how many minutes five seeds need, 20.0"),
        (designed(lambda fit: range(fit + 1)), "round down"),
        (designed(lambda fit: range(fit - 1)), "one more fits"),
        (designed(lambda fit: range(1, fit + 1)), "seeds should be 0 to"),
        (designed(lambda fit: [fit]), "a number is one seed"),
        (designed(seed=7), "a number is one seed"),
        (designed(lambda fit: range(12 * fit)), "ranks times alphas times rates"),
        (designed(lambda fit: range(3)), "seeds should be 0 to"),
        (designed(alpha="2r"), "alpha should be all that was given"),
        (designed(lr=[1e-3]), "lr should be all that was given"),
        (designed(steps=[300]), "expected exactly rank, alpha, lr and seed"),
        (lambda *inputs: [SOLVED["check_design"](*inputs)], "expected a grid"),
    ],
}


@each_mistake("06_ablations", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
