"""What may be wrapped: linear layers of any kind, their shape, and how their frozen weight is read."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.layers import shortcuts
from lorakit.layers.bnb import dequantized, is_linear4bit

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes in which torch computes
Weight = Tensor | Callable[[], Tensor]  # of shape (d_out, d_in), or what makes it whenever it is needed


def is_conv1d(module: nn.Module) -> TypeGuard[Any]:
    """True for GPT-2's `Conv1D`, a linear layer that stores its weight as (d_in, d_out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def stores_transposed(layer: nn.Module) -> bool:
    """True for a layer that stores its weight as (d_in, d_out): `Conv1D`, and an embedding, seen as linear."""
    return is_conv1d(layer) or isinstance(layer, nn.Embedding)


def is_plain(module: nn.Module) -> bool:
    """True for an `nn.Linear` or a `Conv1D` that computes with its weight as it is, in a dtype that one computes in.

    A subclass may do something else, and a weight that is derived from others is no parameter.
    """
    usual = type(module) is nn.Linear or is_conv1d(module)
    weight = module._parameters.get("weight") if usual else None
    return weight is not None and weight.dtype in FLOATS


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
    return (W.T if is_conv1d(base) else W) if W.dtype == x.dtype and W.dtype in FLOATS else None


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
    if not has_float_weight(base) or weight_of(base).ndim != 2:
        raise ValueError(f"expected a weight that can be read, got {storage_of(base)}")
    W = weight_of(base).detach().to(dtype)
    return W.T if stores_transposed(base) else W


def has_float_weight(layer: nn.Module) -> bool:
    """True if the layer's weight is there as plain numbers, not as codes such as int8's or float8's."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype in FLOATS


def check_float_weight(layer: nn.Module) -> None:
    """Refuses a layer whose weight is codes, for what adds to the weight.

    Raises:
        ValueError: says what it is, and the way out.
    """
    if not has_float_weight(layer):
        raise ValueError(
            f"expected a floating-point base, got {storage_of(layer)}: lorakit.models.quantize.dequantize_model first"
        )


def storage_of(layer: nn.Module) -> str:
    """Class and weight's dtype in words, for errors."""
    weight = getattr(layer, "weight", None)
    return f"{type(layer).__name__} ({weight.dtype if isinstance(weight, Tensor) else 'without a weight tensor'})"


def factors_like(base: nn.Module) -> tuple[torch.dtype, torch.device]:
    """What A and B over a layer should be: float32, or float64 over float64; where the layer is.

    Raises:
        ValueError: torch cannot compute with the layer's numbers, or nothing shows where it is.
    """
    like = next(chain(base.parameters(), base.buffers()), None)
    if like is None:  # torch.ao's quantised layers, which pass no gradient on either
        raise ValueError(f"expected a layer with parameters or buffers, got {storage_of(base)}")
    if (type(base) is nn.Linear or is_conv1d(base)) and not has_float_weight(base):
        raise ValueError(f"expected a weight of {', '.join(map(str, FLOATS))}, got {storage_of(base)}")
    if any(map(nn.parameter.is_lazy, base.parameters())):
        raise ValueError(f"expected a layer whose shape is known, got {type(base).__name__}: let it see an input first")
    return torch.promote_types(like.dtype, torch.float32) if like.dtype in FLOATS else torch.float32, like.device


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
