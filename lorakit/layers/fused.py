"""LoRA's step as one autograd function: the plain formula's numbers, with fewer copies and less kept for the backward.

Autograd, given the formula `y = x W' + b + s (x A') B'`, makes three tensors of y's size and as many of its gradient.
Here the products add into one, and of the forward pass only x and x A' stay. With dy the gradient of y:

    dxa = s dy B        dA = dxa' x        dB = s dy' (x A')        dx = dy W + dxa A

W has no gradient: it is frozen, and that is the third of the arithmetic that LoRA saves.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lorakit.layers.bases import Weight


def lora_linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Weight,
    bias: Float[Tensor, " d_out"] | None,
    A: Float[Tensor, "rank d_in"],
    B: Float[Tensor, "d_out rank"],
    scale: float,
) -> Float[Tensor, "*batch d_out"]:
    """Computes `x W' + b + s (x A') B'` for a frozen W and b, with gradients for x, A and B.

    A and B are rounded to x's dtype for the products, which sum in float32 and round once; their gradients come back in
    their own dtype. Differentiable twice.

    Args:
        x: the input, in W's dtype.
        weight: W; or a function that returns it, for a base that is stored otherwise (quantised): it is called again in
            the backward pass, so that nothing of W's size is kept.
        bias: b, None for none.
        A: of any floating dtype.
        B: of any floating dtype.
        scale: s.

    Returns:
        y in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])  # (n, d_in)
    if torch.is_grad_enabled():
        y = _LoRALinear.apply(flat, A, B, weight, bias, scale)
    else:
        y = _forward(flat, A, B, weight, bias, scale)[0]
    return y.view(*x.shape[:-1], len(B))  # here: what an autograd function returns as a view can't change in place


def frozen_linear(
    x: Float[Tensor, "*batch d_in"], weight: Callable[[], Tensor], bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "*batch d_out"]:
    """Computes `x W' + b` for a frozen W that is made whenever it is needed, with a gradient for x alone."""
    return _FrozenLinear.apply(x, weight, bias)


def _forward(x, A, B, weight, bias, scale):
    """y, and what the backward pass needs: A and B in x's dtype, x A', and W."""
    W, a, b = weight() if callable(weight) else weight, A.to(x.dtype), B.to(x.dtype)
    xa = x @ a.T  # (n, rank)
    return F.linear(x, W, bias).addmm_(xa, b.T, alpha=scale), a, b, xa, W  # (n, d_out)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.weight(), None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, weight, bias, scale):
        y, a, b, xa, W = _forward(x, A, B, weight, bias, scale)
        ctx.save_for_backward(x, A, B, a, b, xa, *([] if callable(weight) else [W]))
        ctx.weight, ctx.scale = weight if callable(weight) else None, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B, a, b, xa, *W = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a second derivative is wanted: what was computed must depend on x, A and B
            a, b = A.to(x.dtype), B.to(x.dtype)
            xa = x @ a.T
        dxa = (dy @ b) * ctx.scale  # (n, rank)
        dx = dA = dB = None
        if needs_A:
            dA = (dxa.T @ x).to(A.dtype)
        if needs_B:
            dB = ((xa * ctx.scale).T @ dy).T.to(B.dtype)  # faster than dy.T @ ...
        if needs_x:
            dx = (dy @ (W[0] if W else ctx.weight())).addmm_(dxa, a)
        return dx, dA, dB, None, None, None
