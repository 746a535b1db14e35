"""The checks of lesson 01 and its exercises: parameters, break-even, cuts, energy, subspaces, bytes, a control."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, judge, norm, parts, random_matrix, require, same
from lorakit.layers.lowrank import break_even_rank, captured_energy, lora_parameters, subspace_similarity, truncated_svd


def _llama(width: int, inner: int, shared: int, blocks: int, vocabulary: int, total: int) -> dict[str, Any]:
    """A Llama's linear layers, each with its (d_out, d_in): those of one block, and those that are there once."""
    attention = {
        "q_proj": (width, width),
        "k_proj": (shared, width),
        "v_proj": (shared, width),
        "o_proj": (width, width),
    }
    feed_forward = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    once = {"lm_head": (vocabulary, width)}
    return {"blocks": blocks, "block": attention | feed_forward, "once": once, "total": total}


def _square(width: int) -> dict[str, Any]:
    return {"blocks": 1, "block": {"W": (width, width)}, "once": {}, "total": width**2}


LLAMA_2 = _llama(4096, 11_008, 4096, 32, 32_000, 6_738_415_616)
LLAMA_3 = _llama(4096, 14_336, 1024, 32, 128_256, 8_030_261_248)
_Q_K_V_O = {name: (12_288, 12_288) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
GPT_3 = {"blocks": 96, "block": _Q_K_V_O, "once": {}, "total": 175_000_000_000}
ATTENTION, BLOCK = list(LLAMA_2["block"])[:4], list(LLAMA_2["block"])
TOLD = {  # a statement -> the number of parameters that it gives an adapter; the model, rank and targets it is about
    "A": (196_608, _square(12_288), 8, ["W"]),
    "B": (65_536, _square(4096), 16, ["W"]),
    "C": (134_000_000, LLAMA_2, 16, ["q_proj", "v_proj"]),
    "D": (8_400_000, LLAMA_2, 16, ["q_proj", "v_proj"]),
    "E": (13_631_488, LLAMA_2, 16, ATTENTION),
    "F": (20_277_248, LLAMA_2, 16, BLOCK),
    "G": (20_277_248, LLAMA_2, 8, [*BLOCK, "lm_head"]),
    "H": (4_700_000, GPT_3, 4, ["q_proj", "v_proj"]),
    "I": (37_700_000, GPT_3, 8, ["q_proj", "v_proj"]),
}


@exercise("right: nine statements recounted, and how far each is off", "trainable, percent, times")
def check_recount() -> Iterator[Case]:
    """Checks `recount(told, model, rank, targets) -> (trainable, percent, times)`: an adapter counted from shapes."""
    for letter, (told, model, rank, targets) in {**TOLD, "Llama 3 8B": (16_777_216, LLAMA_3, 16, ATTENTION)}.items():
        block = [model["block"][name] for name in targets if name in model["block"]]
        once = [model["once"][name] for name in targets if name in model["once"]]
        layers = block * model["blocks"] + once

        def count(shapes: list, rank: int = rank) -> int:
            return sum(lora_parameters(d_out, d_in, rank) for d_out, d_in in shapes)

        want, total = count(layers), model["total"]
        trainable = {
            "is that of one block: multiply by the number of blocks": count(block + once),
            "has one matrix for each layer: an adapter has A and B": rank * sum(d_in for _, d_in in layers),
            "has the rank twice: A is (r, d_in), B is (d_out, r), and there is one pair for each layer": want * rank,
            "takes each layer for a square one": rank * sum(2 * d_in for _, d_in in layers),
            "has the output head in every block: it is there once": count((block + once) * model["blocks"]),
            "leaves out the output head, which is among the targets": count(block * model["blocks"]),
            "is that of the full matrices: an adapter has r (d_in + d_out)": sum(
                d_out * d_in for d_out, d_in in layers
            ),
        }
        percent = {
            "is a share: multiply by 100": want / (total + want),
            "leaves the adapter out of the whole: divide by total + trainable": 100 * want / total,
        }
        times = {
            "is upside down: divide what is told by what is right": want / told,
            "is the difference: divide": told - want,
        }
        on = f"statement {letter}" if letter in TOLD else f"{letter}, r = {rank}"
        parts = (want, trainable), (100 * want / (total + want), percent), (told / want, times)
        yield Case(on, (told, model, rank, targets), *in_parts(*parts))


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


MEMORY = {  # setting -> numbers that are frozen, numbers that train, tasks
    "GPT-3 in full": (0, 175_000_000_000, 10),
    "GPT-3, LoRA with r = 4 on Q and V": (175_000_000_000, 18_874_368, 10),
    "GPT-3, LoRA with r = 1 on Q and V": (175_000_000_000, 4_718_592, 100),
    "Llama 2 7B, LoRA with r = 16 on all layers": (6_738_415_616, 39_976_960, 3),
}


@exercise("right: what trains, what is saved, and what has to be kept", "training, file, storage")
def check_memory() -> Iterator[Case]:
    """Checks `memory(frozen, trained, tasks) -> (training, file, storage)` in bytes, with Adam in mixed precision."""
    for on, (frozen, trained, tasks) in MEMORY.items():
        file, whole = 2 * trained, 2 * frozen
        training = {
            "has 12 bytes for each number that trains: 2 + 2 in 16 bits, and 4 + 4 + 4 in 32 bits": whole
            + 12 * trained,
            "has everything in 16 bits: the copy and both moments are in 32": whole + 10 * trained,
            "has 16 bytes for what is frozen, too: of that there are weights alone": 16 * (frozen + trained),
            "leaves out the frozen weights: the forward pass needs them": 16 * trained,
            "is a number of bits: a byte has eight": 8 * (whole + 16 * trained),
        }
        saved = {
            "has four bytes for each number: 16 bits are two": 4 * trained,
            "is a number of bits": 16 * trained,
            "holds what is frozen as well: that is the base, which does not change": whole + file,
            "is a number of parameters": trained,
        }
        storage = {
            "leaves out the base: no adapter answers without it": tasks * file,
            "has the base once for each task: they share it": tasks * (whole + file),
            "is that of one task": whole + file,
        }
        three = (whole + 16 * trained, training), (file, saved), (whole + tasks * file, storage)
        yield Case(on, (frozen, trained, tasks), *in_parts(*three))


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


@exercise("right: for each k, and for values in any size", "your share")
def check_energy() -> Iterator[Case]:
    """Checks `energy(S, k) -> share` in [0, 1]: what the k first of falling singular values hold of the energy."""
    for seed, k in enumerate([1, 3, 6]):
        S = 10**seed * torch.linalg.svdvals(random_matrix(6, 8, seed=seed))
        mistakes = {
            "adds singular values: energy is their square": S[:k].sum() / S.sum(),
            "is not divided by the whole energy": S[:k].square().sum(),
            "is the root of the right one: energy is the norm squared": S[:k].norm() / S.norm(),
            "leaves out one value: [:k] takes k of them": captured_energy(S, k - 1),
            "takes one value too many: [:k] takes k of them": captured_energy(S, min(k + 1, 6)),
            "is the share that is left out": 1 - captured_energy(S, k),
        }
        yield Case(f"{len(S)} singular values, k = {k}", (S, k), captured_energy(S, k), mistakes)


def _factors(got: Any, case: Case) -> Iterable[tuple[str, Any]]:
    B, A = (as_tensor(each, case.on, name) for each, name in zip(parts(got, "B, A", case.on), "BA", strict=True))
    (d_out, d_in), k = case.inputs[0].shape, case.inputs[1]
    shapes, want = (tuple(B.shape), tuple(A.shape)), ((d_out, k), (k, d_in))
    hint = ": is it (A, B)?" if shapes == want[::-1] else ""
    require(shapes == want, case.on, f"expected shapes {want[0]} and {want[1]}, got {shapes[0]} and {shapes[1]}{hint}")
    yield "the product B A", B @ A


@exercise("right: B and A of rank k, and no other product of that rank is nearer", _factors)
def check_cut() -> Iterator[Case]:
    """Checks `cut(update, k) -> (B, A)`: thin factors whose product is the best approximation of rank k."""
    for seed, (d_out, d_in, k) in enumerate([(6, 9, 2), (9, 6, 4), (7, 7, 1)]):
        update = random_matrix(d_out, d_in, seed=seed)
        U, S, Vh = truncated_svd(update, min(d_out, d_in))
        mistakes = {
            "leaves out the singular values: scale the columns of U by S": (U[:, :k], Vh[:k]),
            "counts the singular values twice: one of the factors takes them": (U[:, :k] * S[:k], S[:k, None] * Vh[:k]),
            "keeps the smallest singular values: torch gives the largest first": (U[:, -k:] * S[-k:], Vh[-k:]),
        }
        yield Case(f"an update ({d_out}, {d_in}), k = {k}", (update, k), (U[:, :k] * S[:k], Vh[:k]), mistakes)
