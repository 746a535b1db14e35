"""The checks of lesson 02's exercises: merging, statements, repairing, swapping, a first step, and growing the rank."""

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.course.checks.exercise import Case, exercise
from lorakit.course.checks.grading import CheckFailed, as_tensor, ask, judge, parts, random_matrix, require, same
from lorakit.layers.bases import weight_of
from lorakit.layers.lora import LoRALinear

SIZES = [(4, 6, 2, 3.0), (7, 7, 3, 8.0)]  # d_out, d_in, rank, alpha; a square one, where transposes go unnoticed


def _merged(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    bias = case.right.bias is not None
    require(isinstance(got, nn.Linear), case.on, f"expected an nn.Linear, got {type(got).__name__}")
    yield "the merged weight", got.weight
    require(bias or got.bias is None, case.on, "the base has no bias, the merged layer has: use bias=False")
    if bias:
        require(got.bias is not None, case.on, "the base's bias is lost: the merged layer needs a copy of it")
        yield "the base's bias is lost: the merged bias", got.bias


@exercise("right: merged equals unmerged, for two shapes and scales, with and without a bias", _merged)
def check_merge() -> Iterator[Case]:
    """Checks `merge(base, A, B, alpha) -> nn.Linear`: any rank and alpha, with and without bias."""
    for (d_out, d_in, rank, alpha), bias in product(SIZES, (False, True)):
        layer = _trained_layer(d_out, d_in, rank, alpha, bias)
        A, B, W, b = layer.A.detach(), layer.B.detach(), weight_of(layer.base).detach(), layer.bias
        delta = layer.delta_weight().detach()
        weights = {
            "is W + B A, off by exactly alpha / r: did you forget the scale?": W + B @ A,
            "is W + alpha B A: divide alpha by the rank": W + alpha * B @ A,
            "is W: the update was not added": W,
            "is s B A: add it to the base's weight": delta,
            "is W - s B A: merging adds": W - delta,
        }
        if d_out == d_in:
            weights["has the update transposed: B A is (d_out, d_in), as W is"] = W + delta.T
        wrong = {hint: _linear(weight, b) for hint, weight in weights.items()}
        if b is not None:
            wrong |= {"is that of a new layer": _linear(W + delta, 0 * b)}
            wrong |= {"has been scaled": _linear(W + delta, layer.scale * b)}
        on = f"nn.Linear({d_in}, {d_out}, bias={bias}), r = {rank}, alpha = {alpha:g}"
        yield Case(on, (layer.base, A, B, alpha), _linear(W + delta, b), wrong)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, *weight.T.shape, bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias.detach()
    return layer


LAYERS = [  # d_in, d_out, rank, alpha, with a bias, standard deviation of a Gaussian start (None: uniform)
    (64, 48, 8, 16.0, False, None),
    (96, 96, 8, 8.0, True, None),
    (833, 16, 4, 8.0, False, None),  # 1 / sqrt(3 * 833) is 0.02
    (80, 40, 6, 6.0, False, 0.02),
    (400, 30, 16, 32.0, True, 1 / 16),
]
ALWAYS = {  # mistakes: the letter of a statement that is called right, or wrong, and why that is a mistake
    "a": ("calls a right: the input meets A, which projects it down to r numbers, and B projects up", ""),
    "b": ("calls b right: A has a row for each of the r directions, and a column for each input", ""),
    "c": ("calls c right: the scale is missing", "calls c wrong, but here alpha / r is 1: compute it"),
    "d": (
        "calls d right: compute A.std()",
        "calls d wrong: compute A.std(), which depends on the width and on the library",
    ),
    "e": (
        "calls e right: a uniform draw ends at 1.7 standard deviations",
        "calls e wrong: this start is a Gaussian one",
    ),
    "f": (
        "calls f right: without a bias base.bias is None, and None has no requires_grad",
        "calls f wrong: it has a bias",
    ),
    "g": ("", "calls g wrong: the merged weight has the shape of W, so it multiplies as often"),
}


def _letters(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    require(isinstance(got, set), case.on, f"expected a set of letters, got {type(got).__name__}")
    yield "your set", got


@exercise("right: seven statements judged, each of five layers", _letters)
def check_wrong() -> Iterator[Case]:
    """Checks `wrong(base, A, B, alpha) -> set`: which statements are wrong of a layer and its adapter."""
    for d_in, d_out, rank, alpha, bias, std in LAYERS:
        layer = _trained_layer(d_out, d_in, rank, alpha, bias)
        draw = random_matrix(rank, d_in, seed=d_in)
        uniform = (2 * torch.special.ndtr(draw) - 1) / d_in**0.5  # the default of PEFT and loralib
        right = {"a", "b"} | ({"c"} if alpha != rank else set()) | ({"f"} if not bias else set())
        right |= {"e"} if std is None else set()
        right |= {"d"} if d_in != 833 and std != 0.02 else set()
        mistakes: dict[str, set[str]] = {}
        for letter, hints in ALWAYS.items():
            for hint, answer in zip(hints, (right - {letter}, right | {letter}), strict=True):
                mistakes |= {hint: answer} if hint else {}
        start = "uniform" if std is None else f"Gaussian, {std:g}"
        on = f"nn.Linear({d_in}, {d_out}, bias={bias}), r = {rank}, alpha = {alpha:g}, start of A {start}"
        yield Case(on, (layer.base, uniform if std is None else std * draw, layer.B.detach(), alpha), right, mistakes)


def check_layer(layer: Any) -> None:
    """Checks a class, called `layer(base, rank, alpha, dropout)`: start, what trains, scale, and dropout's place."""
    for d_out, d_in, rank, alpha in SIZES:
        on = f"nn.Linear({d_in}, {d_out}), r = {rank}, alpha = {alpha:g}, dropout = 0.5"
        reference = _trained_layer(d_out, d_in, rank, alpha, bias=True)
        trains = copy.deepcopy(reference.base).requires_grad_(True)  # as it comes from nn.Linear: freezing is asked for
        mine = ask(layer, trains, rank, alpha, 0.5, on=on)
        require(isinstance(mine, nn.Module), on, f"expected an nn.Module, got {type(mine).__name__}")
        A, B = (getattr(mine, name, None) for name in "AB")
        if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)):
            raise CheckFailed(f"{on}: expected two nn.Parameter named A and B")
        shapes = tuple(A.shape), tuple(B.shape)
        require(shapes == ((rank, d_in), (d_out, rank)), on, f"A and B should be {(rank, d_in)} and {(d_out, rank)}")
        _check_start(mine, reference, on)
        _check_forward(mine, reference, on)
    print("right: starts as the base, trains A and B alone, s = alpha / r, dropout on the adapter's input alone")


def _check_start(mine: Any, reference: LoRALinear, on: str) -> None:
    require(not mine.B.any(), on, "the model changes before training begins: B must start at zero")
    require(bool(mine.A.any()), on, "A and B both start at zero, so both gradients are zero for ever: draw A at random")
    rank = int(torch.linalg.matrix_rank(mine.A.detach()))
    message = f"the rows of A hold {rank} directions, not {len(mine.A)}, and equal rows stay equal: draw A at random"
    require(rank == len(mine.A), on, message)
    trains = {name for name, p in mine.named_parameters() if p.requires_grad}
    extra = ", ".join(sorted(trains - {"A", "B"}))
    require(not extra, on, f"{extra} would train too: freeze the base with requires_grad_(False)")
    require(trains == {"A", "B"}, on, "A and B must both require a gradient")
    x = random_matrix(5, mine.A.shape[1], seed=3)
    message = "with B = 0 in training mode the output is not the base's: dropout may only touch the adapter's input"
    require(same(_output(mine.train(), x, on), reference.base(x).double()), on, message)


def _check_forward(mine: Any, reference: LoRALinear, on: str) -> None:
    mine.A.data, mine.B.data = reference.A.detach().clone(), reference.B.detach().clone()
    x = random_matrix(5, mine.A.shape[1], seed=4)
    y, update = reference.base(x), x @ reference.A.T @ reference.B.T
    mistakes = {
        "is W x + B A x, off by exactly alpha / r: where is the scale?": y + update,
        "is W x + alpha B A x: divide alpha by the rank": y + reference.alpha * update,
        "is W x alone: the adapter's path is missing": y,
    }
    out = ask(mine.eval(), x, on=on)
    judge(out, reference(x), mistakes, on, "the output in eval mode")
    reached = getattr(out, "requires_grad", False)
    reached = reached and None not in torch.autograd.grad(out.sum(), [mine.A, mine.B], allow_unused=True)
    require(reached, on, "A and B would not train: no gradient reaches both; compute without no_grad and detach")
    units = torch.eye(x.shape[1], dtype=x.dtype).repeat(
        16, 1
    )  # dropout leaves such a row its whole update, or nothing of it
    moved = _output(mine.train(), units, on) - reference.base(units).double()
    kept = moved.norm(dim=1, keepdim=True) > 1e-4
    full = 2 * (reference(units) - reference.base(units)).double()  # what is kept is divided by 1 - 0.5
    require(not kept.all(), on, "dropout does nothing in training mode: apply it to what goes into A")
    message = "dropout is at the wrong place of the adapter's path: apply it to x, before A, and only there"
    require(same(moved, full * kept), on, message)


def _output(mine: Any, x: Tensor, on: str) -> Tensor:
    y, shape = as_tensor(ask(mine, x, on=on), on, "the output"), (len(x), len(mine.B))
    require(y.shape == shape, on, f"the output should have shape {shape}, got {tuple(y.shape)}")
    return y


@exercise("right: the old update left, the new one came, each with its own scale", "the weight")
def check_swap() -> Iterator[Case]:
    """Checks `swap(weight, old, new) -> weight`: one merged adapter out, another in; each is (A, B, alpha)."""
    for d_out, d_in, (r1, alpha1), (r2, alpha2) in [(5, 8, (2, 3.0), (4, 10.0)), (6, 6, (3, 1.5), (1, 2.5))]:
        old, new = _trained_layer(d_out, d_in, r1, alpha1), _trained_layer(d_out, d_in, r2, alpha2)
        W, P, Q = weight_of(old.base).detach(), old.delta_weight().detach(), new.delta_weight().detach()
        BA, DC = P / old.scale, Q / new.scale
        mistakes = {
            "still holds the old adapter: subtract its update first": W + P + Q,
            "has lost the old adapter, and not got the new one": W,
            "has the signs reversed: the old one leaves, the new one comes": W + 2 * P - Q,
            "is unscaled: each update is (alpha / r) B A, with its own alpha and r": W + P - BA + DC,
            "has the old adapter's scale in both updates": W + old.scale * DC,
            "has the new adapter's scale in both updates": W + P - new.scale * BA + Q,
        }
        adapters = [(layer.A.detach(), layer.B.detach(), layer.alpha) for layer in (old, new)]
        on = f"weight ({d_out}, {d_in}), r = {r1} and alpha = {alpha1:g} for r = {r2} and alpha = {alpha2:g}"
        yield Case(on, (W + P, *adapters), W + Q, mistakes)


@exercise("right: the prediction is what a LoRALinear does in one step of SGD", "the first update")
def check_first_update() -> Iterator[Case]:
    """Checks `first_update(grad_W, A, alpha, lr) -> s B A` after one step of SGD, against a layer that takes it."""
    for d_out, d_in, rank, alpha in SIZES:
        lr, x = 0.1 * rank, random_matrix(9, d_in, seed=rank)
        layer = _trained_layer(d_out, d_in, rank, alpha)
        nn.init.zeros_(layer.B)
        A, s = layer.A.detach().clone(), layer.scale
        layer.base.requires_grad_(True)
        loss = layer(x).square().sum(1).mean()
        grad_W, dA, dB = torch.autograd.grad(loss, [weight_of(layer.base), layer.A, layer.B])
        layer.base.requires_grad_(False)
        for p, grad in ((layer.A, dA), (layer.B, dB)):
            p.data -= lr * grad  # the step of SGD whose outcome the answer predicts
        mistakes = {
            "has s once: it is in the gradient of B, and again in s B A": -lr * s * grad_W @ A.T @ A,
            "has the wrong sign: SGD steps against the gradient": lr * s * s * grad_W @ A.T @ A,
            "is full fine-tuning's step: LoRA moves only along the rows of A": -lr * grad_W,
            "is scaled, but not projected on the rows of A": -lr * s * s * grad_W,
            "is the new B: the update of the weight is s B A": -lr * s * grad_W @ A.T,
            "has no scale: s = alpha / r comes twice": -lr * grad_W @ A.T @ A,
        }
        on = f"grad_W ({d_out}, {d_in}), r = {rank}, alpha = {alpha:g}, lr = {lr:g}"
        yield Case(on, (grad_W, A, alpha, lr), layer.delta_weight().detach(), mistakes)


def check_grow(grow: Any) -> None:
    """Checks `grow(A, B, alpha, new_rank) -> (A, B, alpha)`: the same update, and room to learn more."""
    for d_out, d_in, rank, alpha in [(7, 9, 2, 3.0), (12, 8, 3, 5.0)]:
        new_rank = 2 * rank + 1
        on = f"A ({rank}, {d_in}), B ({d_out}, {rank}), alpha = {alpha:g}, new rank {new_rank}"
        layer = _trained_layer(d_out, d_in, rank, alpha)
        inputs = layer.A.detach(), layer.B.detach(), alpha, new_rank
        A, B, new_alpha = (as_tensor(p, on, "a part") for p in parts(ask(grow, *inputs, on=on), "A, B, alpha", on))
        shapes = (new_rank, d_in), (d_out, new_rank)
        got = tuple(A.shape), tuple(B.shape)
        require(got == shapes, on, f"A and B should have shapes {shapes[0]} and {shapes[1]}, got {got[0]} and {got[1]}")
        require(new_alpha.ndim == 0, on, "alpha should be a number")
        delta, scale = layer.delta_weight().detach().double(), new_alpha / new_rank
        old_is_kept = same(scale * B[:, :rank] @ A[:rank], delta)
        mistakes = {
            "shrank by old rank / new rank: with s = alpha / r, alpha must grow as r does": delta * rank / new_rank,
            "shrank: the square root is rsLoRA's rule, here s = alpha / r": delta * (rank / new_rank) ** 0.5,
            "has grown by what was added: new rows or new columns must be zero": scale * B @ A if old_is_kept else None,
        }
        judge(scale * B @ A, delta, mistakes, on, "the update s B A")
        full = max(torch.linalg.matrix_rank(M).item() for M in (A, B))
        zeros = (~A.any(1) & ~B.any(0)).any().item()
        require(not zeros, on, "where a row of A and its column of B are both zero, nothing will ever be learned")
        require(full == new_rank, on, f"the new rows repeat the old ones: A and B have rank {full}, not {new_rank}")
    print("right: the same update up to rounding, and every new direction can learn")


def _trained_layer(d_out: int, d_in: int, rank: int, alpha: float, bias: bool = False) -> LoRALinear:
    """An adapted layer whose B is no longer zero; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        layer = LoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float32), rank, alpha)
    for seed, p in enumerate(layer.parameters()):
        p.data = random_matrix(*p.shape, seed=seed + rank)
    return layer
