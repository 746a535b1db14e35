"""The checks of lesson 07's exercises: swallowed updates, sums, compression, best weights, merging into four bits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.course.checks.grading import as_tensor, ask, judge, norm, parts, random_matrix, require, same
from lorakit.layers import nf4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADAPTERS = [  # ranks, scales, weights
    ((2, 2), (2.0, 2.0), (1.0, 1.0)),
    ((3, 1), (0.5, 4.0), (0.7, -1.0)),
    ((1, 4, 2), (8.0, 1.0, 0.25), (-0.5, 0.3, 2.0)),
    ((5,), (2.0,), (3.0,)),
]
SIZES = [(1500, 1300, 12, 5), (700, 1600, 9, 9), (900, 800, 6, 1), (800, 900, 4, 7)]  # d_out, d_in, has, rank


def check_swallowed(swallowed: Any) -> None:
    """Checks `swallowed(W, update) -> share`: of the weights with an update, how many keep their value."""
    for i, dtype in enumerate(DTYPES):
        W, update = random_matrix(40, 60, seed=i).to(dtype), 0.003 * random_matrix(40, 60, seed=i + 10)
        update[: 10 * i] = 0
        W[:, -1] = 0
        there = (W.float() + update).to(dtype)
        kept, asked = (there == W) & (update != 0), update != 0
        want = (kept.sum() / asked.sum()).item()
        hints = {
            "counts weights that have no update: they keep their value, but nothing is swallowed": (there == W).float(),
            "is a share of all weights: divide by those that have an update": kept.float(),
            "is the share that moves: the others were asked for": ((there != W) & asked).sum() / asked.sum(),
            "compares in float32, before the sum is rounded to W's dtype": (W.float() + update == W.float())[asked],
            "rounds twice: the update to W's dtype, and then the sum": (W + update.to(dtype) == W)[asked],
        }
        on = f"a weight in {str(dtype).removeprefix('torch.')}, {(~asked).float().mean():.0%} of it without update"
        mistakes = {hint: wrong.float().mean() for hint, wrong in hints.items()}
        judge(ask(swallowed, W, update, on=on), want, mistakes, on, "the share")
    print("right: what is too small for a weight, it swallows")


def check_add_adapters(add_adapters: Any) -> None:
    """Checks `add_adapters(adapters, weights) -> A, B`: one adapter of scale 1 that is the weighted sum of others."""
    for ranks, scales, weights in ADAPTERS:
        on = f"{len(ranks)} of ranks {ranks}, scales {scales}, weights {weights}"
        each = [
            (random_matrix(rank, 7, seed=i), random_matrix(5, rank, seed=i + 9), scale)
            for i, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
        ]
        A, B = parts(ask(add_adapters, each, list(weights), on=on), "A, B", on)
        A, B = as_tensor(A, on, "A"), as_tensor(B, on, "B")
        fits = A.ndim == B.ndim == 2 and A.shape[1] == 7 and B.shape[0] == 5 and len(A) == B.shape[1]
        require(fits, on, f"expected A (rank, 7) and B (5, rank), got {tuple(A.shape)} and {tuple(B.shape)}")
        judge(B @ A, _weighted(each, weights), _wrong_sums(each, weights), on, "B A")
        rank = sum(ranks)
        require(len(A) == rank, on, f"expected the ranks to add up to {rank}, got {len(A)}")
    print("right: the sum of updates, by factors side by side")


def _weighted(each: list, weights: Any, scaled: int = 1, weighted: int = 1) -> Tensor:
    """The sum of `w s B A`, or with another power of s or w."""
    return sum(w**weighted * s**scaled * B @ A for (A, B, s), w in zip(each, weights, strict=True))


def _wrong_sums(each: list, weights: Any) -> dict[str, Tensor | None]:
    hints = {
        "leaves the adapters' scales out": _weighted(each, weights, scaled=0),
        "leaves the weights out": _weighted(each, [1] * len(each)),
        "has the scales squared: only one of the factors takes them": _weighted(each, weights, scaled=2),
        "has the weights squared: only one of the factors takes them": _weighted(each, weights, weighted=2),
        "is without the signs of the weights": _weighted(each, [abs(w) for w in weights]),
    }
    if len({len(A) for A, _, _ in each}) == 1 < len(each):
        crossed = sum(w * s * B for (_, B, s), w in zip(each, weights, strict=True)) @ sum(A for A, _, _ in each)
        hints["has cross terms: (B1 + B2)(A1 + A2) is more than B1 A1 + B2 A2"] = crossed
    return hints


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made while it is open."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


def check_compress(compress: Any) -> None:
    """Checks `compress(A, B, rank) -> A, B`: the nearest update of that rank, without ever making B A."""
    for d_out, d_in, has, rank in SIZES:
        on = f"factors of rank {has} for a layer of {d_out} x {d_in}, cut to {rank}"
        A, B = random_matrix(has, d_in, seed=rank), random_matrix(d_out, has, seed=rank + 5)
        B *= torch.logspace(0, -2, has)
        with _Largest() as largest:
            got = ask(compress, A, B, rank, on=on)
        cut = parts(got, "A, B", on)
        left, right = as_tensor(cut[1], on, "B"), as_tensor(cut[0], on, "A")
        r = min(rank, has)
        shapes = f"expected A ({r}, {d_in}) and B ({d_out}, {r}), got {tuple(right.shape)} and {tuple(left.shape)}"
        require(right.shape == (r, d_in) and left.shape == (d_out, r), on, shapes)
        U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
        hints = {
            "keeps the first columns: those are not the directions that matter": B[:, :r].double() @ A[:r].double(),
            "is without the singular values": U @ Vh,
            "has the singular values twice: give each factor their root": U * S.square() @ Vh,
            "has the roots of the singular values: each factor takes one": U * S.sqrt() @ Vh,
        }
        judge(left @ right, U * S @ Vh, hints, on, "B A")
        whole = largest.numbers < d_out * d_in
        require(whole, on, f"right, but something of {largest.numbers:,} numbers was made: B A is not needed")
    print("right: the nearest update, from factors alone")


def check_best_weights(best_weights: Any) -> None:
    """Checks `best_weights(updates, target) -> w`: how to mix updates so that they come nearest to another."""
    for i, (count, ranks, alike) in enumerate([(2, (3, 3, 2), 0.0), (3, (1, 4, 2), 0.7), (4, (2, 2, 5), 0.4)]):
        shared = random_matrix(6, 8, seed=i)
        made = []
        for k in range(count + 1):
            rank = ranks[k % 3]
            A, B = random_matrix(rank, 8, seed=100 + 10 * i + k), random_matrix(6, rank, seed=200 + 10 * i + k)
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
        judge(ask(best_weights, made[:-1], made[-1], on=on), want, hints, on, "w")
    print("right: the best mix, by normal equations of factors")


def check_arrives(arrives: Any) -> None:
    """Checks `arrives(W, update) -> requantised, original`: the share of an update that two routes into NF4 keep."""

    def held(x: Tensor) -> Tensor:
        return nf4.dequantize(*nf4.quantize(x), tuple(x.shape))

    for i, strength in enumerate((0.002, 0.05, 0.5)):
        W, D = 0.1 * random_matrix(64, 128, seed=i), 0.1 * strength * random_matrix(64, 128, seed=i + 7)
        base, again, fresh = held(W), held(held(W) + D), held(W + D)

        def share(change: Tensor, D: Tensor = D) -> float:
            return ((change * D).sum() / D.square().sum()).item()

        on = f"an update of {strength:g} of the weight's size"
        got = parts(ask(arrives, W, D, on=on), "requantised, original", on)
        first, second = (as_tensor(each, on, "a share") for each in got)
        swapped = same(first, torch.tensor(share(fresh - base))) and same(second, torch.tensor(share(again - base)))
        require(not swapped, on, "the two are in the other order: requantised first")
        hints = {
            "is measured from W: the change is that of the weight which was served before": share(again - W),
            "is a ratio of norms, which counts noise as update: project": norm(again - base) / norm(D),
            "is a cosine: the projection is divided by the update's own square": share(again - base)
            * norm(D)
            / max(norm(again - base), 1e-30),
            "is the share of values that change": (again != base).float().mean().item(),
        }
        judge(first, share(again - base), hints, on, "the share by requantising")
        hints = {
            "is measured from W: the change is that of the weight which was served before": share(fresh - W),
            "is a ratio of norms, which counts noise as update: project": norm(fresh - base) / norm(D),
            "adds the update to the dequantised weight, not to the original": share(again - base),
        }
        judge(second, share(fresh - base), hints, on, "the share by the original")
    print("right: why merging into four bits erases an adapter")
