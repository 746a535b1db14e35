"""The checks of lesson 01's exercises: break-even, best approximation, energy, similarity, a control, the gauge."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, judge, norm, parts, random_matrix, require, same
from lorakit.layers.lowrank import break_even_rank, captured_energy, lora_parameters, subspace_similarity, truncated_svd


@exercise("right: for square, wide and tall matrices, and where the numbers tie", "your rank")
def check_largest_rank() -> Iterator[Case]:
    """Checks `largest_rank(d_out, d_in) -> rank`: the largest at which B and A hold fewer numbers than the matrix."""
    for d_out, d_in in [(576, 576), (4096, 4096), (192, 576), (1536, 576), (3, 6), (100, 7)]:
        want = max(r for r in range(1, min(d_out, d_in)) if lora_parameters(d_out, d_in, r) < d_out * d_in)
        equal = break_even_rank(d_out, d_in)
        mistakes = {
            "holds exactly as many numbers as the matrix: fewer is asked for": int(equal) if equal % 1 == 0 else want,
            "is not whole: it is where both hold equally many, round it down": equal,
            "holds more numbers than the matrix: round down, not up or to the nearest": want + 1,
            "is right only for square matrices: B has d_out rows, A has d_in columns": d_in // 2 - 1,
            "is the largest rank that such a matrix can have; ask what B and A hold": min(d_out, d_in),
        }
        yield Case(f"a matrix ({d_out}, {d_in})", (d_out, d_in), want, mistakes)


def _approximation(got: Any, case: Case) -> Iterable[tuple[str, Any]]:
    each = parts(got, "approximation, frobenius_error, spectral_error", case.on)
    return zip(("the approximation", "the Frobenius error", "the spectral error"), each, strict=True)


@exercise("right: no matrix of rank k is nearer, in either norm", _approximation)
def check_best_approximation() -> Iterator[Case]:
    """Checks `best(matrix, k) -> (approximation, frobenius_error, spectral_error)`."""
    for seed, (d_out, d_in, k) in enumerate([(6, 9, 2), (8, 8, 3), (10, 5, 4)]):
        matrix = random_matrix(d_out, d_in, seed=seed)
        U, S, Vh = truncated_svd(matrix, min(d_out, d_in))
        approximation = {
            "leaves out the singular values: scale the columns of U by S": U[:, :k] @ Vh[:k],
            "keeps the smallest singular values: torch gives the largest first": (U[:, -k:] * S[-k:]) @ Vh[-k:],
            "is what was to be left out, the remainder": (U[:, k:] * S[k:]) @ Vh[k:],
            "is the matrix itself: cut U, S and Vh after k": matrix,
            "has rank k + 1: [:k] takes k values": (U[:, : k + 1] * S[: k + 1]) @ Vh[: k + 1],
        }
        if d_out == d_in:
            approximation["uses Vh transposed: torch returns it ready to multiply"] = (U[:, :k] * S[:k]) @ Vh.T[:k]
        frobenius = {
            "is the squared norm: take the root": S[k:].square().sum(),
            "is the sum of the values left out: square, add, take the root": S[k:].sum(),
            "is relative: do not divide by the matrix's norm": S[k:].norm() / S.norm(),
            "is the norm of what was kept": S[:k].norm(),
            "is the spectral one": S[k],
        }
        spectral = {
            "is the last value kept: the error is the first one left out, S[k] when counting from 0": S[k - 1],
            "is the spectral norm of the matrix, not of the difference": S[0],
            "is the Frobenius one": S[k:].norm(),
        }
        best = ((U[:, :k] * S[:k]) @ Vh[:k], approximation), (S[k:].norm(), frobenius), (S[k], spectral)
        yield Case(f"a matrix ({d_out}, {d_in}), k = {k}", (matrix, k), *in_parts(*best))


@exercise("right: the smallest k, for four shares", "your k")
def check_rank_for_energy() -> Iterator[Case]:
    """Checks `rank_for_energy(matrix, share) -> k`: the smallest k that captures this share of the energy."""
    for seed, share in enumerate([0.9, 0.75, 0.95, 0.6]):
        matrix = random_matrix(20, 30, seed=seed) @ torch.diag(0.95 ** torch.arange(30, dtype=torch.float32))
        S = truncated_svd(matrix, 20)[1]
        want, by_norm, left_out = (
            _first(captured_energy(S, k) >= least for k in range(21)) for least in (share, share**2, 1 - share)
        )
        mistakes = {
            "adds singular values: energy is their square": 1 + _first(x >= share * S.sum() for x in S.cumsum(0)),
            "is one too small: after cumsum, index 0 already holds one value": want - 1,
            "is one too large: at least the share is asked for, and [:k] takes k values": want + 1,
            "takes the share for one of the norm: energy is the norm squared": by_norm,
            "leaves this share out instead of capturing it": left_out,
        }
        yield Case(f"a matrix (20, 30), share {share}", (matrix, share), want, mistakes)


def _first(holds: Any) -> int:
    return next(k for k, yes in enumerate(holds) if yes)


@exercise("right: for equal and unequal ranks, whatever the size of the matrices", "your similarity")
def check_similarity() -> Iterator[Case]:
    """Checks `similarity(A1, A2) -> number` in [0, 1]: how much of the smaller row space lies in the larger one."""
    for seed, (r1, r2, d) in enumerate([(3, 3, 8), (2, 5, 9), (4, 1, 6)]):
        A1, A2 = random_matrix(r1, d, seed=seed), 3 * random_matrix(r2, d, seed=seed + 9)
        want, few = subspace_similarity(A1, A2, r1, r2), min(r1, r2)
        rows1, rows2 = A1 / A1.norm(dim=1, keepdim=True), A2 / A2.norm(dim=1, keepdim=True)
        cosines = torch.linalg.svdvals(truncated_svd(A1, r1)[2] @ truncated_svd(A2, r2)[2].T)
        mistakes = {
            "depends on the size of A1, A2: make rows orthonormal first, by QR or SVD": norm(A1 @ A2.T) ** 2 / few,
            "has rows of unit length that are not orthogonal: use QR or SVD": norm(rows1 @ rows2.T) ** 2 / few,
            "is not divided by the smaller rank": want * few,
            "is divided by the larger rank: one space inside the other would not give 1": want * few / max(r1, r2),
            "is the norm, not its square, over the rank": (want * few) ** 0.5 / few,
            "adds the cosines: add their squares": cosines.sum() / few,
            "is the root of the right one: the norm is squared": want**0.5,
        }
        yield Case(f"A1 ({r1}, {d}), A2 ({r2}, {d})", (A1, A2), want, mistakes)


def check_control(control: Any) -> None:
    """Checks `control(update, rank, seed)`: a random matrix of the same shape, norm and rank as an update."""
    for (d_out, d_in, rank), seed in zip([(40, 60, 3), (50, 50, 5)], (0, 11), strict=True):
        on = f"an update ({d_out}, {d_in}) of rank {rank}, seed {seed}"
        update = random_matrix(d_out, rank, seed=seed + 4321) @ random_matrix(rank, d_in, seed=seed + 8765) / rank
        got, again, other = (
            as_tensor(ask(control, update, rank, n, on=on), on, "the control") for n in (seed, seed, seed + 1)
        )
        require(got.shape == update.shape, on, f"the control should have shape {(d_out, d_in)}, got {tuple(got.shape)}")
        require(bool(got.isfinite().all() and got.any()), on, "the control should be finite and not zero")
        _check_same_size(got, update, rank, on)
        for side, x, y in (("input", got, update.double()), ("output", got.T, update.double().T)):
            shared = subspace_similarity(x, y, rank, rank)
            message = f"the control shares {shared:.0%} of the update's {side} directions: draw it without the update"
            require(shared < 0.5, on, message)
        require(torch.equal(got, again), on, "the same seed gives two matrices: draw with a torch.Generator")
        require(not torch.equal(got, other), on, "two seeds give the same matrix: use `seed`, a control needs several")
    print("right: same shape, norm and rank, other directions, one matrix a seed")


def _check_same_size(got: Tensor, update: Tensor, rank: int, on: str) -> None:
    S, factor = torch.linalg.svdvals(got), norm(got) / norm(update)
    has = int(S.gt(1e-5 * S[0]).sum())
    hint = "a full random matrix; multiply two thin ones" if has > rank else "too few directions"
    require(has == rank, on, f"the control has rank {has}, not {rank}: {hint}")
    same_spectral = abs(S[0].item() / torch.linalg.matrix_norm(update, 2).item() - 1) < 1e-3
    hint = "match the Frobenius norm, not the spectral one" if same_spectral else "divide by its own norm first"
    require(abs(factor - 1) < 1e-3, on, f"the control has {factor:.3g} times the update's norm: {hint}")


def check_balance(balance: Any) -> None:
    """Checks `balance(B, A) -> (B, A)`: the same product, and `B' B = A A'`."""
    for seed, (d_out, d_in, r) in enumerate([(7, 5, 2), (6, 6, 3)]):
        on = f"B ({d_out}, {r}), A ({r}, {d_in})"
        B, A = 50 * random_matrix(d_out, r, seed=seed), random_matrix(r, d_in, seed=seed + 5)
        new_B, new_A = (as_tensor(p, on, "B or A") for p in parts(ask(balance, B, A, on=on), "B, A", on))
        got, want = (tuple(new_B.shape), tuple(new_A.shape)), ((d_out, r), (r, d_in))
        swapped = ": is it (A, B)?" if got == want[::-1] else ": cut U, S and Vh after r"
        require(got == want, on, f"expected shapes {want[0]} and {want[1]}, got {got[0]} and {got[1]}{swapped}")
        U, S, Vh = truncated_svd(B @ A, r)
        mistakes = {
            "counts the singular values twice: give each side their square root": (U * S.square()) @ Vh,
            "has lost the singular values: give each side their square root": U @ Vh,
        }
        judge(new_B @ new_A, B @ A, mistakes, on, "the product B A")
        sizes = norm(new_B), norm(new_A)
        hint = "share the singular values equally between B and A"
        if abs(sizes[0] / sizes[1] - 1) < 1e-3:
            hint = "one factor for all makes the norms equal, but not direction by direction"
        balanced = same(new_B.T @ new_B, new_A @ new_A.T)
        require(balanced, on, f"B' B is not A A'; |B| = {sizes[0]:.3g}, |A| = {sizes[1]:.3g}: {hint}")
    print("right: the same update, and neither matrix is larger in any direction")
