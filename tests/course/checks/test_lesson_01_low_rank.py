"""The checks of lesson 01, low rank: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import assert_refused, each_mistake
from torch.nn import functional as F


def normed(matrix, update):
    return matrix * update.norm() / matrix.norm()


def thin(update, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = update.shape
    return torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)


def shared(B, A, left, right):
    U, S, Vh = svd(B @ A)
    r = B.shape[1]
    return U[:, :r] * S[:r] ** left, S[:r, None] ** right * Vh[:r]


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def cut(matrix, k):
    U, S, Vh = svd(matrix)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def cumulated(matrix):
    energy = torch.linalg.svdvals(matrix).square()
    return energy.cumsum(0) / energy.sum()


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_largest_rank": [
        (lambda d_out, d_in: d_out * d_in // (d_out + d_in), "exactly as many numbers as the matrix"),
        (lambda d_out, d_in: 2047, "a matrix (576, 576): your rank should be 287, got 2,047"),
    ],
    "check_best_approximation": [
        (lambda matrix, k: (torch.diag(torch.linalg.svdvals(matrix)), 1, 1), "should have shape (6, 9), got (6, 6)"),
        (lambda matrix, k: (cut(matrix, k).T, 1, 1), "got (9, 6); is it transposed?"),
        (lambda matrix, k: (cut(matrix, k), (matrix - cut(matrix, k)).square().sum(), 1), "take the root"),
    ],
    "check_rank_for_energy": [
        (lambda matrix, share: int((matrix.pow(2).sum(0) > 0).sum()), "your k should be 10, got 30"),
        (lambda matrix, share: int((cumulated(matrix) < share).sum()), "is one too small: after cumsum"),
    ],
    "check_similarity": [
        (lambda A1, A2: torch.linalg.qr(A1).Q.T @ torch.linalg.qr(A2).Q, "should have shape ()"),
        (lambda A1, A2: (F.normalize(A1) @ F.normalize(A2).T).norm() ** 2 / min(len(A1), len(A2)), "not orthogonal"),
    ],
    "check_control": [
        (lambda update, rank, seed: normed(torch.randn(update.shape), update), "multiply two thin ones"),
        (lambda update, rank, seed: thin(update, rank, seed), "divide by its own norm first"),
        (
            lambda update, rank, seed: (
                thin(update, rank, seed)
                * (torch.linalg.matrix_norm(update, 2) / torch.linalg.matrix_norm(thin(update, rank, seed), 2))
            ),
            "match the Frobenius norm, not the spectral one",
        ),
        (lambda update, rank, seed: -update, "of the update's input directions"),
        (lambda update, rank, seed: update[:, torch.randperm(update.shape[1])], "update's output directions"),
        (lambda update, rank, seed: normed(thin(update, rank, 0), update), "two seeds give the same matrix"),
        (lambda update, rank, seed: normed(thin(update, 1, seed), update), "has rank 1, not 3"),
        (lambda update, rank, seed: normed(thin(update.T, rank, seed), update), "should have shape (40, 60)"),
    ],
    "check_balance": [
        (lambda B, A: shared(B, A, 1, 0), "share the singular values equally"),
        (lambda B, A: shared(B, A, 1, 1), "counts the singular values twice"),
        (lambda B, A: shared(B, A, 0, 0), "has lost the singular values"),
        (lambda B, A: (B, A), "share the singular values equally"),
        (lambda B, A: (B * (A.norm() / B.norm()).sqrt(), A * (B.norm() / A.norm()).sqrt()), "one factor for all"),
        (lambda B, A: (A, B), "is it (A, B)?"),
        (lambda B, A: svd(B @ A)[::2], "cut U, S and Vh after r"),
    ],
}


@each_mistake("01_low_rank", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
