"""The mathematics of low rank: truncated SVD, measures of rank, subspaces compared, training in a random subspace."""

import torch
from jaxtyping import Float
from torch import Tensor


def truncated_svd(
    matrix: Float[Tensor, "d_out d_in"], k: int
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " k"], Float[Tensor, "k d_in"]]:
    """The k largest singular values of a matrix and their vectors: `M_k = U diag(S) Vh`.

    No matrix of rank k is nearer to M, in the Frobenius or the spectral norm (Eckart & Young 1936, Mirsky 1960).

    Args:
        matrix: M, of any floating dtype; half precision is computed in float32.
        k: rank to keep, from 1 to min(d_out, d_in).

    Returns:
        U with orthonormal columns, S in falling order, Vh with orthonormal rows. As factors: `B = U * S`, `A = Vh`.

    Raises:
        ValueError: k is out of range, or the matrix holds NaN or infinity.
    """
    _check_k(k, min(matrix.shape), "the matrix's shorter side")
    if not matrix.isfinite().all():
        raise ValueError("expected a finite matrix, got NaN or infinity in it")
    U, S, Vh = torch.linalg.svd(
        matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False
    )
    return U[:, :k], S[:k], Vh[:k]


def captured_energy(singular_values: Float[Tensor, " n"], k: int) -> float:
    """The share of the squared Frobenius norm in the k largest singular values: `sum_{i<=k} s_i^2 / sum_i s_i^2`.

    Args:
        singular_values: of one matrix, in any order.
        k: from 0 to n.

    Returns:
        A number in [0, 1]: one minus the squared relative error of the best rank-k approximation.

    Raises:
        ValueError: k is out of range, or the values are not those of a matrix other than zero.
    """
    energy = _check_values(singular_values).square().sort(descending=True).values
    _check_k(k, len(energy), "the number of singular values", least=0)
    return (energy[:k].sum() / energy.sum()).item()


def effective_rank(singular_values: Float[Tensor, " n"]) -> float:
    """The exponential of the entropy of the spectrum: `exp(-sum p_i ln p_i)` with `p_i = s_i / sum s`.

    n equal values give n. Source: Roy & Vetterli 2007, "The effective rank", EUSIPCO, definition 1.
    Args and errors as in `captured_energy`; returns a real number from 1 to n.
    """
    values = _check_values(singular_values)
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def stable_rank(singular_values: Float[Tensor, " n"]) -> float:
    """The squared Frobenius norm over the squared spectral norm: `sum s_i^2 / max s_i^2`, never above `effective_rank`.

    Source: Rudelson & Vershynin 2007, "Sampling from large matrices", J. ACM 54(4), as "numerical rank".
    Args and errors as in `captured_energy`; returns a real number from 1 to n.
    """
    energy = _check_values(singular_values).square()
    return (energy.sum() / energy.max()).item()


def lora_parameters(d_out: int, d_in: int, rank: int) -> int:
    """The numbers in B and A together: `r (d_out + d_in)`, against `d_out d_in` in the matrix that they adapt.

    Raises:
        ValueError: a size or the rank is below 1.
    """
    if min(d_out, d_in, rank) < 1:
        raise ValueError(f"expected d_out, d_in, rank >= 1, got {(d_out, d_in, rank)}")
    return rank * (d_out + d_in)


def break_even_rank(d_out: int, d_in: int) -> float:
    """The rank, a real number, at which A and B hold as many numbers as the matrix: `d_out d_in / (d_out + d_in)`."""
    return d_out * d_in / lora_parameters(d_out, d_in, 1)


def subspace_similarity(A: Float[Tensor, "rows_a d"], B: Float[Tensor, "rows_b d"], i: int, j: int) -> float:
    """How much of the smaller subspace lies in the larger one: `||U_A^i' U_B^j||_F^2 / min(i, j)`.

    U_A^i holds the first i right singular vectors of A, U_B^j the first j of B. Source: Hu et al. 2021, section 7.2,
    equation 4, which compares LoRA's A matrices of shape (rank, d_in). For B of shape (d_out, rank) pass `B.T`.

    Args:
        A: rows in a space of d dimensions.
        B: rows in the same space.
        i, j: numbers of directions of A and of B, from 1 to min(rows, d) of each.

    Returns:
        A number in [0, 1]: 0 for orthogonal subspaces, 1 if one holds the other. For random ones `random_similarity`.

    Raises:
        ValueError: i or j is out of range, or a matrix holds NaN or infinity.
    """
    Ua, Ub = truncated_svd(A, i)[2].T, truncated_svd(B, j)[2].T  # (d, i), (d, j)
    return (Ua.T @ Ub.to(Ua)).square().sum().item() / min(i, j)


def random_similarity(i: int, j: int, dimension: int) -> float:
    """What `subspace_similarity` is on average for two independent random subspaces: `max(i, j) / dimension`.

    Each of the i j squared cosines is 1 / dimension on average. Raises ValueError for i or j out of range.
    """
    _check_k(min(i, j), dimension, "the dimension")
    _check_k(max(i, j), dimension, "the dimension")
    return max(i, j) / dimension


def amplification(weight: Float[Tensor, "d_out d_in"], delta: Float[Tensor, "d_out d_in"], k: int) -> float:
    """By how much an update amplifies its own directions in a weight: `||dW||_F / ||U' W V||_F`.

    U and V hold the first k left and right singular vectors of dW. Source: Hu et al. 2021, section 7.3.

    Args:
        weight: W.
        delta: dW, the update.
        k: number of directions, from 1 to min(d_out, d_in).

    Returns:
        A positive number, far above 1 if the update is large where the weight was small.

    Raises:
        ValueError: k is out of range, a matrix holds NaN or infinity, or the weight has nothing in these directions.
    """
    U, _, Vh = truncated_svd(delta, k)
    inside = (U.T @ weight.to(U) @ Vh.T).norm().item()
    if inside == 0:
        raise ValueError("expected a weight that is not zero along the update's directions, got zero")
    return delta.norm().item() / inside


def factored_singular_values(B: Float[Tensor, "d_out rank"], A: Float[Tensor, "rank d_in"]) -> Float[Tensor, " n"]:
    """The singular values of `B A` in falling order, float64, without the product: those of `R_B R_A'`.

    `B = Q_B R_B` and `A' = Q_A R_A` have orthonormal Qs: the values are those of a matrix of at most rank x rank.
    The others, up to min(d_out, d_in), are zero.

    Args:
        B, A: finite, of any floating dtype.
    """
    R_B = torch.linalg.qr(B.detach().double(), mode="r").R  # (min(d_out, rank), rank)
    R_A = torch.linalg.qr(A.detach().double().T, mode="r").R  # (min(d_in, rank), rank)
    return torch.linalg.svdvals(R_B @ R_A.T)


def factored_svd(
    B: Float[Tensor, "*stack d_out rank"], A: Float[Tensor, "*stack rank d_in"]
) -> tuple[Float[Tensor, "*stack d_out n"], Float[Tensor, "*stack n"], Float[Tensor, "*stack n d_in"]]:
    """The SVD `U diag(S) Vh` of `B A` without the product, in the factors' dtype; n is at most the rank.

    With `B = Q R` and `A' = P T`, it is that of the small matrix in `B A = Q (R T') P'`: O(d rank^2) for widths d.
    """
    Q, R = torch.linalg.qr(B)  # (d_out, n), (n, rank)
    P, T = torch.linalg.qr(A.mT)  # (d_in, m), (m, rank)
    U, S, Vh = torch.linalg.svd(R @ T.mT, full_matrices=False)
    return Q @ U, S, Vh @ P.mT


def count_intruders(
    weight: Float[Tensor, "d_out d_in"], delta: Float[Tensor, "d_out d_in"], k: int = 10, epsilon: float = 0.5
) -> int:
    """How many of the first k left singular vectors of `W + dW` are intruder dimensions: like none of W's.

    Such a vector's cosine with every left singular vector of W is below epsilon, in magnitude. Source: Shuttleworth et
    al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, algorithm 1; the defaults are
    PEFT's for it (`reduce_intruder_dimension`).

    Args:
        weight: W.
        delta: dW, the update.
        k: how many vectors are looked at; if W has fewer, all of them.
        epsilon: in (0, 1].

    Raises:
        ValueError: k or epsilon is out of range.
    """
    return _intruders(weight, delta, k, epsilon).shape[1]


def lower_intruders(
    weight: Float[Tensor, "d_out d_in"],
    delta: Float[Tensor, "d_out d_in"],
    share: float = 0.75,
    k: int = 10,
    epsilon: float = 0.5,
) -> Float[Tensor, "d_out d_in"]:
    """An update whose intruder dimensions have `share` of their singular values: `dW - (1 - share) U U' (W + dW)`.

    U holds the intruders that `count_intruders` counts. Source: as there, section 6, where the share is lambda.

    Args:
        weight: W.
        delta: dW.
        share: what remains of each singular value; 1 changes nothing, 0 takes the dimensions away.
        k, epsilon: as for `count_intruders`.

    Returns:
        the new update, in dW's dtype.

    Raises:
        ValueError: share is not in [0, 1], or k or epsilon is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected share in [0, 1], got {share}")
    U = _intruders(weight, delta, k, epsilon)
    return (delta.double() - (1 - share) * U @ (U.T @ (weight.double() + delta.double()))).to(delta.dtype)


def _intruders(weight: Tensor, delta: Tensor, k: int, epsilon: float) -> Float[Tensor, "d_out n"]:
    """Those of the first k left singular vectors of W + dW that are like none of W's, float64."""
    if k < 1 or not 0 < epsilon <= 1:
        raise ValueError(f"expected k >= 1 and epsilon in (0, 1], got {k} and {epsilon}")
    W = weight.detach().double()
    before, after = _left_singular(W), _left_singular(W + delta.detach().double())[:, :k]
    cosines = (after.T @ before).abs()  # (k, n)
    return after[:, ~(cosines >= epsilon).any(1)]


def _left_singular(matrix: Tensor) -> Tensor:
    """Left singular vectors by falling value, those of the value zero left out: from the smaller Gram matrix.

    In float64 that is exact enough for cosines, in a third of an SVD's time.
    """
    d_out, d_in = matrix.shape
    gram = matrix @ matrix.T if d_out <= d_in else matrix.T @ matrix
    energy, vectors = torch.linalg.eigh(gram)
    kept = energy > energy[-1].clamp(min=1e-300) * 1e-14
    vectors = vectors[:, kept].flip(1)
    if d_out <= d_in:
        return vectors
    return torch.nn.functional.normalize(matrix @ vectors, dim=0)


def _check_k(k: int, most: int, what: str, least: int = 1) -> None:
    if not least <= k <= most:
        raise ValueError(f"expected a whole number from {least} to {most} ({what}), got {k}")


def _check_values(singular_values: Tensor) -> Tensor:
    values = singular_values.detach().double()
    if not (len(values) and values.isfinite().all() and values.min() >= 0 and values.max() > 0):
        raise ValueError("expected finite singular values, none below and not all at zero, got others")
    return values / values.max()  # so that no square under- or overflows
