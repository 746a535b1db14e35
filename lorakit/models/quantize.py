"""A model's linear layers in four bits, and back."""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorakit._random import seeded
from lorakit._suggest import near_names
from lorakit.layers.bases import FLOATS, dense_weight, is_plain, storage_of
from lorakit.layers.bnb import is_linear4bit, keep_order
from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.models.beside import BESIDE
from lorakit.models.coverage import by_kind, unusual
from lorakit.models.inject import adapters, check_module, check_plain, replace, shared_weights
from lorakit.models.targets import find_targets, named_modules, plain_modules


def quantize_model(model: nn.Module, targets: str | Iterable[str] = "all-linear", **settings) -> nn.Module:
    """Replaces linear layers by NF4Linear, in place, one by one: never more than one weight is there twice.

    Adapters come afterwards: `lorakit.inject(quantize_model(model), rank, alpha)` is QLoRA. What is not replaced keeps
    its dtype: embeddings, norms, the output head; and experts that are parameters and no layers, which are most of a
    mixture: a line that is printed says what share that is. In a model that has adapters already, the bases under them
    are replaced: for PiSSA, whose residual suffers less from rounding than the weight. What trains beside them, modules
    and rows of tokens, stays as it is.

    Args:
        model: plain, or with lorakit's adapters and all of their bases to be quantised; on any device.
        targets: which layers, as in `find_targets`. Layers that are in four bits already stay as they are.
        settings: for NF4Linear: `block_size`, `double_quant`, `codebook`.

    Returns:
        the same object.

    Raises:
        ValueError: the model has adapters and targets are named, a target matches nothing or shares its weight, or a
            setting is out of range.
    """
    shared, wrapped = shared_weights(model), adapters(model)
    layers: dict[str, Any]
    if wrapped and targets == "all-linear":
        layers = {name: each.base for name, each in wrapped.items() if not isinstance(each, (*BESIDE, LoRAEmbedding))}
    else:
        check_plain(model)
        modules = dict(named_modules(model))
        layers = {name: modules[name] for name in find_targets(model, targets)}
    layers = {name: each for name, each in layers.items() if not (isinstance(each, NF4Linear) or is_linear4bit(each))}
    for name, each in layers.items():
        if not is_plain(each):
            raise ValueError(f"expected nn.Linear or Conv1D layers, got {storage_of(each)} at {name}")
        if id(each.weight) in shared:
            raise ValueError(
                f"expected weights of their own, but that of {name} is shared: leave it out of the targets"
            )
        if each.weight.is_meta or not each.weight.numel():
            raise ValueError(f"expected weights with values, got none in {name}")
        if not each.weight.float().isfinite().all():
            raise ValueError(f"expected finite weights, in float32's range, got NaN or infinity in {name}")
    if layers:
        known = [*inspect.signature(NF4Linear).parameters][1:]
        for name in settings:
            if name not in known:
                raise ValueError(f"expected a setting of NF4Linear, {near_names(name, known)}")
        with seeded():
            trial = nn.Linear(2, 2, dtype=torch.float32)
        NF4Linear(trial, **settings)  # settings out of range are refused before anything is replaced
    for each in layers.values():
        replace(model, {each: NF4Linear(each, **settings)})
    if targets == "all-linear":
        _tell(model)
    return model


def _tell(model: nn.Module) -> None:
    """Says what share of a model is in no four bits, if that is more than one would expect."""
    four = {name: m for name, m in plain_modules(model) if isinstance(m, NF4Linear) or is_linear4bit(m)}
    left = by_kind(model, lambda name, key: name in four and key != "bias")
    if kinds := unusual(left):
        words = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
        rest = sum(sum(of.values()) for of in left.values())
        total = rest + sum(layer.out_features * layer.in_features for layer in four.values())
        share = 100 * rest / total
        print(
            f"lorakit: not in four bits: {words}; in all {rest:,} of {total:,} parameters ({share:.0f} %)",
            file=sys.stderr,
        )


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every 4-bit layer, lorakit's or bitsandbytes', by a plain one with the weight that its codes mean.

    With adapters on them, `merge` works afterwards: the update then goes into weights that can hold it.

    Args:
        model: with 4-bit layers, plain or adapted.
        dtype: of the weights; that of the original if None.

    Returns:
        the same object.

    Raises:
        ValueError: the model has no 4-bit layer, or bitsandbytes has repacked one.
    """
    check_module(model)
    if dtype not in (None, *FLOATS):
        raise ValueError(f"expected a floating-point dtype of 16 bits or more, got {dtype!r}")
    found = [m for m in model.modules() if isinstance(m, NF4Linear) or is_linear4bit(m)]
    if not found:
        raise ValueError("expected a model with 4-bit layers, got none")
    for each in found:
        if is_linear4bit(each):
            keep_order(each)
    for each in found:
        replace(model, {each: _plain(each, dtype)})
    return model


def _plain(layer: Any, dtype: torch.dtype | None) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D` if that is what was quantised: the model must save what it would have saved."""
    dtype = dtype or (layer.dtype if isinstance(layer, NF4Linear) else layer.weight.quant_state.dtype)
    W = dense_weight(layer, dtype)
    source = getattr(layer, "source_cls", nn.Linear)
    if source.__name__ == "Conv1D":
        plain, W = source(layer.out_features, layer.in_features), W.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(W, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return plain.train(layer.training)
