"""The checks of lesson 06, ablations: what they say to answers that they do not know themselves."""

import numpy as np
from helpers.exercises import SOLVED, assert_refused, each_mistake

from lorakit.experiments import stats


def said(low, high):
    return "higher" if low > 0 else "lower" if high < 0 else "cannot be separated"


def overlapping(a, b):
    (_, low, high), (_, least, most) = stats.mean_interval(a), stats.mean_interval(b)
    return said(low - most, high - least)


def erred(values):
    return np.std(values, ddof=1) / np.sqrt(len(values))


def paired_by(interval=None, seeds=lambda a, b: [s for s in a if s in b], least=2, turn=1):
    """A wrong verdict: `interval(gaps)` of the differences of the `seeds`; with fewer than `least`, none."""

    def verdict(a, b):
        gaps = [turn * (a.get(s, 0) - b.get(s, 0)) for s in seeds(a, b)]
        if len(gaps) < least:
            return "cannot be separated"
        _, low, high = interval(gaps) if interval else stats.mean_interval(gaps)
        return "a is higher" if low > 0 else "b is higher" if high < 0 else "cannot be separated"

    return verdict


def verdict_by(rule, least=2):
    """A wrong verdict by two lists, whatever their seeds."""

    def verdict(a, b):
        if min(len(a), len(b)) < least:
            return "cannot be separated"
        said = rule(list(a.values()), list(b.values()))
        return {"higher": "a is higher", "lower": "b is higher"}.get(said, said)

    return verdict


def confounded(*without, **others):
    """A wrong list of confounds: without some names, or with another function of a run for some."""
    values = {
        "alpha": lambda run: run["alpha"],
        "scale": lambda run: run["alpha"] / run["rank"],
        "steps": lambda run: run["steps"],
        "epochs": lambda run: run["steps"] * run["batch_size"] / run["n"],
        "seeds": lambda run: run["seed"],
    } | others

    def confounds(a, b):
        found = [name for name, value in values.items() if set(map(value, a)) != set(map(value, b))]
        if "rates" not in values:
            found += ["rates"] if len({run["lr"] for run in a}) != len({run["lr"] for run in b}) else []
        return sorted(set(found) - set(without))

    return confounds


def designed(seeds=None, error="expected 12 minutes", **changed):
    """A wrong design: `seeds(fit)` of the seeds that fit, not rounded; other entries of the grid."""

    def design(ranks, alphas, rates, seconds, minutes):
        fit = 60 * minutes / (seconds * len(ranks) * len(alphas) * len(rates))
        if seeds is None and fit < 3:
            raise ValueError(error)
        values = seeds(fit) if seeds else range(int(fit))
        return {"rank": ranks, "alpha": alphas, "lr": rates, "seed": list(values)} | changed

    return design


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
        (at_the_best_run, "rank 64, mean is at the rate with the best single run"),
    ],
    "check_verdict": [
        (verdict_by(lambda a, b: stats.difference(a, b).verdict), "seed by seed"),
        (verdict_by(overlapping), "seed by seed"),
        (verdict_by(lambda a, b: said(np.mean(a) - np.mean(b), np.mean(a) - np.mean(b)), least=1), "holds zero"),
        (paired_by(lambda gaps: (0, np.mean(gaps), np.mean(gaps))), "holds zero"),
        (paired_by(lambda gaps: (0, min(gaps), max(gaps))), "holds zero"),
        (
            paired_by(lambda gaps: (0, np.mean(gaps) - 1.96 * erred(gaps), np.mean(gaps) + 1.96 * erred(gaps))),
            "Student",
        ),
        (paired_by(lambda gaps: stats.mean_interval(gaps, 0.9)), "both sides"),
        (paired_by(turn=-1), "turned round"),
        (paired_by(seeds=lambda a, b: sorted({*a, *b})), "it should be"),
        (paired_by(lambda gaps: (0, gaps[0], gaps[0]), least=1), "it should be"),
        (lambda a, b: "equal", "expected one of"),
        (lambda a, b: "higher", "expected one of"),
        (lambda a, b: "cannot be separated", "what a seed does to both arms cancels"),
    ],
    "check_confounds": [
        (confounded("scale"), "scale differs, and is not in the answer"),
        (confounded("alpha"), "alpha differs, and is not in the answer"),
        (confounded(scale=lambda run: run["alpha"]), "it is alpha / rank of each run"),
        (confounded(rates=lambda run: run["lr"]), "how many learning rates were tried, not which"),
        (confounded("rates"), "rates differs, and is not in the answer"),
        (confounded(epochs=lambda run: run["steps"] / run["n"]), "steps * batch_size / n"),
        (confounded(epochs=lambda run: run["steps"]), "steps * batch_size / n"),
        (confounded(epochs=lambda run: run["steps"] * run["batch_size"]), "steps * batch_size / n"),
        (confounded("seeds"), "which seeds there are"),
        (lambda a, b: SOLVED["check_confounds"](a[:1], b[:1]), "rates differs, and is not in the answer"),
        (lambda a, b: SOLVED["check_confounds"](a, b)[::-1], "a sorted list"),
        (lambda a, b: SOLVED["check_confounds"](a, b) * 2, "each once"),
        (lambda a, b: [*SOLVED["check_confounds"](a, b), "rank"], "expected names out of"),
        (lambda a, b: ",".join(SOLVED["check_confounds"](a, b)), "expected a list of names"),
        (lambda a, b: [], "is not in the answer"),
    ],
    "check_design": [
        (designed(lambda fit: range(max(3, int(fit)))), "expected a ValueError"),
        (designed(lambda fit: range(int(fit))), "three are needed"),
        (designed(lambda fit: range(int(np.ceil(fit)))), "round down"),
        (designed(error="expected more minutes"), "should say how many minutes three seeds need, 12.0"),
        (designed(lambda fit: range(int(fit) - 1)), "one more fits"),
        (designed(lambda fit: range(1, int(fit) + 1)), "seeds should be 0 to"),
        (designed(lambda fit: [int(fit)]), "a number is one seed"),
        (designed(seed=5), "a number is one seed"),
        (designed(lambda fit: range(int(12 * fit))), "ranks times alphas times rates"),
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
