"""How PEFT's files name the adapters of parameters: a wrapper for each, the module's last parameter outermost.

A module's parameters p and q are `module.base_layer.lora_A.weight` and `module.lora_A.weight` in a file of tensors, and
`module.p` and `module.q` in the settings. Source: PEFT 0.21, `BaseTuner._inject_parameters` and `ParamWrapper`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import permutations
from typing import Any

from torch import nn

from lorakit.layers.adapter import Adapter
from lorakit.layers.experts import INNER, LoRAExperts
from lorakit.models.targets import find_experts, is_named, plain_modules

PAIR = ("gate_up_proj", "down_proj")  # a mixture's weights in transformers 5
# Where a model has experts, PEFT takes a target of this name for theirs in transformers 4 (its
# `_MOE_TARGET_MODULE_MAPPING`), so that a shared expert's layer can only be named as the parameter that its weight is.
TAKEN = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def settings_of(name: str, layer: Any) -> dict[str, dict[str, Any]]:
    """What a file's settings say of each weight that an adapter changes, by its name there."""
    if not isinstance(layer, Adapter):
        raise ValueError(f"expected a layer with peft_settings() and the like, got {type(layer).__name__} for {name!r}")
    settings = dict(layer.peft_settings())
    own = settings.pop("parameters", {})
    return {f"{name}.{each}": settings | more for each, more in own.items()} or {name: settings}


def named_by_weight(model: nn.Module, layers: Mapping[str, Any]) -> list[str]:
    """The linear layers that the settings have to name by their weight."""
    linear = {name: layer.peft_settings() for name, layer in layers.items() if not isinstance(layer, LoRAExperts)}
    others = any(each.get("use_dora") or each.get("lora_dropout") for each in linear.values())  # a parameter has none
    if others or not find_experts(model):
        return []
    return [name for name in linear if name.rsplit(".", 1)[-1] in TAKEN]


def short_names(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """Names of parameters by their last two parts, in full where others are called so and not meant."""
    there = (f"{name}.{key}" for name, m in plain_modules(model) for key, _ in m.named_parameters(recurse=False))
    others = {_short(name) for name in there if name not in chosen}
    return list(dict.fromkeys(name if _short(name) in others else _short(name) for name in chosen))


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def told_by_file(
    shapes: Mapping[str, tuple[int, int]], named: Iterable[str], is_layer: Callable[[str], bool]
) -> dict[str, tuple[str, str] | None]:
    """The parameters whose factors a file holds, as far as it says so without the model.

    The only parameter of a module is known by its name, a mixture's two by their widths: the hidden states that
    `gate_up_proj` makes, in two halves, are those that `down_proj` takes.

    Args:
        shapes: d_out and d_in by the names of the file's entries.
        named: the `target_parameters`.
        is_layer: whether the settings name a layer.

    Returns:
        entry -> its module and parameter, None where the file does not tell; those of layers are left out.
    """
    inside: dict[str, list[str]] = {}
    for entry in shapes:
        inside.setdefault(in_module(entry, "")[0], []).append(entry)
    last = [(target.rsplit(".", 1)[-1], target) for target in named]
    found: dict[str, tuple[str, str] | None] = {}
    for module, entries in inside.items():
        if is_layer(module):
            continue
        own = {parameter for parameter, target in last if is_named(f"{module}.{parameter}", target)}
        orders = permutations(entries) if len(own) == len(entries) <= len(PAIR) else ()
        pairs = [dict(zip(sorted(own), order, strict=True)) for order in orders]
        right = [pair for pair in pairs if len(pair) == 1 or _fit(pair, shapes)]
        found |= dict.fromkeys(entries)
        if len(right) == 1:
            found |= {entry: (module, parameter) for parameter, entry in right[0].items()}
    return found


def _fit(pair: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether these are an expert's two weights; Llama 4 has them as (d_in, d_out) and does not say so."""
    if pair.keys() != {*PAIR}:
        return False
    (up_out, up_in), (down_out, down_in) = (shapes[pair[parameter]] for parameter in PAIR)
    return (up_out, up_in) == (2 * down_in, down_out) or (up_out, up_in) == (down_in, 2 * down_out)


def in_module(name: str, part: str) -> tuple[str, str]:
    """The module of a file's entry without its wrappers, and the entry's name in it."""
    while name.endswith(f".{INNER[:-1]}"):
        name, part = name.removesuffix(f".{INNER[:-1]}"), INNER + part
    return name, part
