"""A model's own modules with less kept for the backward pass: what a LoRA step holds is mostly theirs.

Two kinds of modules compute what they did, to rounding, and keep less of it.

A gated feed-forward block, `down(silu(gate(x)) * up(x))`, is the largest part of what a step of a Llama-like model
keeps. Two of its four wide tensors stay; `silu(gate)` and the product are made again in the backward pass, which costs
two cheap operations and saves half of the block's memory.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) keeps its output, which the next layer keeps anyway:

    y = w * x / rms(x), rms(x) = sqrt(mean(x^2) + eps)        dx = (w * dy - y / w * mean(dy * y)) / rms(x)

The backward pass needs no x: neither the norm nor anything else then holds on to the sum that runs past the layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._random import seeded
from lorakit.layers import shortcuts
from lorakit.layers.bases import frozen_weight, is_watched, linear_shape, weight_of
from lorakit.layers.bnb import repacking_prevented
from lorakit.layers.lora import LoRALinear
from lorakit.speed.patching import patched_forwards

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # a gated block's parts
Forward = Callable[..., Tensor]


@contextmanager
def lean(model: nn.Module) -> Iterator[int]:
    """While it is open, gated feed-forward blocks and RMSNorms compute the same, to rounding, with less memory.

    Yields:
        how many modules it is.
    """
    found = lean_forwards(model)
    with patched_forwards(found):
        yield len(found)


def lean_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """The forwards that keep less, for `patched_forwards`.

    Modules with hooks or a forward of their own stay as they are, and so does whatever does not answer a trial input as
    the formulas above do. A forward that is called otherwise than in its trial, or whose module has changed since, is
    the module's own.
    """
    with repacking_prevented(model):  # the trials are forwards without a gradient
        tried = {m: _lean_block(m) or _lean_norm(m) for m in model.modules() if not is_watched(m)}
    return {module: forward for module, forward in tried.items() if forward}


@torch.no_grad()
def _answers_as(module: nn.Module, formula: Forward, x: Tensor) -> bool:
    """True if a module answers a trial input as the formula does, bit for bit."""
    try:
        with seeded():  # dropout must not notice
            return torch.equal(module(x), formula(x))
    except Exception:  # it is called otherwise, or on something else
        return False


# ---- gated blocks ----


def _lean_block(block: Any) -> Forward | None:
    """The same forward with less kept, None if the module is no gated block whose down-projection is adapted.

    It is taken for one by its parts' names and its answer. Blocks with hooks on their parts, or another activation, are
    not.
    """
    if not all(isinstance(getattr(block, part, None), nn.Module) for part in GATED):
        return None
    act, down, up = block.act_fn, block.down_proj, block.up_proj
    if is_watched(act) or is_watched(down) or type(down) is not LoRALinear or not hasattr(down.base, "weight"):
        return None
    W = weight_of(down.base)
    dtype = W.dtype if W.is_floating_point() else getattr(down.base, "compute_dtype", down.A.dtype)
    if dtype is None:  # bitsandbytes takes the first input's
        return None
    try:
        d_in = up.A.shape[1] if type(up) is LoRALinear else linear_shape(up)[1]
    except ValueError:  # nothing linear
        return None
    x = torch.linspace(-2, 2, 2 * d_in, dtype=torch.float32).view(2, d_in)
    x = torch.cat([x, 100 * x]).to(down.A.device, dtype)  # some blocks clamp what is large
    same = _answers_as(block, lambda x: down(F.silu(block.gate_proj(x)) * up(x)), x)
    return partial(_gated_forward, block, act, down) if same else None


def _gated_forward(block: Any, act: nn.Module, down: LoRALinear, *args: Any, **kwargs: Any) -> Tensor:
    """The block's output, from `_GatedDown` where that may stand for the down-projection."""
    usual = torch.is_grad_enabled() and not down.drops and not shortcuts.may_be_recomputed()
    same = block.act_fn is act and block.down_proj is down and not is_watched(act) and not is_watched(down)
    if not usual or not same or len(args) != 1 or kwargs:
        return type(block).forward(block, *args, **kwargs)
    gate, up = block.gate_proj(*args), block.up_proj(*args)
    if (W := frozen_weight(down.base, gate)) is None:
        return down(act(gate) * up)
    return _GatedDown.apply(gate, up, down.A, down.B, W, down.bias, down.scale).view(*gate.shape[:-1], len(down.B))


class _GatedDown(torch.autograd.Function):
    """`lora_linear(silu(g) * u, ...)` that keeps g and u, and neither silu(g) nor the product."""

    @staticmethod
    def forward(ctx, g, u, A, B, weight, bias, scale):
        W, p = weight() if callable(weight) else weight, F.silu(g).mul_(u).flatten(0, -2)  # (n, d_in)
        a, b = A.to(p.dtype), B.to(p.dtype)
        xa = p @ a.T  # (n, rank)
        y = F.linear(p, W, bias).addmm_(xa, b.T, alpha=scale)  # (n, d_out)
        ctx.save_for_backward(g, u, A, a, b, xa, *([] if callable(weight) else [W]))
        ctx.weight, ctx.scale, ctx.dtype = weight if callable(weight) else None, scale, B.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        g, u, A, a, b, xa, *W = ctx.saved_tensors
        dxa = (dy @ b) * ctx.scale  # (n, rank)
        dB = ((xa * ctx.scale).T @ dy).T.to(ctx.dtype)
        dp = (dy @ (W[0] if W else ctx.weight())).addmm_(dxa, a).view(g.shape)
        silu = F.silu(g)
        dA = (dxa.T @ (silu * u).flatten(0, -2)).to(A.dtype)
        dg = torch.ops.aten.silu_backward(dp * u, g)
        return dg, dp.mul_(silu), dA, dB, None, None, None


# ---- norms ----


def _lean_norm(norm: nn.Module) -> Forward | None:
    """The same forward with less kept, None if the module is no RMSNorm with a frozen float32 weight without zeros."""
    w, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if type(w) is not nn.Parameter or w.ndim != 1 or w.dtype != torch.float32 or w.requires_grad:
        return None
    if not isinstance(eps, float) or len([*norm.parameters()]) > 1 or (w.abs() < 1e-6).any():
        return None
    x = torch.linspace(-2, 3, 2 * len(w), dtype=w.dtype, device=w.device).view(1, 2, len(w))
    same = _answers_as(norm, lambda x: _RMSNorm.apply(x, w, eps), x)
    return partial(_norm_forward, norm, w, eps) if same else None


def _norm_forward(norm: nn.Module, w: Tensor, eps: float, *args: Any, **kwargs: Any) -> Tensor:
    """The norm's output, from `_RMSNorm` where that may stand for it."""
    if len(args) != 1 or kwargs:
        return type(norm).forward(norm, *args, **kwargs)
    x = args[0]
    usual = x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    usual = usual and shortcuts.allowed() and not shortcuts.is_transformed() and not shortcuts.may_be_recomputed()
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
