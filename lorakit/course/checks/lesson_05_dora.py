"""The checks of lesson 05's exercises: turning and stretching, rates, a portable start, ranks, a trade-off."""

import math
from collections.abc import Callable, Iterator
from statistics import fmean, median, stdev
from typing import Any

import torch
from scipy.stats import norm as normal
from scipy.stats import t as student
from scipy.stats import ttest_ind
from torch import Tensor

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, parts, random_matrix, require

MATRICES = [(24, 40, 3, 1.5), (40, 24, 4, 0.5), (16, 16, 2, 2.0)]  # d_out, d_in, rank, s
RANKS = [(24.0, 16, 64), (8.0, 64, 16), (16.0, 4, 4)]  # alpha, the rank that it is for, another rank
SPLITS = [(24, 40, 3, 2.0), (40, 24, 5, 0.5), (16, 16, 16, 1.0)]  # d_out, d_in, rank, s
SIZES = {"q_proj": 8, "k_proj": 6, "up_proj": 8, "down_proj": 10}  # directions of a layer
# Arms: accuracy minus the pattern that each seed brings to all arms, seconds of a step, bytes
OWN = {
    "LoRA": ([0.00, 0.00, 0.00, 0.00, 0.00], 1.0, 900),
    "QLoRA": ([-0.09, -0.06, -0.08, -0.07, -0.06], 1.3, 400),
    "DoRA": ([0.03, 0.02, 0.01, 0.02, 0.02], 1.2, 950),
    "large": ([0.05, 0.07, 0.02, 0.03, 0.08], 1.4, 990),
    "slow": ([0.01, -0.02, 0.02, -0.01, 0.00], 1.5, 950),
    "small": ([-0.24, -0.25, -0.23, -0.26, -0.22], 1.0, 350),
    "twin": ([-0.22, -0.26, -0.24, -0.25, -0.23], 1.0, 350),
    "lucky": ([0.24, -0.19, 0.11, -0.24, -0.02], 0.9, 990),
    "steady": ([-0.03, -0.02, -0.03, -0.02, -0.02], 1.1, 850),
    "shaky": ([-0.06, -0.01, -0.04, 0.00, -0.03], 1.1, 850),
    "worst": ([-0.34, -0.32, -0.33, -0.35, -0.31], 2.0, 999),
}
PATTERN = [0.55, 0.64, 0.49, 0.70, 0.57]


def _arm(place: int, name: str) -> dict[str, Any]:
    gaps, seconds, size = OWN[name]
    shares = {seed: round(PATTERN[seed] + gaps[seed], 3) for seed in range(len(PATTERN))}
    order = [(seed + place) % len(PATTERN) for seed in range(len(PATTERN))]  # as runs end, so that places say nothing
    return {"name": name, "accuracy": {seed: shares[seed] for seed in order}, "seconds": seconds, "bytes": size}


ARMS = [_arm(place, name) for place, name in enumerate(OWN)]


@exercise("right: both turn alike, and DoRA's lengths are free", "turn, lora, dora")
def check_turned() -> Iterator[Case]:
    """Checks `turned(W, A, B, s, m) -> (turn, lora, dora)`: how far rows turn, and are stretched with either method."""
    for seed, (d_out, d_in, rank, s) in enumerate(MATRICES):
        W, A, B = (
            random_matrix(*shape, seed=seed + k) for k, shape in enumerate([(d_out, d_in), (rank, d_in), (d_out, rank)])
        )
        V, lengths = W + s * B @ A, W.norm(dim=1)
        m = lengths * (1 + 0.3 * random_matrix(d_out, seed=seed + 9))
        cosine = (W * V).sum(1) / (lengths * V.norm(dim=1))
        columns = (W * V).sum(0) / (W.norm(dim=0) * V.norm(dim=0))
        bare = W + B @ A
        turn = {
            "is the cosine: a row that does not turn should have 0": cosine.mean(),
            "is of columns: each output's numbers are a row": (1 - columns).mean(),
            "is of the whole matrix: every row has its own angle": 1 - (W * V).sum() / (W.norm() * V.norm()),
            "is the angle: 1 minus its cosine is asked for": cosine.clamp(-1, 1).acos().mean(),
            "has no s": (1 - (W * bare).sum(1) / (lengths * bare.norm(dim=1))).mean(),
            "has no lengths: divide the product by both of them": (1 - (W * V).sum(1)).mean(),
        }
        lora = {
            "is no share: divide by the length before": (V.norm(dim=1) - lengths).abs().mean(),
            "is a share of the length after: divide by the one before": (lengths / V.norm(dim=1) - 1).abs().mean(),
            "lets longer and shorter rows cancel: take the absolute value": (V.norm(dim=1) / lengths - 1).mean(),
            "is the length of the update: how much longer is the sum?": ((V - W).norm(dim=1) / lengths).mean(),
            "is of columns: each output's numbers are a row": (V.norm(dim=0) / W.norm(dim=0) - 1).abs().mean(),
            "has no s": (bare.norm(dim=1) / lengths - 1).abs().mean(),
            "is of squares": (V.norm(dim=1).square() / lengths.square() - 1).abs().mean(),
        }
        dora = {
            "is LoRA's: DoRA gives each row the length |m_i|": (V.norm(dim=1) / lengths - 1).abs().mean(),
            "is no share: divide by the length before": (m.abs() - lengths).abs().mean(),
            "lets longer and shorter rows cancel: take the absolute value": (m.abs() / lengths - 1).mean(),
            "takes m as a factor of the length: it is the length": (m.abs() * V.norm(dim=1) / lengths - 1).abs().mean(),
            "is against LoRA's lengths: against those of W": (m.abs() / V.norm(dim=1) - 1).abs().mean(),
            "is 0: that holds while m is as it started": torch.zeros((), dtype=torch.float32),
        }
        right = (1 - cosine).mean(), (V.norm(dim=1) / lengths - 1).abs().mean(), (m.abs() / lengths - 1).abs().mean()
        both = in_parts(*zip(right, (turn, lora, dora), strict=True))
        yield Case(f"W ({d_out}, {d_in}), rank {rank}, s {s}", (W, A, B, s, m), *both)


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


def _file(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    on, (W, A, _, s) = case.on, case.inputs
    left, right = parts(got, "A_file, B_file", on)
    left, right = as_tensor(left, on, "A_file"), as_tensor(right, on, "B_file")
    for name, factor, shape in (("A_file", left, (2 * len(A), W.shape[1])), ("B_file", right, (len(W), 2 * len(A)))):
        turned = f"got {tuple(factor.shape)}: the file has room for what trains and for what has been taken off"
        require(factor.shape == shape, on, f"{name} should have shape {shape}, {turned}")
    yield "the update s B_file A_file", s * right.double() @ left.double()


@exercise("right: whoever has W alone reads the model that was trained", _file)
def check_portable() -> Iterator[Case]:
    """Checks `portable(W, A, B, s) -> (A_file, B_file)`: a PiSSA adapter for those who have W, and not its residual."""
    for seed, (d_out, d_in, rank, s) in enumerate(SPLITS):
        W = random_matrix(d_out, d_in, seed=seed).double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)

        def start(part: slice, values: Tensor, U=U, Vh=Vh) -> tuple[Tensor, Tensor]:
            return values.sqrt()[:, None] * Vh[part], U[:, part] * values.sqrt()

        A0, B0 = start(slice(rank), S[:rank] / s)
        low = start(slice(-rank, None), S[-rank:] / s)
        bare = start(slice(rank), S[:rank])
        A, B = (each + 0.1 * random_matrix(*each.shape, seed=seed + 5).double() for each in (A0, B0))

        def both(A1: Tensor, B1: Tensor, sign: float = -1, A=A, B=B) -> tuple[Tensor, Tensor]:
            return torch.cat([A, A1]), torch.cat([B, sign * B1], dim=1)

        wrong = {
            "adds the start once more: take it off": both(A0, B0, 1),
            "is what trains alone: over W it is added to the directions that W has kept": both(0 * A0, 0 * B0),
            "has the start with W's own singular values: with s in front they are divided by it": both(*bare),
            "takes the smallest directions off: PiSSA starts with the largest": both(*low),
            "takes the trained A B off, and leaves nothing": both(A, B),
            "pairs the old B with the new A: the start is B0 A0": both(A, B0),
            "takes off the start alone: where is what trains?": (torch.cat([0 * A, A0]), torch.cat([0 * B, -B0], 1)),
        }
        if rank == min(W.shape):
            del wrong["takes the smallest directions off: PiSSA starts with the largest"]
        inputs = tuple(each.float() for each in (W, A, B))
        wrong = {hint: (left.float(), right.float()) for hint, (left, right) in wrong.items()}
        right = tuple(each.float() for each in both(A0, B0))
        yield Case(f"W ({d_out}, {d_in}), rank {rank}, s {s}", (*inputs, s), right, wrong)


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


@exercise("right: who is worth a look, and what five seeds can tell apart", _candidates)
def check_tradeoff() -> Iterator[Case]:
    """Checks `tradeoff(arms) -> (candidates, verdicts)`: who is not beaten, who differs from the first."""
    for arms in ([ARMS[0], ARMS[7], ARMS[9]], ARMS[:6], ARMS[:3], [ARMS[1], ARMS[0], *ARMS[3:5]], ARMS):
        first, others = arms[0]["accuracy"], arms[1:]
        side = 1 - 0.025 / len(others)  # Bonferroni
        t = float(student.ppf(side, len(first) - 1))

        def verdicts(factor: float, pair: Callable = _pairs, first=first, others=others) -> dict[str, str]:
            return {arm["name"]: _interval(pair(arm["accuracy"], first), factor) for arm in others}

        each = float(student.ppf(0.975, len(first) - 1))
        wrong = {
            "compare means alone: how much do the pairs differ?": verdicts(0),
            "have 95 % each: for k arms each interval is made with 1 - 0.05 / k": verdicts(each),
            "have the normal distribution's factor: with five pairs t is larger": verdicts(float(normal.ppf(side))),
            "take deviations for errors of means: these are smaller by the root of n": verdicts(t * len(first) ** 0.5),
            "have more and less mixed up: the arm minus the first": verdicts(t, lambda a, b: _pairs(b, a)),
            "take runs for strangers (Welch): those of one seed are a pair": {
                arm["name"]: _welch(arm["accuracy"], first) for arm in others
            },
            "pair the runs by their places: their seeds say what belongs together": verdicts(
                t, lambda a, b: [x - y for x, y in zip(a.values(), b.values(), strict=True)]
            ),
        }
        both = _unbeaten(arms), (verdicts(t), wrong)
        yield Case("arms " + ", ".join(arm["name"] for arm in arms), (arms,), *in_parts(*both))


def _unbeaten(arms: list) -> tuple[set, dict[str, set]]:
    """The candidates, and what mistakes make of them."""

    def beaten(arm, by, least, measure):
        better = [measure(by["accuracy"].values()) - measure(arm["accuracy"].values())]
        better += [arm["seconds"] - by["seconds"], arm["bytes"] - by["bytes"]]
        return min(better) >= -1e-12 and sum(value > 1e-12 for value in better) >= least

    def left(least=1, measure=fmean):
        return {arm["name"] for arm in arms if not any(beaten(arm, o, least, measure) for o in arms if o is not arm)}

    everybody = {arm["name"] for arm in arms}
    return left(), {
        "drop equals: an arm is beaten only if another is better in something": left(0),
        "keep arms that another beats in one respect and equals in the others": left(3),
        "are the most accurate arm alone: a smaller or faster one may be worth a look": {
            max(arms, key=lambda arm: fmean(arm["accuracy"].values()))["name"]
        },
        "are those that are beaten: the others are asked for": everybody - left(),
        "are all arms": everybody,
        "are those by the best seed: take the mean": left(measure=max),
        "are those by the worst seed: take the mean": left(measure=min),
        "are those by the middle seed: take the mean": left(measure=median),
    }


def _pairs(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in a]


def _interval(gaps: list[float], factor: float) -> str:
    """The verdict of mean ± factor s / sqrt(n)."""
    mean, error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
    low, high = mean - factor * error, mean + factor * error
    return "higher" if low > 0 else "lower" if high < 0 else "cannot be separated"


def _welch(a: dict[int, float], b: dict[int, float]) -> str:
    found = ttest_ind(list(a.values()), list(b.values()), equal_var=False).confidence_interval(0.95)
    return "higher" if found.low > 0 else "lower" if found.high < 0 else "cannot be separated"
