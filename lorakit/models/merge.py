"""Adapters come out of a model again: added to the weights for good or for a while, or left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorakit.layers.adapter import own_parameters
from lorakit.layers.bases import has_float_weight, is_conv1d, is_plain, storage_of, weight_of
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import LoRALinear
from lorakit.layers.tied import Tied
from lorakit.layers.trained import TrainedModule
from lorakit.models.inject import adapters, named, places, shared_weights


def merge(model: nn.Module) -> nn.Module:
    """Adds every adapter's update to the weight it wraps and returns the plain model, which is the same object.

    Every floating-point parameter requires a gradient afterwards, as after loading a model. Layers that shared a weight
    share it still if they have learned one change, as tied token rows do; else each has its own from here on, such as
    an output layer that was adapted and an input embedding that was not.

    Raises:
        ValueError: the model carries no adapter, or a base is quantised. The model is then as it was.
    """
    found = _adapted(model)
    parted = _parts_ways(model, found.values())
    plain = _unwrap(model, lambda layer: layer.merged())
    for layer in plain:
        if isinstance(layer, Tied):
            plain[layer].weight = plain[layer.source].weight
    if parted:
        _untie(model)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Takes the adapters out and returns the plain model, which is the same object with the base's weights.

    Raises:
        ValueError: a PiSSALinear has had its residual quantised. The model is then as it was.
    """
    _unwrap(model, lambda layer: layer.removed() if hasattr(layer, "removed") else layer.base)
    return model


@contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """While it is open, the model is plain, with `W + s B A` in the place of W; afterwards it is adapted as before.

        with lorakit.folded(model):
            answers = lorakit.greedy(model, tokenizer, prompts)

    Answers then cost what the plain model's cost. Plain LoRA on float32 is added to the weights and subtracted again:
    they come back to rounding, about 6e-8 of their norm. Narrower ones would not, nor another layer's update, nor a
    weight that another layer has as well: there a `merged()` copy takes the layer's place, and the weights stay, bit
    for bit. To merge for good, use `merge`.

    Raises:
        ValueError: no adapters, or a base whose weight is quantised or not there. The model is then as it was.
    """
    found = _adapted(model)
    shared = shared_weights(model)
    for name, layer in found.items():
        if hasattr(layer.base, "out_features") and not has_float_weight(layer.base):
            raise ValueError(f"expected an adapter on a floating-point weight, got {storage_of(layer.base)} at {name}")
        if not all(p.isfinite().all() for p in own_parameters(layer).values() if p.is_floating_point()):
            raise ValueError(f"expected finite adapters, got NaN or infinity in that of {name}")
    undone = [layer for layer in found.values() if _can_be_undone(layer) and id(layer.base.weight) not in shared]
    plain: dict[Any, nn.Module] = {layer: layer.base for layer in undone}
    for name, layer in found.items():
        if layer not in plain:
            with named(name):
                plain[layer] = layer.merged()
    held = places(model, plain)
    added: list[LoRALinear] = []
    try:
        for layer in undone:
            _add(layer, added)
        for parent, child, layer in held:
            setattr(parent, child, plain[layer])
        yield model
    finally:
        for parent, child, layer in held:
            setattr(parent, child, layer)
        for layer in added:
            _sum(layer, -1)


def _adapted(model: nn.Module) -> dict[str, Any]:
    found = adapters(model)
    if not found:
        raise ValueError("expected a model with adapters, got a plain one")
    return found


def adapted_weights(layer: Any) -> list[Tensor]:
    """The base's parameters that an adapter changes."""
    if isinstance(layer, LoRAExperts):
        return [layer.base.get_parameter(name) for name in layer.settings]
    if isinstance(layer, TrainedModule):
        return _held(layer.base)
    return [weight for weight in [getattr(layer.base, "weight", None)] if weight is not None]


def _can_be_undone(layer: Any) -> TypeGuard[LoRALinear]:
    """True if the update is `s B A`, in the weight's own dtype and wide enough to be subtracted again."""
    own = getattr(type(layer), "delta_weight", None) is LoRALinear.delta_weight
    return own and is_plain(layer.base) and layer.base.weight.dtype == layer.A.dtype


def _add(layer: LoRALinear, added: list[LoRALinear]) -> None:
    """Adds the update to the base's weight, and the layer to the list: both, or neither if it fails."""
    added.append(layer)  # first: Python delivers an interrupt after the sum, not within it
    try:
        _sum(layer, 1)
    except Exception:
        added.pop()
        raise


@torch.no_grad()
def _sum(layer: LoRALinear, sign: int) -> None:
    weight = weight_of(layer.base).detach()
    W = weight.T if is_conv1d(layer.base) else weight  # (d_out, d_in)
    W.addmm_(layer.B, layer.A, alpha=sign * layer.scale)


def _parts_ways(model: nn.Module, layers: Iterable[Any]) -> bool:
    """True if layers that share a weight have learned different changes, or not all of them one."""
    changes: Counter[tuple[int, int]] = Counter()
    for layer in set(layers):
        one = id(layer.source if isinstance(layer, Tied) else layer)
        changes.update((id(p), one) for p in adapted_weights(layer))
    holders = Counter(map(id, _held(model)))
    return any(holders[weight] > alike for (weight, _), alike in changes.items())


def _held(module: nn.Module) -> list[Tensor]:
    """Every parameter as often as a part of the module has it."""
    return [p for part in module.modules() for p in part.parameters(recurse=False)]


def _unwrap(model: nn.Module, plain_of: Callable[[Any], nn.Module]) -> dict[Any, Any]:
    """Puts a plain layer in the place of each adapter; returns which in whose."""
    for name, layer in adapters(model).items():
        with named(name):
            plain_of(layer)  # whoever refuses does it now, when nothing has changed
    plain: dict[nn.Module, nn.Module] = {}
    for parent, child, layer in places(model, set(adapters(model).values())):
        if layer not in plain:
            plain[layer] = plain_of(layer)
        setattr(parent, child, plain[layer])  # one by one: never more than one layer in memory twice
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def _untie(model: nn.Module) -> None:
    """Tells a transformers model that its output layer no longer is its input embedding, so that saving keeps both."""
    for config in [getattr(model, "config", None), getattr(getattr(model, "config", None), "text_config", None)]:
        if config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
