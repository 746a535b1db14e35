"""bitsandbytes' 4-bit layers on a CPU with AVX512-BF16: how to keep their weights as they are.

There a layer's first forward in eval mode, without a gradient, rearranges its codes in place for a faster kernel and
rounds absmax to bfloat16. Whoever reads the codes in their usual order from then on, to dequantise or to merge, gets
other weights. And the faster kernel has no backward pass: a later training gets no gradient through the layer, while
its loss looks as it did before. (Seen in bitsandbytes 0.50: `bitsandbytes.nn.Linear4bit.forward`.)
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def prevent_repacking(model: nn.Module | None = None) -> bool:
    """Makes bitsandbytes leave the codes of 4-bit layers in their order: of all made later, and of a model's.

    Call it before a model is loaded, or give it the model before it has answered anything. Answers then take the usual
    kernel, which is slower for a few tokens. LoRALinear does it for the layer that it wraps. `allow_repacking` takes it
    back, and `repacking_prevented` does so after a block.

    Args:
        model: anything, with 4-bit layers or without.

    Returns:
        True if this machine would have repacked them.

    Raises:
        ValueError: a layer of the model is repacked already: its absmax is rounded, so it has to be loaded again.
    """
    if not isinstance(model, nn.Module | None):
        raise ValueError(f"expected a model, got {type(model).__name__}")
    try:
        import bitsandbytes.nn.modules as library
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return False
    library.has_avx512bf16 = lambda: False
    for name, module in model.named_modules() if model is not None else ():
        if is_linear4bit(module):
            keep_order(module, name)
    return bool(has_avx512bf16())


def allow_repacking() -> None:
    """Layers made from now on are bitsandbytes' own again; those that keep their order go on keeping it."""
    if "bitsandbytes" in sys.modules:
        import bitsandbytes.nn.modules as library
        from bitsandbytes.functional import has_avx512bf16

        library.has_avx512bf16 = has_avx512bf16


@contextmanager
def repacking_prevented(model: nn.Module | None = None) -> Iterator[None]:
    """While it is open, neither new 4-bit layers nor a model's are repacked; then what held before holds again.

    Layers that are made inside keep their order for good. Adapters go on the model before or after, not inside.
    """
    if "bitsandbytes" not in sys.modules:
        yield
        return
    import bitsandbytes.nn.modules as library

    before = library.has_avx512bf16
    layers = [module for module in model.modules() if is_linear4bit(module)] if model is not None else []
    supports = [getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers]
    try:
        library.has_avx512bf16 = lambda: False
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        yield
    finally:
        library.has_avx512bf16 = before
        for layer, support in zip(layers, supports, strict=True):
            layer.support_avx512bf16_for_cpu = support


def keep_order(layer: Any, name: str = "") -> None:
    """The same for one 4-bit layer."""
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"expected 4-bit codes in their usual order, got repacked ones in layer {name!r}: bitsandbytes did it in "
            "an eval-mode forward; load the model again and call prevent_repacking() first"
        )
    layer.support_avx512bf16_for_cpu = False


def is_linear4bit(module: nn.Module) -> TypeGuard[Any]:
    """True for bitsandbytes' `Linear4bit` and its subclasses, with a weight that is quantised."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit) and module.weight.quant_state is not None


def dequantized(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer, (d_out, d_in), in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
