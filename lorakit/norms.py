"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) that keeps its output, which the next layer keeps anyway.

    y = w * x / rms(x), rms(x) = sqrt(mean(x^2) + eps)        dx = (w * dy - y / w * mean(dy * y)) / rms(x)

The backward pass needs no x: neither the norm nor anything else then holds on to the sum that runs past the layers.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


@torch.no_grad()
def lean_forward(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The same forward with less kept, None if the module is no RMSNorm with a frozen float32 weight without zeros.

    It is taken for one if it answers an input as the formula does, bit for bit.
    """
    w, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if type(w) is not nn.Parameter or w.ndim != 1 or w.dtype != torch.float32 or w.requires_grad:
        return None
    if not isinstance(eps, float) or len([*norm.parameters()]) > 1 or (w.abs() < 1e-6).any():
        return None
    x = torch.linspace(-2, 3, 2 * len(w), device=w.device).view(1, 2, len(w))
    try:
        same = torch.equal(norm(x), _RMSNorm.apply(x, w, eps))
    except (TypeError, ValueError, RuntimeError):  # it is called otherwise, or on something else
        return None
    return partial(_forward, norm, w, eps) if same else None


def _forward(norm: nn.Module, w: Tensor, eps: float, x: Tensor) -> Tensor:
    usual = x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    same = norm.weight is w and not w.requires_grad  # a wrapper may have changed the weight for this pass
    return _RMSNorm.apply(x, w, eps) if usual and same else type(norm).forward(norm, x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # 1 / rms(x)
        y = (x * r).mul_(w)
        ctx.save_for_backward(y, r, w)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        y, r, w = ctx.saved_tensors
        mean = (dy * y).mean(-1, keepdim=True)
        return (dy * w).addcmul_(y / w, mean, value=-1).mul_(r), None, None
