"""Adapter arithmetic on the updates themselves, sBA of each layer: sums, differences, compression, TIES, DARE.

Factors cannot be added: (B1 + B2)(A1 + A2) has cross terms that no adapter has learnt. So every function here takes and
returns changes of weights, `Updates`, whatever ranks and scale rules the adapters had:

sql, poems = read_updates("sql-adapter"), read_updates("poem-adapter")
attach(model, compress(linear([sql, poems], [1.0, 0.5]), rank=16))
save_adapter(model, "both")
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit._numbers import check_integer, check_list, is_number
from lorakit._words import short
from lorakit.layers.lowrank import factored_svd
from lorakit.merging.updates import Update, Updates, check_updates


def linear(updates: Sequence[Updates], weights: Sequence[float]) -> dict[str, Update]:
    """The weighted sum of changes, exactly: `dW = sum_k w_k dW_k`, whose factors are those of all, side by side.

    The ranks add up. A weight of -1 subtracts: task arithmetic and negation (Ilharco et al. 2023, arXiv:2212.04089).

    Args:
        updates: of one or more adapters; a layer that one of them lacks is unchanged by it.
        weights: one finite number an adapter, of any sign.

    Raises:
        ValueError: no adapters, another number of weights, or a layer that has two shapes.
    """
    _check(updates, weights)
    found = {}
    for name, parts in _by_layer(updates, weights).items():
        B = torch.cat([weight * part.B for weight, part in parts], dim=-1)
        found[name] = Update(B, torch.cat([part.A for _, part in parts], dim=-2))
    return found


def compress(updates: Updates, rank: int) -> dict[str, Update]:
    """The nearest changes of at most this rank, by the SVD of each, which is never made as a whole.

    No change of that rank is nearer (Eckart & Young 1936); for a layer d wide with factors of rank R it costs O(d R^2)
    instead of O(d^3). B and A get equal shares of the singular values.

    Args:
        updates: of any rank.
        rank: at least 1; layers whose rank is lower already keep theirs.

    Raises:
        ValueError: these are no updates, or the rank is below 1.
    """
    check_integer("rank", rank)
    check_updates(updates)
    return {name: _compressed(update, rank) for name, update in updates.items()}


def from_svd(
    U: Float[Tensor, "*stack d_out n"], S: Float[Tensor, "*stack n"], Vh: Float[Tensor, "*stack n d_in"], rank: int
) -> Update:
    """The change of `U diag(S) Vh` cut to a rank; B and A get equal shares of the singular values."""
    root = S[..., :rank].sqrt()
    return Update(U[..., :rank] * root[..., None, :], root[..., None] * Vh[..., :rank, :])


def ties(updates: Sequence[Updates], weights: Sequence[float], density: float, rank: int | None) -> dict[str, Update]:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim each change, elect a sign for each entry, average who has it.

    Of each layer and adapter the share `density` of entries that are largest stays; the weighted sum has the sign;
    the result is the mean of the weighted entries with that sign, and then the nearest change of this rank.

    Args:
        updates, weights: as in `linear`.
        density: in (0, 1].
        rank: of the result, at least 1. An update that is trimmed or voted on has full rank, and `rank` cuts that; None
            leaves it whole, as a merged model holds it: B is the change, and A the identity.

    Raises:
        ValueError: as in `linear`, or density or rank out of range.
    """

    def vote(changes: list[Tensor]) -> Tensor:
        stack = torch.stack([_trimmed(change, density) for change in changes])
        agree = stack * stack.sum(0).sign() > 0
        return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)

    return _dense(updates, weights, density, rank, vote)


def dare(
    updates: Sequence[Updates], weights: Sequence[float], density: float, rank: int | None, seed: int = 0
) -> dict[str, Update]:
    """DARE (Yu et al. 2024, arXiv:2311.03099): drop entries of each change at random, rescale the rest, add up.

    Every entry stays with probability `density` and is divided by it, so that the expected sum is `linear`'s; then the
    nearest change of this rank.

    Args:
        updates, weights, density, rank: as in `ties`.
        seed: of the choice of entries; torch's own random state is left alone.

    Raises:
        ValueError: as in `ties`.
    """
    check_integer("seed", seed, -(2**63), 2**64 - 1)
    random = torch.Generator().manual_seed(seed)

    def drop(changes: list[Tensor]) -> Tensor:
        kept = [
            torch.rand(change.shape, generator=random, dtype=torch.float32).to(change.device) < density
            for change in changes
        ]
        return reduce(torch.add, [change * keep / density for change, keep in zip(changes, kept, strict=True)])

    return _dense(updates, weights, density, rank, drop)


def _dense(
    updates: Sequence[Updates],
    weights: Sequence[float],
    density: float,
    rank: int | None,
    combine: Callable[[list[Tensor]], Tensor],
) -> dict[str, Update]:
    """Combines whole matrices, layer by layer, and cuts each result to the rank if there is one."""
    _check(updates, weights)
    if not is_number(density) or not 0 < density <= 1:
        raise ValueError(f"expected density in (0, 1], got {short(density)}")
    if rank is not None:
        check_integer("rank", rank)
    found = {}
    for name, parts in _by_layer(updates, weights).items():
        change = combine([weight * part.matrix for weight, part in parts])
        if rank is None:
            identity = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
            found[name] = Update(change, identity.expand(*change.shape[:-2], -1, -1))
            continue
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        found[name] = from_svd(U, S, Vh, rank)
    return found


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The change with all but the largest entries zero."""
    size = change.abs()
    least = size.flatten().kthvalue(size.numel() - max(1, round(density * size.numel())) + 1).values
    return change * (size >= least)


def _compressed(update: Update, rank: int) -> Update:
    return update if update.rank <= rank else from_svd(*factored_svd(update.B, update.A), rank)


def _check(updates: Sequence[Updates], weights: Sequence[float]) -> None:
    check_list("updates", updates)
    for each in updates:
        check_updates(each)
    check_list("weights", weights)
    finite = all(is_number(weight) and math.isfinite(weight) for weight in weights)
    if not len(updates) or len(updates) != len(weights) or not finite:
        raise ValueError(f"expected a finite weight for each adapter, got {len(updates)} and {short(weights)}")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, update in ((name, update) for each in updates for name, update in each.items()):
        if shapes.setdefault(name, update.shape) != update.shape:
            raise ValueError(f"expected adapters of one model, got {shapes[name]} and {update.shape} for {name!r}")


def _by_layer(updates: Sequence[Updates], weights: Sequence[float]) -> dict[str, list[tuple[float, Update]]]:
    names = dict.fromkeys(name for each in updates for name in each)
    pairs = list(zip(weights, updates, strict=True))
    return {name: [(weight, each[name]) for weight, each in pairs if name in each] for name in names}
