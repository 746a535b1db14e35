"""Which layers of a model get an adapter: all linear ones, or those that a name or an expression chooses."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorakit._suggest import near_names
from lorakit.layers.bases import linear_shape
from lorakit.layers.trial import check_linear

HEAD_NAMES = ("score", "classifier")  # a classifier's output layer, as transformers names it


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear-like layers by name, in the model's order; a layer that is registered twice appears once."""
    return {name: module for name, module in model.named_modules() if name and _why_not(module) is None}


def _why_not(module: nn.Module) -> str | None:
    """Why a module is no linear layer; None if it is one."""
    try:
        check_linear(module, *linear_shape(module))
    except ValueError as error:
        return str(error)
    return None


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that turn hidden states into scores: the output embeddings, or a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is not None:
        return [head]
    return [m for name, m in model.named_children() if name in HEAD_NAMES] if hasattr(model, "config") else []


def is_named(name: str, target: str) -> bool:
    """True if `target` is the layer's full name or the last parts of it: 'q_proj' names 'layers.0.attn.q_proj'."""
    return name == target or name.endswith("." + target)


def is_target(name: str, targets: str | Iterable[str]) -> bool:
    """True if `targets`, names or a regular expression as for `find_targets`, choose a layer of that name."""
    if isinstance(targets, str):
        return re.fullmatch(rf"(.*\.)?({targets})", name) is not None
    return any(is_named(name, target) for target in targets)


def find_targets(model: nn.Module, targets: str | Iterable[str] = "all-linear") -> list[str]:
    """Names of the linear layers that `targets` chooses, in the model's order.

    Args:
        model: any module.
        targets: `"all-linear"` for every linear layer but the output head; a list of names, each a full name or its
            last parts (`"q_proj"`); or a string, a regular expression for the full name or its last parts.

    Raises:
        ValueError: a target chooses nothing (the message lists near names), or is not a valid expression.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {type(model).__name__}")
    if not isinstance(targets, str):
        names: list[Any] = (
            list(targets) if isinstance(targets, Iterable) and not isinstance(targets, Mapping | bytes) else [targets]
        )
        if any(not isinstance(name, str) for name in names):
            raise ValueError(f"expected targets as names or one regular expression, got {targets!r}")
        targets = names
    layers = linear_layers(model)
    if isinstance(targets, str) and targets == "all-linear":
        heads = output_heads(model)
        chosen = [name for name, module in layers.items() if not any(module is head for head in heads)]
        if not chosen:
            raise ValueError(f"expected linear layers in the model, got none in {type(model).__name__}")
        return chosen
    if isinstance(targets, str):
        try:
            matches = {targets: [name for name in layers if is_target(name, targets)]}
        except re.error as error:
            raise ValueError(f"expected a regular expression, got {targets!r}: {error}") from None
    else:
        matches = {target: [name for name in layers if is_named(name, target)] for target in targets}
    if not matches:
        raise ValueError("expected at least one target, got an empty list")
    for target, names in matches.items():
        if not names:
            raise ValueError(_no_match(model, target, layers))
    named = {name for names in matches.values() for name in names}
    return [name for name in layers if name in named]


def _no_match(model: nn.Module, target: str, layers: Iterable[str]) -> str:
    other = next((m for name, m in model.named_modules() if name and is_named(name, target)), None)
    if other is not None:
        why = f": {_why_not(other)}" if hasattr(other, "out_features") else ""
        return f"expected targets that are linear layers, got {target!r}, which is a {type(other).__name__}{why}"
    known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers)
    return f"expected targets that match a linear layer, {near_names(target, known)}"
