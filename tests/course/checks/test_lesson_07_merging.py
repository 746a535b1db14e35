"""The checks of lesson 07, merging: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import SOLVED, assert_refused, each_mistake


def cut_whole(A, B, rank):
    """`compress` by the whole matrix, which a randomised SVD makes quick."""
    U, S, V = torch.svd_lowrank(B @ A, q=len(A) + 4, niter=6)
    return S[:rank, None] * V.T[:rank], U[:, :rank]


def summed(adapters, weights):
    return sum(w * s * B @ A for (A, B, s), w in zip(adapters, weights, strict=True))


def by_least_squares(updates, target):
    """Right, but of whole matrices."""
    each, aim = torch.stack([(B @ A).flatten().double() for A, B in updates], dim=1), (target[1] @ target[0]).flatten()
    return torch.linalg.lstsq(each, aim.double()).solution


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_swallowed": [
        (lambda W, D: 100 * SOLVED["check_swallowed"](W, D), "the share should be 0.46125, got 46.125"),
        (lambda W, D: torch.allclose((W.float() + D).to(W.dtype), W), "the share"),
        (lambda W, D: (W + D.to(W.dtype) == W)[D != 0].float().mean().item(), "rounds twice"),
    ],
    "check_add_adapters": [
        (lambda each, w: SOLVED["check_add_adapters"](each, w)[::-1], "expected A (rank, 7)"),
        (lambda each, w: torch.cat([A for A, _, _ in each]), "expected `return A, B`"),
        (lambda each, w: (torch.eye(7), summed(each, w)), "expected the ranks to add up"),
        (lambda each, w: SOLVED["check_add_adapters"](each, [abs(x) for x in w]), "without the signs"),
    ],
    "check_compress": [
        (lambda A, B, rank: cut_whole(A, B, min(rank, len(A))), "B A is not needed"),
        (lambda A, B, rank: (A, B), "expected A (5, 130)"),
        (lambda A, B, rank: SOLVED["check_compress"](A, B, rank)[::-1], "expected A (5, 130)"),
        (lambda A, B, rank: SOLVED["check_compress"](A, B, max(1, rank - 1)), "expected A"),
        (lambda A, B, rank: (A[: min(rank, len(A))], B[:, :rank]), "keeps the first columns"),
    ],
    "check_best_weights": [
        (lambda each, target: SOLVED["check_best_weights"](each, target)[:, None], "should have shape"),
        (lambda each, target: SOLVED["check_best_weights"](each, target).softmax(0), "w "),
        (by_least_squares, "right, but something of 9,600 numbers was made: B A is not needed"),
    ],
    "check_expected_share": [
        (lambda v, held, size: SOLVED["check_expected_share"](v, held, size) / 2, "counts half the gap"),
        (lambda v, held, size: SOLVED["check_expected_share"](v, held, size) * size**2, "own square"),
        (lambda v, held, size: SOLVED["check_expected_share"](v, held, 2 * size), "the share should be"),
    ],
}


@each_mistake("07_merging", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
