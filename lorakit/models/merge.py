"""Adapters added to the weights for a while, in place: answers then cost what the plain model's cost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.layers.bases import is_conv1d
from lorakit.layers.lora import LoRALinear
from lorakit.models.inject import adapters, places, replace, shared_weights


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


def merge(model: nn.Module) -> nn.Module:
    """Adds every adapter's update to the weight it wraps and returns the plain model, which is the same object.

    Every floating-point parameter requires a gradient afterwards, as after loading a model. An output layer that shared
    its weight with the input embedding and was adapted is its own weight from here on.

    Raises:
        ValueError: the model carries no adapter, or a base is quantised.
    """
    found = adapters(model)
    if not found:
        raise ValueError("expected a model with adapters, got a plain one")
    if shared_weights(model) & {id(getattr(layer.base, "weight", None)) for layer in found.values()}:
        _untie(model)
    return _unwrap(model, lambda layer: layer.merged())


def remove(model: nn.Module) -> nn.Module:
    """Takes the adapters out and returns the plain model, which is the same object with the base's weights."""
    return _unwrap(model, lambda layer: layer.removed() if isinstance(layer, LoRALinear) else layer.base)


def _unwrap(model: nn.Module, plain_of: Callable[[nn.Module], nn.Module]) -> nn.Module:
    plain: dict[nn.Module, nn.Module] = {}
    for parent, child, layer in places(model, set(adapters(model).values())):
        if layer not in plain:
            plain[layer] = plain_of(layer)
        setattr(parent, child, plain[layer])  # one by one: never more than one layer in memory twice
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


def _untie(model: nn.Module) -> None:
    """Tells a transformers model that its output layer no longer is its input embedding, so that saving keeps both."""
    for config in [getattr(model, "config", None), getattr(getattr(model, "config", None), "text_config", None)]:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
