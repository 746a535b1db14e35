"""The checks of lesson 07's exercises: swallowed updates, sums, compression, best weights, what a grid lets through."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.course.checks.exercise import Case, Exercise, exercise
from lorakit.course.checks.grading import as_tensor, ask, parts, random_matrix, require, same
from lorakit.layers import nf4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADAPTERS = [  # ranks, scales, weights
    ((2, 2), (2.0, 2.0), (1.0, 1.0)),
    ((3, 1), (0.5, 4.0), (0.7, -1.0)),
    ((1, 4, 2), (8.0, 1.0, 0.25), (-0.5, 0.3, 2.0)),
    ((5,), (2.0,), (3.0,)),
]
SIZES = [(150, 130, 12, 5), (70, 160, 9, 9), (90, 80, 6, 1), (80, 90, 4, 7)]  # d_out, d_in, has, rank


@exercise("right: what is too small for a weight, it swallows", "the share")
def check_swallowed() -> Iterator[Case]:
    """Checks `swallowed(W, update) -> share`: of the weights with an update, how many keep their value."""
    for i, dtype in enumerate(DTYPES):
        W, update = random_matrix(40, 60, seed=i).to(dtype), 0.003 * random_matrix(40, 60, seed=i + 10)
        update[: 10 * i] = 0
        W[:, -1] = 0
        there = (W.float() + update).to(dtype)
        kept, asked = (there == W) & (update != 0), update != 0
        hints = {
            "counts weights that have no update: they keep their value, but nothing is swallowed": there == W,
            "is a share of all weights: divide by those that have an update": kept,
            "is the share that moves: the others were asked for": (there != W)[asked],
            "compares in float32, before the sum is rounded to W's dtype": (W.float() + update == W.float())[asked],
            "rounds twice: the update to W's dtype, and then the sum": (W + update.to(dtype) == W)[asked],
        }
        on = f"a weight in {str(dtype).removeprefix('torch.')}, {(~asked).float().mean():.0%} of it without update"
        wrong = {hint: which.float().mean() for hint, which in hints.items()}
        yield Case(on, (W, update), (kept.sum() / asked.sum()).item(), wrong)


def _stacked(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    A, B = (as_tensor(each, case.on, name) for each, name in zip(parts(got, "A, B", case.on), "AB", strict=True))
    fits = A.ndim == B.ndim == 2 and A.shape[1] == 7 and B.shape[0] == 5 and len(A) == B.shape[1]
    require(fits, case.on, f"expected A (rank, 7) and B (5, rank), got {tuple(A.shape)} and {tuple(B.shape)}")
    yield "B A", B @ A
    rank = len(case.right[0])
    require(len(A) == rank, case.on, f"expected the ranks to add up to {rank}, got {len(A)}")


@exercise("right: the sum of updates, by factors side by side", _stacked)
def check_add_adapters() -> Iterator[Case]:
    """Checks `add_adapters(adapters, weights) -> A, B`: one adapter of scale 1 that is the weighted sum of others."""
    for ranks, scales, weights in ADAPTERS:
        As, Bs = ([random_matrix(rank, 7, seed=i) for i, rank in enumerate(ranks)],
                  [random_matrix(5, rank, seed=i + 9) for i, rank in enumerate(ranks)])  # fmt: skip

        def side_by_side(power: int, weights: Any, As=As, Bs=Bs, scales=scales) -> tuple[Any, Any]:
            scaled = [w * s**power * B for B, s, w in zip(Bs, scales, weights, strict=True)]
            return torch.cat(As), torch.cat(scaled, dim=1)

        hints = {
            "leaves the adapters' scales out": side_by_side(0, weights),
            "leaves the weights out": side_by_side(1, [1] * len(weights)),
            "has the scales squared: only one of the factors takes them": side_by_side(2, weights),
            "has the weights squared: only one of the factors takes them": side_by_side(1, [w * w for w in weights]),
            "is without the signs of the weights": side_by_side(1, [abs(w) for w in weights]),
        }
        if len(set(ranks)) == 1 < len(ranks):
            crossed = sum(w * s * B for B, s, w in zip(Bs, scales, weights, strict=True))
            hints["has cross terms: (B1 + B2)(A1 + A2) is more than B1 A1 + B2 A2"] = sum(As), crossed
        on = f"{len(ranks)} of ranks {ranks}, scales {scales}, weights {weights}"
        inputs = list(zip(As, Bs, scales, strict=True)), list(weights)
        yield Case(on, inputs, side_by_side(1, weights), hints)


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made while it is open."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


class _OfFactors(Exercise):
    """An exercise of updates B A that are given as factors, and never made."""

    def ask(self, function: Any, case: Case) -> None:
        with _Largest() as largest:
            got = ask(function, *case.inputs, on=case.on)
        self.judge(got, case)
        A, B = case.inputs[:2] if isinstance(case.inputs[0], Tensor) else case.inputs[1]
        few = largest.numbers < len(B) * A.shape[1]
        require(few, case.on, f"right, but something of {largest.numbers:,} numbers was made: B A is not needed")


def _cut(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    A, B = (as_tensor(each, case.on, name) for each, name in zip(parts(got, "A, B", case.on), "AB", strict=True))
    shapes = [tuple(each.shape) for each in (*case.right, A, B)]
    expected = f"expected A {shapes[0]} and B {shapes[1]}, got {shapes[2]} and {shapes[3]}"
    require(shapes[:2] == shapes[2:], case.on, expected)
    yield "B A", B @ A


@exercise("right: the nearest update, from factors alone", _cut, _OfFactors)
def check_compress() -> Iterator[Case]:
    """Checks `compress(A, B, rank) -> A, B`: the nearest update of that rank, without ever making B A."""
    for d_out, d_in, has, rank in SIZES:
        A, B = random_matrix(has, d_in, seed=rank), random_matrix(d_out, has, seed=rank + 5)
        B *= torch.logspace(0, -2, has, dtype=torch.float32)
        r = min(rank, has)
        U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
        U, S, Vh = U[:, :r], S[:r, None], Vh[:r]
        hints = {
            "keeps the first columns: those are not the directions that matter": (A[:r], B[:, :r]),
            "is without the singular values": (Vh, U),
            "has the singular values twice: give each factor their root": (S.square() * Vh, U),
            "has the roots of the singular values: each factor takes one": (S.sqrt() * Vh, U),
        }
        on = f"factors of rank {has} for a layer of {d_out} x {d_in}, cut to {rank}"
        yield Case(on, (A, B, rank), (S * Vh, U), hints)


@exercise("right: the best mix, by normal equations of factors", "w", _OfFactors)
def check_best_weights() -> Iterator[Case]:
    """Checks `best_weights(updates, target) -> w`: how to mix updates so that they come nearest to another."""
    for i, (count, ranks, alike) in enumerate([(2, (3, 3, 2), 0.0), (3, (1, 4, 2), 0.7), (4, (2, 2, 5), 0.4)]):
        shared = random_matrix(60, 80, seed=i)
        made = []
        for k in range(count + 1):
            rank = ranks[k % 3]
            A, B = random_matrix(rank, 80, seed=100 + 10 * i + k), random_matrix(60, rank, seed=200 + 10 * i + k)
            A[0] = alike * shared[0] + (1 - alike) * A[0]
            B[:, 0] = alike * shared[:, 0] + (1 - alike) * B[:, 0]
            made.append((A, (k + 1.0) * B))
        flat = torch.stack([(B.double() @ A.double()).flatten() for A, B in made])
        G, b = flat[:-1] @ flat[:-1].T, flat[:-1] @ flat[-1]
        want = torch.linalg.solve(G, b)
        long = flat.norm(dim=1)
        hints = {
            "treats the updates as orthogonal: their products with each other are in G": b / G.diagonal(),
            "is the inner products with the target: they still have to be solved for": b,
            "is the cosines with the target": b / (long[:-1] * long[-1]),
            "has cosines in G: the updates have lengths": torch.linalg.solve(G / long[:-1] / long[:-1, None], b),
            "is turned round: G w = b, not w = G b": G @ b,
            "adds up to one: nothing asks for that": want / want.sum(),
        }
        on = f"{count} updates of ranks {[len(A) for A, _ in made[:-1]]}" + (", some alike" if alike else "")
        yield Case(on, (made[:-1], made[-1]), want, hints)


def _shares(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    each = parts(got, "requantised, original", case.on)
    first, second = (as_tensor(share, case.on, "a share") for share in each)
    swapped = same(first, torch.tensor(case.right[1], dtype=torch.float64)) and same(
        second, torch.tensor(case.right[0], dtype=torch.float64)
    )
    require(not swapped, case.on, "the two are in the other order: requantised first")
    yield from (("the share by requantising", first), ("the share by the original", second))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5


def _moving(values: Tensor, held: Tensor, size: float) -> Tensor:
    """The probability that a weight leaves its value."""
    middles = torch.cat(
        [values.new_tensor([-torch.inf]), (values[1:] + values[:-1]) / 2, values.new_tensor([torch.inf])]
    )
    own = torch.searchsorted(values, held)
    stays = torch.special.ndtr((middles[own + 1] - held) / size) - torch.special.ndtr((middles[own] - held) / size)
    return 1 - stays.mean()


@exercise("right: what a grid lets through, from its gaps and the size of an update alone", "the share")
def check_expected_share() -> Iterator[Case]:
    """Checks `expected_share(values, held, size) -> share`: of normal updates of weights on a grid, what arrives."""
    code = torch.tensor(nf4.NF4, dtype=torch.float64)
    grids = {"NF4's values": code, "nine even values": torch.linspace(-1, 1, 9, dtype=torch.float64)}
    for (name, values), size in product(grids.items(), (0.02, 0.08, 0.3)):
        held = values[torch.arange(40, dtype=torch.int64) * 7 % len(values)]
        gaps, middles = values.diff(), (values[1:] + values[:-1]) / 2
        away = (middles - held[:, None]).abs()  # from each weight to each border
        upwards = (gaps * _density(away / size) * (middles > held[:, None])).sum(1).mean() / size
        nearest = (gaps * _density(away / size) * (away <= away.amin(1, keepdim=True) + 1e-12)).sum(1).mean() / size
        far = (gaps * _density((values - held[:, None]).abs() / size)[:, 1:]).sum(1).mean() / size
        share = (gaps * _density(away / size)).sum(1).mean() / size
        hints = {
            "looks upwards only: an update has two signs": upwards,
            "stops at the nearest border: a large update crosses more than one": nearest,
            "waits until a weight reaches the next value: it moves from the middle on": far,
            "counts half the gap: a weight that moves moves by all of it": share / 2,
            "is the share of weights that move": _moving(values, held, size),
            "is not divided by the update's own square": share * size**2,
        }
        wrong = {hint: value.item() for hint, value in hints.items()}
        inputs = values.float(), held.float(), size
        yield Case(f"{name}, updates of standard deviation {size:g}", inputs, share.item(), wrong)
