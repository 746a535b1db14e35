"""A weight `W + L R` that is kept as a sum: products with it cost what LoRA's do, and nothing of W's size is made.

It stands in for a parameter in code that is not ours, such as a mixture of experts'. Such code picks the matrix of one
expert out of the stack, or transposes, and multiplies; that is done here factor by factor. Whatever else it does, it
gets the sum itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lorakit.layers.read_weight import ReadWeight

GROUPED_RANK = 8  # grouped products want rows of whole 16 bytes


class LowRankSum(ReadWeight):
    """`W + L R`: W frozen, L (..., m, r) and R (..., r, n) in any floating dtype; rounded to W's when it is made."""

    L: Tensor
    R: Tensor

    @classmethod
    def make(
        cls, W: Float[Tensor, "*stack m n"], L: Float[Tensor, "*stack m r"], R: Float[Tensor, "*stack r n"]
    ) -> "LowRankSum":
        """The sum, unmade."""
        made: Any = cls.of(W, lambda: (W.to(L.dtype) + L @ R).to(W.dtype))
        made.L, made.R = L, R
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = RULES.get(func.__self__.__name__ if func.__name__ == "__get__" else func.__name__)
        result = NotImplemented if rule is None else rule(func, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs) if result is NotImplemented else result


def _item(_: Any, weight: LowRankSum, index: Any) -> Any:
    """One expert, or one for each of several tokens."""
    plain = isinstance(index, int | slice) or (
        isinstance(index, Tensor) and index.ndim < 2 and not index.is_floating_point()
    )
    if weight.ndim != 3 or not plain or (isinstance(index, Tensor) and index.dtype == torch.bool):
        return NotImplemented
    return LowRankSum.make(weight.stored[index], weight.L[index], weight.R[index])


def _turned(_: Any, weight: LowRankSum, *dims: int) -> Any:
    """The two last dimensions in the other order; without `dims` those of a matrix."""
    if {dim % weight.ndim for dim in dims or (0, 1)} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    return LowRankSum.make(weight.stored.mT, weight.R.mT, weight.L.mT)


def _linear(_: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LowRankSum) or isinstance(x, LowRankSum) or isinstance(bias, LowRankSum):
        return NotImplemented
    L, R = weight.L.to(x.dtype), weight.R.to(x.dtype)
    return F.linear(x, weight.stored, bias) + F.linear(F.linear(x, R), L)


def _product(_: Any, x: Any, y: Any, **more: Any) -> Any:
    if more or (isinstance(x, LowRankSum) and isinstance(y, LowRankSum)):
        return NotImplemented
    if isinstance(x, LowRankSum):
        return x.stored @ y + x.L.to(y.dtype) @ (x.R.to(y.dtype) @ y)
    return x @ y.stored + (x @ y.L.to(x.dtype)) @ y.R.to(x.dtype)


def _grouped(func: Any, x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Groups of rows, each with its expert's matrix: `x[offs[e-1]:offs[e]] @ weight[e]`."""
    if not isinstance(weight, LowRankSum) or bias is not None or out_dtype is not None:
        return NotImplemented
    L, R, spare = weight.L.to(x.dtype), weight.R.to(x.dtype), -weight.L.shape[-1] % GROUPED_RANK
    if spare:
        L, R = F.pad(L, (0, spare)), F.pad(R, (0, 0, 0, spare))
    return func(x, weight.stored, offs=offs) + func(func(x, L, offs=offs), R, offs=offs)


RULES: dict[str, Callable[..., Any]] = {
    "__getitem__": _item,
    **dict.fromkeys(("transpose", "swapaxes", "T", "t"), _turned),
    "mT": lambda func, weight: _turned(func, weight, -2, -1),
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _product),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}
