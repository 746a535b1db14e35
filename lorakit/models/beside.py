"""What a configuration makes of a model: adapters, and what trains beside them, whole modules and rows of tokens."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorakit._suggest import near_names
from lorakit.layers.config import LoRAConfig
from lorakit.layers.tied import Tied
from lorakit.layers.token_rows import ROWS, TrainedRows
from lorakit.layers.trained import TrainedModule
from lorakit.models.peft_files import AdapterError, check_shape
from lorakit.models.targets import HEAD_NAMES, chosen_layers, named_modules, unwrapped

Make = Callable[[nn.Module], nn.Module]
REPEATED = ("modules_to_save.", ROWS)  # what PEFT's files have a second time where the vocabulary is resized
BESIDE = (TrainedModule, TrainedRows, Tied)  # what is no LoRA


def plan(
    model: nn.Module, config: LoRAConfig, chosen: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[dict[str, Make], dict[str, Make]]:
    """Name of each module that is to be replaced -> what makes its adapter: those of LoRA, and those beside it.

    The makers are to be called in this order: a layer that follows another comes after it.

    Args:
        model: plain.
        config: what is wanted.
        chosen: what `chosen_layers` says of both, if it is known.

    Raises:
        ValueError: a name matches nothing, a module is meant in two ways, or tied layers in ways that exclude each
            other.
    """
    whole = whole_modules(model, config.modules_to_save)
    lora: dict[str, Make] = {
        name: partial(config.make, name, parameters=own)
        for name, own in (chosen_layers(model, config) if chosen is None else chosen).items()
        if not any(is_inside(name, outer) for outer in whole)
    }
    if not lora and whole:
        raise ValueError(f"expected targets beside modules_to_save, got no layer outside of {', '.join(whole)}")
    rows = _token_rows(model, config.trainable_token_indices)
    for name in rows:
        if name in lora or any(is_inside(name, outer) for outer in whole):
            raise ValueError(f"expected one way to train {name!r}, got trainable_token_indices and another")
    beside: dict[str, Make] = dict.fromkeys(whole, TrainedModule)
    beside |= {name: partial(TrainedRows, ids=ids) for name, ids in rows.items()}
    family = tied_family(model)
    if len(family) > 1 and _is_shared(family, lora, beside, config):
        _follow(family[0], family[1:], lora, beside, partial(config.make, family[0]))
    return lora, beside


def whole_modules(model: nn.Module, words: Iterable[str]) -> list[str]:
    """Names of the modules that `modules_to_save` means: those that end with one of the words, as PEFT reads it.

    A module inside of another that is meant is a part of it. Of a classifier's usual names, only one need be there.

    Raises:
        ValueError: a word matches nothing.
    """
    names = [name for name, _ in named_modules(model) if name]
    found = {word: [name for name in names if name.endswith(word)] for word in words}
    for word, matching in found.items():
        if not matching and not (word in HEAD_NAMES and any(found.get(other) for other in HEAD_NAMES)):
            known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
            raise ValueError(f"expected modules_to_save that match a module, {near_names(word, known)}")
    meant = {name for matching in found.values() for name in matching}
    return [name for name in names if name in meant and not any(is_inside(name, o) for o in meant - {name})]


def beside_settings(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says of a model's adapters that are no LoRA, by whole names."""
    rows = {name: list(layer.ids) for name, layer in layers.items() if isinstance(layer, TrainedRows)}
    whole = [name for name, layer in layers.items() if isinstance(layer, TrainedModule)]
    source = input_embedding(model)
    inputs_alone = len(rows) == 1 and isinstance(source, TrainedRows)
    settings: dict[str, Any] = {}
    for layer in layers.values():
        settings |= layer.peft_settings() if isinstance(layer, Tied) else {}
    return settings | {
        "modules_to_save": whole or None,
        "trainable_token_indices": next(iter(rows.values())) if inputs_alone else rows or None,
    }


def check_beside(model: nn.Module, config: LoRAConfig, layers: Mapping[str, Any]) -> None:
    """Refuses settings that are not those of a model's adapters, as far as a file's names of tensors do not say it.

    Raises:
        ValueError: says what differs.
    """
    kinds: dict[str, Any] = {"modules_to_save": TrainedModule, "trainable_token_indices": TrainedRows}
    for word, kind in kinds.items():
        theirs, ours = getattr(config, word), [name for name, layer in layers.items() if isinstance(layer, kind)]
        if bool(theirs) != bool(ours):
            what = f"{word} for {ours[0]!r}" if ours else f"no {word}"
            raise ValueError(f"expected a file with {what}, got {theirs or 'none'}")
    ids, source = config.trainable_token_indices, input_embedding(model)
    for name, layer in layers.items():
        if isinstance(layer, TrainedRows):
            stated: Mapping[str, Any] = ids if isinstance(ids, Mapping) else {"": ids} if layer is source else {}
            own = next((each for word, each in stated.items() if name.endswith(word)), ())
            if own != layer.ids:
                raise ValueError(f"expected rows of tokens {list(layer.ids)} of {name!r}, got {list(own)}")


def beside_keys(
    name: str, adapter: Any, inside: dict[str, str], header: dict[str, Tensor], frozen: dict[str, Tensor]
) -> dict[str, str]:
    """Which of the file's names belong to a module that trains beside LoRA, once their shapes are seen to fit.

    Args:
        name, adapter: the module's.
        inside: its tensors by the model's own names -> the file's.
        header: the file's tensors, as `read_adapter` shows them.
        frozen: tensors that the file may repeat, by its names.

    Raises:
        AdapterError: one is missing, has another shape or does not belong there.
    """
    wanted, found = adapter.peft_tensors(), dict[str, str]()
    for whole, key in inside.items():
        part = whole.removeprefix(f"{name}.")
        if part in wanted:
            found[part] = key
        elif key not in frozen and not part.startswith(REPEATED):
            raise AdapterError(f"expected {', '.join(wanted)} of {name!r}, got {key!r}")
        if (like := wanted.get(part, frozen.get(key))) is not None:
            check_shape(header[key], tuple(like.shape), part, name)
    if not isinstance(adapter, Tied) and (missing := sorted(wanted.keys() - found.keys())):
        raise AdapterError(f"expected {missing[0]} of {name!r}, which the settings name, got none")
    return found


def is_inside(name: str, outer: str) -> bool:
    """True if a module is the other one, or a part of it."""
    return name == outer or name.startswith(outer + ".")


def tied_family(model: nn.Module) -> list[str]:
    """Names of all modules whose weight is the input embedding's, that one first; empty without such an embedding."""
    end = input_embedding(model)
    if end is None:
        return []
    alike = {
        name: m
        for name, m in named_modules(model)
        if dict(m.named_parameters(recurse=False)).get("weight") is end.weight
    }
    return sorted(alike, key=lambda name: alike[name] is not end)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """A model's embedding of token ids, or the adapter in its place; None if there is none, as in a vision model."""
    whole = unwrapped(model)
    try:
        end = getattr(whole, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return end if isinstance(getattr(end, "base", end), nn.Embedding) else None


def _token_rows(model: nn.Module, ids: Any) -> dict[str, tuple[int, ...]]:
    """Name of an embedding or an output layer -> whose rows train."""
    if not ids:
        return {}
    if not isinstance(ids, Mapping):
        family = tied_family(model)
        if not family:
            raise ValueError(
                f"expected a model with an input embedding for trainable_token_indices, got {type(model).__name__}"
            )
        return {family[0]: ids}
    names = [name for name, _ in named_modules(model) if name]
    found: dict[str, tuple[int, ...]] = {}
    for word, own in ids.items():
        matching = [name for name in names if name.endswith(word)]
        if not matching:
            known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
            raise ValueError(f"expected trainable_token_indices of a layer, {near_names(word, known)}")
        found |= {name: own for name in matching}
    return found


def _is_shared(family: list[str], lora: Mapping[str, Make], beside: Mapping[str, Make], config: LoRAConfig) -> bool:
    """Whether layers with one weight are to have one change, that of the input embedding, the first of them.

    Rows are shared as in PEFT: where the input embedding's train, and no other layer is trained in another way.
    """
    ways = {name: _way(lora.get(name), beside.get(name)) for name in family if name in lora or name in beside}
    if not ways or not (config.ensure_weight_tying or isinstance(ways.get(family[0]), tuple)):
        return False
    if len(set(ways.values())) > 1 and config.ensure_weight_tying:
        raise ValueError(f"expected one way to train {' and '.join(ways)} with ensure_weight_tying, got several")
    scales = {name: config.at(name) for name in family}
    if config.ensure_weight_tying and "LoRA" in ways.values() and len(set(scales.values())) > 1:
        raise ValueError(
            "expected one rank and one alpha with ensure_weight_tying, from rank_pattern and alpha_pattern for each of "
            f"{' and '.join(family)}, got {scales}"
        )
    return len(set(ways.values())) == 1 and (family[0] in ways or not isinstance(next(iter(ways.values())), tuple))


def _way(lora: Make | None, beside: Any) -> Any:
    """How a layer trains: as LoRA, whole, or the ids of its rows."""
    return "LoRA" if lora is not None else "whole" if beside is TrainedModule else beside.keywords["ids"]


def _follow(source: str, followers: list[str], lora: dict[str, Make], beside: dict[str, Make], default: Make) -> None:
    """Lets the followers share what is made for the source, LoRA by `default` if only a follower is named."""
    own = beside if any(name in beside for name in (source, *followers)) else lora
    make = own.get(source, TrainedModule if own is beside else default)
    for name in followers:
        own.pop(name, None)
    made: list[Any] = []

    def first(base: nn.Module) -> nn.Module:
        made[:] = [make(base)]
        return made[0]

    own[source] = first
    beside |= {name: lambda base: Tied(base, made[0]) for name in followers}
