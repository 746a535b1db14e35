"""The mathematics of low rank: truncated SVD, measures of rank, subspaces compared, training in a random subspace."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


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


class RandomSubspace(nn.Module):
    """A model whose trainable parameters move in a random subspace alone: `theta = theta_0 + P z`, z of d numbers.

    P: (D, d) is a count sketch (Charikar et al. 2002) with buckets of equal size, as in Uni-LoRA (arXiv:2506.00799):
    each of the D parameters follows one random coordinate of z, with a random sign. P's columns are orthonormal, so
    `||P z|| = ||z||`; it takes 5 bytes a parameter, a dense P 4 d. At d = D this is full training. Method: Li et al.
    2018 (arXiv:1804.08838), with Fastfood; Aghajanyan et al. 2020 (arXiv:2012.13255), on pretrained models.
    The model is wrapped, not copied, and frozen. `fit` and `exact_match` take the wrapper; `write_back` to generate.

    Args:
        model: the parameters that require a gradient are theta.
        dimension: d, from 1 to their number D.
        seed: of P; the global random state is left as it was.

    Raises:
        ValueError: nothing requires a gradient, or d is out of range.
    """

    def __init__(self, model: nn.Module, dimension: int, seed: int = 0):
        super().__init__()
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError("expected a model with parameters that require a gradient, got none")
        size = sum(p.numel() for p in params.values())
        _check_k(dimension, size, "the number of trainable parameters")
        like, generator = next(iter(params.values())), torch.Generator().manual_seed(seed)
        buckets = (torch.randperm(size, generator=generator) % dimension).int()  # (D): which coordinate each follows
        signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1  # (D)
        counts = size // dimension + (torch.arange(dimension) < size % dimension)  # (d)
        self.model, self.config, self.names = model, getattr(model, "config", None), list(params)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.z = nn.Parameter(torch.zeros(dimension, dtype=dtype, device=like.device))
        self.register_buffer("buckets", buckets.to(like.device), persistent=False)
        self.register_buffer("signs", signs.to(like.device), persistent=False)
        self.register_buffer("lengths", counts.to(self.z).rsqrt(), persistent=False)  # P's entries: ± these
        model.requires_grad_(False)
        self.train(model.training)

    def theta(self) -> dict[str, Tensor]:
        """The parameters `theta_0 + P z` by name."""
        origin = {name: self.model.get_parameter(name) for name in self.names}
        moves = (self.z * self.lengths).index_select(0, self.buckets) * self.signs  # (D)
        parts = moves.split([p.numel() for p in origin.values()])
        return {name: p + part.view_as(p).to(p) for (name, p), part in zip(origin.items(), parts, strict=True)}

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.model, self.theta(), args, kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """The model's output head, None if it names none."""
        return getattr(self.model, "get_output_embeddings", lambda: None)()

    @torch.no_grad()
    def write_back(self) -> nn.Module:
        """Writes `theta_0 + P z` into the model and returns it, trainable as before; then sets z to zero."""
        for name, value in self.theta().items():
            self.model.get_parameter(name).copy_(value)
        self.z.zero_()
        return self.remove()

    def remove(self) -> nn.Module:
        """Returns the model as it was, at theta_0 and trainable."""
        for name in self.names:
            self.model.get_parameter(name).requires_grad_(True)
        return self.model


def _check_k(k: int, most: int, what: str, least: int = 1) -> None:
    if not least <= k <= most:
        raise ValueError(f"expected a whole number from {least} to {most} ({what}), got {k}")


def _check_values(singular_values: Tensor) -> Tensor:
    values = singular_values.detach().double()
    if not (len(values) and values.isfinite().all() and values.min() >= 0 and values.max() > 0):
        raise ValueError("expected finite singular values, none below and not all at zero, got others")
    return values / values.max()  # so that no square under- or overflows
