"""The checks of lesson 05's exercises: DoRA's weight, a change of rates, a start in the weight, ranks, a trade-off."""

import math
from collections.abc import Iterator
from statistics import fmean, median, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, parts, random_matrix, require, same
from lorakit.experiments.stats import difference

MATRICES = [(24, 40, 3, 1.5), (40, 24, 4, 0.5), (16, 16, 2, 2.0)]  # d_out, d_in, rank, s
RANKS = [(24.0, 16, 64), (8.0, 64, 16), (16.0, 4, 4)]  # alpha, the rank that it is for, another rank
SPLITS = [(24, 40, 3, 2.0), (40, 24, 5, 0.5), (16, 16, 16, 1.0)]  # d_out, d_in, rank, s
SIZES = {"q_proj": 8, "k_proj": 6, "up_proj": 8, "down_proj": 10}  # directions of a layer
ARMS: list[dict[str, Any]] = [  # name, accuracies of three seeds, seconds of a step, bytes
    {"name": "LoRA", "accuracy": [0.94, 0.95, 0.93], "seconds": 1.0, "bytes": 900},
    {"name": "QLoRA", "accuracy": [0.80, 0.89, 0.86], "seconds": 1.3, "bytes": 400},
    {"name": "DoRA", "accuracy": [0.965, 0.975, 0.955], "seconds": 1.2, "bytes": 950},
    {"name": "large", "accuracy": [0.985, 0.975, 0.995], "seconds": 1.4, "bytes": 990},
    {"name": "slow", "accuracy": [0.93, 0.95, 0.94], "seconds": 1.5, "bytes": 950},
    {"name": "small", "accuracy": [0.70, 0.69, 0.71], "seconds": 1.0, "bytes": 350},
    {"name": "twin", "accuracy": [0.71, 0.69, 0.70], "seconds": 1.0, "bytes": 350},
    {"name": "lucky", "accuracy": [1.00, 0.78, 0.99], "seconds": 0.9, "bytes": 990},
    {"name": "steady", "accuracy": [0.91, 0.91, 0.92], "seconds": 1.1, "bytes": 850},
    {"name": "shaky", "accuracy": [0.99, 0.90, 0.86], "seconds": 1.1, "bytes": 850},
    {"name": "worst", "accuracy": [0.60, 0.62, 0.61], "seconds": 2.0, "bytes": 999},
]


@exercise("right: rows have the lengths m, and a fresh layer is its base", "weight, start")
def check_dora() -> Iterator[Case]:
    """Checks `dora(W, A, B, s, m) -> (weight, start)`: what a DoRA layer applies, and the m of a fresh one."""
    for seed, (d_out, d_in, rank, s) in enumerate(MATRICES):
        W, A, B = (
            random_matrix(*shape, seed=seed + k) for k, shape in enumerate([(d_out, d_in), (rank, d_in), (d_out, rank)])
        )
        m = random_matrix(d_out, seed=seed + 9).abs() + 0.5
        V, rows = W + s * B @ A, m[:, None]
        length = V.norm(dim=1, keepdim=True)
        weight = {
            "has the norms of columns: one length for each output is the norm of a row": rows * V / V.norm(dim=0),
            "is divided by one number: every row has a length of its own": rows * V / V.norm(),
            "is not divided by the lengths of W + s B A": rows * V,
            "is divided by the lengths of W: the update changes them": rows * V / W.norm(dim=1, keepdim=True),
            "has no s": rows * (W + B @ A) / (W + B @ A).norm(dim=1, keepdim=True),
            "has no m: the directions are right, the lengths are 1": V / length,
            "has m on the update alone: it is the length of the whole row": W + rows * s * B @ A / length,
            "is divided by the squares of the lengths": rows * V / length.square(),
            "is LoRA's": V,
            "is W alone, with new lengths: where is the update?": rows * W / W.norm(dim=1, keepdim=True),
        }
        start = {
            "is that of columns: one number for each output": W.norm(dim=0),
            "is of ones: then every row would have length 1 at first": torch.ones(d_out, dtype=torch.float32),
            "is the argument m: what must it be, so that a fresh adapter (B zero) changes nothing?": m,
            "is that of the trained rows: at the start B is zero": V.norm(dim=1),
            "is squared": W.square().sum(1),
            "should have shape (d_out,), without a second dimension": W.norm(dim=1, keepdim=True),
        }
        both = (rows * V / length, weight), (W.norm(dim=1), start)
        yield Case(f"W ({d_out}, {d_in}), rank {rank}, s {s}", (W, A, B, s, m), *in_parts(*both))


@exercise("right: at one rank a rate of B, from rank to rank an alpha that grows with the root", "ratio, new_alpha")
def check_equivalent() -> Iterator[Case]:
    """Checks `equivalent(alpha, rank, new_rank) -> (ratio, new_alpha)`: rsLoRA said in LoRA's terms."""
    for alpha, rank, new in RANKS:
        ratio = {
            "is rank: rsLoRA divides by its root": float(rank),
            "is upside down: rsLoRA's scale is the larger one": 1 / math.sqrt(rank),
            "is 1: the scales differ": 1.0,
            "is rsLoRA's scale: how many times LoRA's is that?": alpha / math.sqrt(rank),
            "is LoRA's scale: the ratio of the two is wanted": alpha / rank,
            "is that of new_rank: it is asked for at rank": math.sqrt(new),
        }
        want = alpha * math.sqrt(new / rank)
        new_alpha = {
            "keeps s itself: rsLoRA lets it fall with the root of the rank": alpha * new / rank,
            "is alpha: then s falls with the rank": alpha,
            "is the scale: times new_rank it is alpha": want / new,
            "is upside down": alpha * math.sqrt(rank / new),
            "grows with the square: s sqrt(r) is kept, not s / r": alpha * (new / rank) ** 2,
        }
        both = (math.sqrt(rank), ratio), (want, new_alpha)
        yield Case(f"alpha {alpha:g}, rank {rank}, new_rank {new}", (alpha, rank, new), *in_parts(*both))


def _split(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    on, (W, rank, _) = case.on, case.inputs
    A, B, residual = parts(got, "A, B, residual", on)
    A, B, residual = (as_tensor(*each) for each in ((A, on, "A"), (B, on, "B"), (residual, on, "residual")))
    require(residual.shape == W.shape, on, f"residual should have shape {tuple(W.shape)}, as W has")
    for name, factor, shape in (("A", A, (rank, W.shape[1])), ("B", B, (len(W), rank))):
        turned = f"got {tuple(factor.shape)}; is it transposed, or are A and B mixed up?"
        require(factor.shape == shape, on, f"{name} should have shape {shape}, {turned}")
    yield "the product B A", B @ A
    yield "residual", W.double() - residual  # which is never zero, as the residual of a full rank is
    shares = torch.stack([A.norm(dim=1), B.norm(dim=0)])
    require(same(shares[0], shares[1]), on, "A and B do not share the singular values: each gets their roots")


@exercise("right: the largest directions train, the rest stays, and nothing has changed yet", _split)
def check_pissa() -> Iterator[Case]:
    """Checks `pissa(W, rank, s) -> (A, B, residual)`: products, shares and what is left; signs are free."""
    for seed, (d_out, d_in, rank, s) in enumerate(SPLITS):
        W = random_matrix(d_out, d_in, seed=seed)
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        top = slice(rank), S[:rank]
        low = slice(-rank, None), S[-rank:] / s

        def factors(part: slice, values: Tensor, U=U, Vh=Vh) -> tuple[Tensor, Tensor]:
            return values.sqrt()[:, None] * Vh[part], U[:, part] * values.sqrt()

        A, B = factors(top[0], top[1] / s)
        update, keep = s * B @ A, W.double() - s * B @ A
        wrong = {
            "is W's part itself: with the scale in front it must be that, so divide by s": factors(*top),
            "holds the smallest directions: take the largest": factors(*low),
            "has the singular values in both factors: each gets their root": factors(top[0], top[1].square() / s),
            "has no singular values": factors(top[0], torch.ones(rank, dtype=torch.float64) / s),
            "is divided by s twice: by its root in each factor": factors(top[0], top[1] / s**2),
            "is multiplied by s: divide": factors(top[0], top[1] * s),
        }
        split = {hint: (*pair, keep) for hint, pair in wrong.items()} | {
            "is W: take s B A off": (A, B, W),
            "lacks the scale: it is W - s B A": (A, B, W.double() - update / s),
            "is the part that trains: the rest stays behind": (A, B, update),
            "is W + s B A: take it off": (A, B, W.double() + update),
        }
        yield Case(f"W ({d_out}, {d_in}), rank {rank}, s {s}", (W, rank, s), (A, B, keep), split)


def check_allocate(allocate: Any) -> None:
    """Checks `allocate(importance, budget) -> {layer: mask}`: the most important directions of all layers together."""
    for budget, ties in ((5, False), (11, False), (1, False), (9, True)):
        values = {kind: random_matrix(n, seed=n).abs() + n / 4 for kind, n in SIZES.items()}
        values |= {"q_proj": 0.1 * values["q_proj"]}
        values = {kind: torch.ones(n, dtype=torch.float32) for kind, n in SIZES.items()} if ties else values
        on = f"layers of {list(SIZES.values())} directions, budget {budget}" + (
            ", all equally important" if ties else ""
        )
        masks = ask(allocate, values, budget, on=on)
        named = isinstance(masks, dict) and set(masks) == set(SIZES)
        require(named, on, "expected a dict with a mask for each layer, by its name")
        require(list(masks) == list(SIZES), on, "the layers are in another order than they came in")
        given = {kind: as_tensor(masks[kind], on, f"the mask of {kind}") for kind in SIZES}
        for kind, mask in given.items():
            whole = mask.shape == (SIZES[kind],) and bool(((mask == 0) | (mask == 1)).all())
            require(whole, on, f"the mask of {kind} should have {SIZES[kind]} entries, True or False")
        kept, score = torch.cat(list(given.values())).bool(), torch.cat(list(values.values()))
        count, each = int(kept.sum()), [int(mask.sum()) for mask in given.values()]
        lowest = torch.zeros_like(kept).index_fill(0, score.argsort()[:budget], True)
        require(ties or count < len(kept), on, "everything is kept: the budget counts directions")
        require(ties or count != budget * len(SIZES), on, "the budget is for all layers together, not for each")
        even = len(set(each)) == 1 and each[0] in (budget // len(SIZES), -(-budget // len(SIZES)))
        require(ties or not even, on, "every layer keeps as many: compare directions of all layers")
        require(ties or not torch.equal(kept, lowest), on, "the least important are kept")
        many = f"{count} are kept: a threshold keeps all that equal it; exactly {budget} may stay"
        require(not ties or count <= budget, on, many)
        require(count == budget, on, f"{count} directions are kept, the budget is {budget}")
        best = score.sort(descending=True).values[:budget].sum()
        require(bool(score[kept].sum() >= best * (1 - 1e-6)), on, "more important directions than these are dropped")
    print("right: the budget goes where it matters, and not one direction more")


def _candidates(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    candidates, verdicts = parts(got, "candidates, verdicts", case.on)
    names = [arm["name"] for arm in case.inputs[0]]
    listed = isinstance(candidates, list | tuple | set) and all(isinstance(name, str) for name in candidates)
    require(listed and set(candidates) <= set(names), case.on, "candidates should be a list of the arms' names")
    require(len(set(candidates)) == len(candidates), case.on, "a candidate is named twice")
    yield "candidates", set(candidates)
    complete = isinstance(verdicts, dict) and set(verdicts) == set(names[1:])
    require(complete, case.on, "verdicts should have one entry for each arm but the first")
    yield "verdicts", verdicts


@exercise("right: who is worth a look, and what three seeds can tell apart", _candidates)
def check_tradeoff() -> Iterator[Case]:
    """Checks `tradeoff(arms) -> (candidates, verdicts)`: who is not beaten, and who differs from the first."""
    for arms in (ARMS, ARMS[:3], [ARMS[1], ARMS[0], *ARMS[3:5]]):
        first, others = arms[0]["accuracy"], arms[1:]
        rules = {
            "compare means alone: how much do seeds scatter?": lambda a, b: _verdict(fmean(a) - fmean(b), 0),
            "have 1.96 for t: with three seeds t is more than twice as large": lambda a, b: _interval(a, b, 1.96),
            "take deviations for errors of means: these are smaller by the root of n": lambda a, b: _interval(
                a, b, n=1
            ),
            "have more and less mixed up: the arm minus the first": lambda a, b: difference(b, a).verdict,
            "pair the runs by their places: arms that were started apart are not paired": lambda a, b: (
                difference(a, b, paired=True).verdict
            ),
            "ask whether two intervals overlap: that is not the interval of the difference": _overlap,
        }
        want, *wrong = (
            {arm["name"]: rule(arm["accuracy"], first) for arm in others}
            for rule in (lambda a, b: difference(a, b).verdict, *rules.values())
        )
        both = _unbeaten(arms), (want, dict(zip(rules, wrong, strict=True)))
        yield Case("arms " + ", ".join(arm["name"] for arm in arms), (arms,), *in_parts(*both))


def _unbeaten(arms: list) -> tuple[set, dict[str, set]]:
    """The candidates, and what mistakes make of them."""

    def beaten(arm, by, least, measure):
        better = [measure(by["accuracy"]) - measure(arm["accuracy"])]
        better += [arm["seconds"] - by["seconds"], arm["bytes"] - by["bytes"]]
        return min(better) >= -1e-12 and sum(value > 1e-12 for value in better) >= least

    def left(least=1, measure=fmean):
        return {arm["name"] for arm in arms if not any(beaten(arm, o, least, measure) for o in arms if o is not arm)}

    everybody = {arm["name"] for arm in arms}
    return left(), {
        "drop equals: an arm is beaten only if another is better in something": left(0),
        "keep arms that another beats in one respect and equals in the others": left(3),
        "are the most accurate arm alone: a smaller or faster one may be worth a look": {
            max(arms, key=lambda arm: fmean(arm["accuracy"]))["name"]
        },
        "are those that are beaten: the others are asked for": everybody - left(),
        "are all arms": everybody,
        "are those by the best seed: take the mean": left(measure=max),
        "are those by the worst seed: take the mean": left(measure=min),
        "are those by the middle seed: take the mean": left(measure=median),
    }


def _verdict(low: float, high: float) -> str:
    """The verdict of an interval; of a mean alone, with `high` zero."""
    return "higher" if low > 0 else "lower" if high < 0 or (high == 0 and low < 0) else "cannot be separated"


def _interval(a: list, b: list, factor: float = float(student.ppf(0.975, 4)), n: int = 3) -> str:
    mean, spread = fmean(a) - fmean(b), math.sqrt((stdev(a) ** 2 + stdev(b) ** 2) / n)
    return _verdict(mean - factor * spread, mean + factor * spread)


def _overlap(a: list, b: list) -> str:
    half = [float(student.ppf(0.975, 2)) * stdev(x) / math.sqrt(3) for x in (a, b)]
    return _verdict(fmean(a) - half[0] - fmean(b) - half[1], fmean(a) + half[0] - fmean(b) + half[1])
