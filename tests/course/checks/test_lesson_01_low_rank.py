"""The checks of lesson 01, low rank: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import assert_refused, each_mistake


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


def factors(matrix, k):
    U, S, Vh = svd(matrix)
    return U[:, :k] * S[:k], Vh[:k]


def cumulated(matrix):
    energy = torch.linalg.svdvals(matrix).square()
    return energy.cumsum(0) / energy.sum()


def counted(pair=lambda d_out, d_in: d_out + d_in, places=("block", "once"), blocks=lambda model: model["blocks"]):
    """A count of an adapter, wrong in one respect."""

    def recount(told, model, rank, targets):
        shapes = [
            shape
            for place in places
            for name, shape in model[place].items()
            for _ in range(blocks(model) if place == "block" else 1)
            if name in targets
        ]
        n = sum(rank * pair(*shape) for shape in shapes)
        return n, 100 * n / (model["total"] + n), told / n

    return recount


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_recount": [
        (counted(blocks=lambda model: 1), "statement C: trainable is that of one block"),
        (counted(pair=lambda d_out, d_in: d_in), "statement A: trainable has one matrix for each layer"),
        (counted(pair=lambda d_out, d_in: 2 * d_in), "statement F: trainable takes each layer for a square one"),
        (
            lambda told, model, rank, names: counted()(told, model, rank**2, names),
            "statement A: trainable has the rank twice",
        ),
        (counted(places=("block",)), "statement G: trainable leaves out the output head"),
        (lambda told, model, rank, targets: told, "expected `return trainable, percent, times`, got int"),
        (lambda told, model, rank, targets: (told, 0, 1), "statement A: percent should be"),
        (lambda told, *setting: (*counted()(told, *setting)[:2], told), "statement A: times should be 1, got 196,608"),
    ],
    "check_largest_rank": [
        (lambda d_out, d_in: d_out * d_in // (d_out + d_in), "exactly as many numbers as the matrix"),
        (lambda d_out, d_in: 2047, "a matrix (576, 576): your rank should be 287, got 2,047"),
    ],
    "check_memory": [
        (lambda frozen, trained, tasks: (12 * trained, 2 * trained, 20 * trained), "4 + 4 + 4 in 32 bits"),
        (lambda frozen, trained, tasks: (16 * trained, 2 * trained, 2 * trained * tasks), "leaves out the frozen"),
        (lambda frozen, trained, tasks: (2 * frozen + 16 * trained, 16 * trained, 0), "file is a number of bits"),
        (lambda frozen, trained, tasks: (2 * frozen + 16 * trained, 2 * trained, 2 * trained * tasks), "no adapter"),
        (lambda frozen, trained, tasks: 16 * trained, "expected `return training, file, storage`, got int"),
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
    "check_energy": [
        (lambda S, k: 100 * (S[:k] ** 2).sum() / (S**2).sum(), "your share should be"),
        (lambda S, k: S[:k].sum() / S.sum(), "energy is their square"),
        (lambda S, k: (S**2).cumsum(0) / (S**2).sum(), "should have shape ()"),
    ],
    "check_cut": [
        (lambda M, k: factors(M, k)[::-1], "is it (A, B)?"),
        (lambda M, k: cut(M, k), "expected `return B, A`"),
        (lambda M, k: factors(M, k + 1), "expected shapes (6, 2) and (2, 9), got (6, 3) and (3, 9)"),
        (lambda M, k: (svd(M)[0][:, :k], svd(M)[2][:k]), "leaves out the singular values"),
    ],
}


@each_mistake("01_low_rank", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
