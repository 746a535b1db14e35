"""Adapters added to the weights for a while, in place: answers then cost what the plain model's cost."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.fused import is_conv1d
from lorakit.inject import adapters, replace, shared_weights
from lorakit.lora import LoRALinear


@contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """While it is open, the model is plain, with `W + s B A` in the place of W; afterwards it is adapted as before.

        with lorakit.folded(model):
            answers = lorakit.greedy(model, tokenizer, prompts)

    float32 weights are added to and subtracted from: they come back to rounding, about 6e-8 of their norm. Narrower
    ones would not, nor DoRA's; of those a copy is kept and put back, bit for bit. To merge for good, use `merge`.

    Raises:
        ValueError: no adapters, one that is no LoRALinear, a quantised base, or a weight that two layers share.
    """
    found = adapters(model)
    if not found:
        raise ValueError("expected a model with adapters, got a plain one")
    shared = shared_weights(model)
    for name, layer in found.items():
        weight = getattr(layer.base, "weight", None)
        if not isinstance(layer, LoRALinear) or weight is None or not weight.is_floating_point():
            raise ValueError(f"expected a LoRALinear on a floating-point weight, got {type(layer).__name__} at {name}")
        if id(weight) in shared:
            raise ValueError(f"expected weights of their own, but that of {name} is shared: use merge()")
    before = {layer: _add(layer) for layer in found.values()}
    replace(model, {layer: layer.base for layer in found.values()})
    try:
        yield model
    finally:
        replace(model, {layer.base: layer for layer in found.values()})
        for layer, weight in before.items():
            _take_away(layer, weight)


@torch.no_grad()
def _add(layer: LoRALinear) -> Tensor | None:
    """Adds the update to the base's weight; returns a copy of the weight if it could not be had back otherwise."""
    W = _weight(layer)
    if W.dtype != layer.A.dtype or type(layer).delta_weight is not LoRALinear.delta_weight:
        kept = W.clone()
        W.copy_(W.to(layer.A.dtype) + layer.delta_weight())
        return kept
    W.addmm_(layer.B, layer.A, alpha=layer.scale)
    return None


@torch.no_grad()
def _take_away(layer: LoRALinear, kept: Tensor | None) -> None:
    W = _weight(layer)
    if kept is None:
        W.addmm_(layer.B, layer.A, alpha=-layer.scale)
    else:
        W.copy_(kept)


def _weight(layer: LoRALinear) -> Tensor:
    """The base's weight as (d_out, d_in), whichever way it is stored."""
    weight = layer.base.weight.detach()
    return weight.T if is_conv1d(layer.base) else weight
