"""What may be wrapped: linear layers of any kind, their shape, and how their frozen weight is read."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.layers import shortcuts
from lorakit.layers.bnb import dequantized, is_linear4bit

Weight = Tensor | Callable[[], Tensor]  # of shape (d_out, d_in), or what makes it whenever it is needed


def is_conv1d(module: nn.Module) -> TypeGuard[Any]:
    """True for GPT-2's `Conv1D`, a linear layer that stores its weight as (d_in, d_out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def is_plain(module: nn.Module) -> bool:
    """True for an `nn.Linear` or a `Conv1D` that computes with its weight as it is, in a dtype that one computes in.

    A subclass may do something else, and a weight that is derived from others is no parameter.
    """
    usual = type(module) is nn.Linear or is_conv1d(module)
    weight = module._parameters.get("weight") if usual else None
    return weight is not None and weight.is_floating_point() and weight.element_size() > 1


def is_known(module: nn.Module) -> bool:
    """True for a layer that is linear by its class, and whose weight `dense_weight` reads rightly."""
    return is_plain(module) or is_linear4bit(module) or hasattr(module, "frozen_weight")


def is_watched(module: nn.Module) -> bool:
    """True if somebody has hooks on the module, or has replaced its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight as the layer stores it: a `Conv1D`'s transposed, a quantised one's codes."""
    return cast(Tensor, layer.weight)


def frozen_weight(base: nn.Module, x: Tensor) -> Weight | None:
    """The weight with which `lora_linear` may stand for calling `base(x)`, None where only the call will do.

    A layer with hooks, a replaced `forward`, weights that train or are of a tensor subclass, or an input in another
    dtype, as under autocast, must be called; and every layer where shortcuts are switched off. A class that stores its
    weight otherwise can offer `frozen_weight(dtype)`, which returns W (d_out, d_in) in that dtype, as NF4Linear does.
    bitsandbytes' 4-bit layers are known too.
    """
    if not shortcuts.allowed() or is_watched(base) or torch.is_autocast_enabled(x.device.type):
        return None
    if shortcuts.is_transformed() or any(p.requires_grad for p in base.parameters()):
        return None
    bias = getattr(base, "bias", None)
    own = getattr(base, "frozen_weight", None)
    if (own is not None or is_linear4bit(base)) and bias is not None and bias.dtype != x.dtype:
        return None
    if own is not None:
        return partial(own, x.dtype)
    if is_linear4bit(base):
        return partial(dequantized, base, x.dtype) if base.compute_dtype in (None, x.dtype) else None
    if not is_plain(base) or type(base.weight) is not nn.Parameter:
        return None
    W = weight_of(base).detach()
    return (W.T if is_conv1d(base) else W) if W.dtype == x.dtype else None


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear-like layer, whichever way it is stored, in `dtype`.

    Raises:
        ValueError: it is quantised in a way that is not known here.
    """
    own = getattr(base, "frozen_weight", None)
    if own is not None:
        return own(dtype)
    if is_linear4bit(base):
        return dequantized(base, dtype)
    W = getattr(base, "weight", None)
    if not isinstance(W, Tensor) or not W.is_floating_point() or W.ndim != 2:
        what = W.dtype if isinstance(W, Tensor) else "no tensor"
        raise ValueError(f"expected a weight that can be read, got {type(base).__name__} with {what}")
    W = W.detach().to(dtype)
    return W.T if is_conv1d(base) else W


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """The (d_out, d_in) of a linear-like module: `nn.Linear`, its quantised relatives, or GPT-2's `Conv1D`.

    Raises:
        ValueError: the module is not linear-like, or other code reads its weight past its `forward`.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError("expected a linear layer that is called, got nn.MultiheadAttention's out_proj, which is not")
    if is_conv1d(module):
        d_in, d_out = module.weight.shape
        return d_out, d_in
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if d_out is not None and d_in is not None:
        return d_out, d_in
    raise ValueError(f"expected a linear-like module (in_features, out_features), got {type(module).__name__}")
