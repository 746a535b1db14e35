"""Which of an adapter file's tensors belong to which layer of a model, and what shapes they have to have."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.layers.adapter import is_adapter
from lorakit.layers.bases import has_float_weight, linear_shape
from lorakit.layers.config import LoRAConfig, names_a_layer
from lorakit.layers.experts import peft_shapes
from lorakit.models.expert_files import in_module
from lorakit.models.peft_files import AdapterError, check_shape
from lorakit.models.targets import WRAPPERS, find_parameters, is_target, plain_modules
from lorakit.models.vocabulary import ends

PREFIX = "base_model.model."  # PEFT's wrapper and the model inside it
FACTORS, EMBEDDING_FACTORS = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
BASE_STEPS = ("base_layer", "token_adapter.base_layer", "original_module")  # where PEFT has what it stands for
STEPS = set(WRAPPERS.values()) - {"module"}  # of names in files that were saved from inside a wrapper


def parameters_of(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The parameters that the settings name and that are no linear layer's weight, by the name of their module."""
    try:
        found = find_parameters(model, config.target_parameters or ())
    except ValueError as error:
        raise AdapterError(str(error)) from None
    modules = dict(plain_modules(model))
    return {name: own for name, own in found.items() if not names_a_layer(modules[name], own)}


def chosen_by(
    config: LoRAConfig, bases: Mapping[str, nn.Module], parameters: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The layers that the settings name -> (), or the parameters by which they do; a linear one's may be its weight."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        for name in bases:
            by_weight = config.target_parameters and is_target(f"{name}.weight", config.target_parameters)
            own = parameters.get(name) or (("weight",) if by_weight else ())
            if own or (is_target(name, config.targets) and config.keeps(name)):
                found[name] = own
    except ValueError as error:  # an expression that nobody can wait for
        raise AdapterError(str(error)) from None
    return found


def by_layer(
    header: dict[str, Tensor],
    file: dict[str, Any],
    config: LoRAConfig,
    bases: dict[str, nn.Module],
    parameters: dict[str, tuple[str, ...]],
    chosen: Mapping[str, tuple[str, ...]],
    frozen: dict[str, Tensor],
) -> dict[str, dict[str, str]]:
    """Which of the file's names belong to each layer, once they and the factors' shapes are seen to fit the model."""
    parts = []  # of a layer of the reader's own: what it wants to have
    if file["peft_type"] == "LORA":
        parts = [*FACTORS, *(["lora_magnitude_vector"] if file.get("use_dora") else [])]
    found: dict[str, dict[str, str]] = {}
    for key, tensor in header.items():
        if key in frozen:
            check_shape(tensor, tuple(frozen[key].shape), "the base's own tensor", key)
            continue
        name, part = in_module(*_split(key, parts, bases))
        if part in found.setdefault(name, {}):
            raise AdapterError(f"expected {part} of layer {name!r} once, got it as {found[name][part]!r} and {key!r}")
        found[name][part] = key
    foreign = [name for name in found if name not in bases]
    if foreign:
        raise AdapterError(
            f"expected layers of this model, got {foreign[0]!r} ({len(foreign)} unknown): another model's file?"
        )
    try:
        ranks = {name: _ranks(name, config, chosen.get(name, ())) for name in found}
    except ValueError as error:  # an expression that nobody can wait for
        raise AdapterError(str(error)) from None
    shapes = {name: factor_shapes(bases[name], ranks[name], name in parameters) for name in found}
    usual = {*parts, *(EMBEDDING_FACTORS if parts else [])}
    needed = {name: shape.keys() if name in parameters else shape.keys() & usual for name, shape in shapes.items()}
    odd = sorted((chosen.keys() & bases.keys()) ^ set(found)) or sorted(
        name for name, got in found.items() if not got.keys() >= needed[name]
    )
    if odd:
        what = " and ".join(parts) or "tensors"
        raise AdapterError(f"expected {what} of every layer that target_modules names, not so: {odd[0]!r}")
    for name, got in found.items():
        for part, shape in shapes[name].items():
            if part in got:
                check_shape(header[got[part]], shape, part, name)
    return {name: found[name] for name in bases if name in found}


def _ranks(name: str, config: LoRAConfig, parameters: tuple[str, ...]) -> dict[str, int]:
    """The rank of a layer, or of each parameter by which the settings name it."""
    return {each: config.at(f"{name}.{each}")[0] for each in parameters} or {name: config.at(name)[0]}


def factor_shapes(base: nn.Module, ranks: dict[str, int], of_parameters: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors in a file, by what follows its name there, or of those of parameters."""
    if of_parameters:
        return {**peft_shapes(base, ranks)}
    (rank,) = ranks.values()
    if isinstance(base, nn.Embedding):
        return dict(zip(EMBEDDING_FACTORS, ((rank, base.num_embeddings), (base.embedding_dim, rank)), strict=True))
    d_out, d_in = linear_shape(base)
    return dict(zip((*FACTORS, "lora_magnitude_vector"), ((rank, d_in), (d_out, rank), (d_out,)), strict=True))


def base_tensors(model: nn.Module, bases: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors of the base that PEFT writes beside the factors, by their names in the file.

    It does so where the output head or the input embedding is adapted or is asked for (`save_embedding_layers`).
    """
    found = {f"{name}.{step}": base for name, base in bases.items() if has_float_weight(base) for step in BASE_STEPS}
    found |= {name: module for name, module in ends(model).items() if not is_adapter(module)}
    return {f"{PREFIX}{name}.{part}": p for name, module in found.items() for part, p in module.named_parameters()}


def own_name(key: str, bases: dict[str, nn.Module]) -> str:
    """A tensor's name as the model has it, without PEFT's prefix and the steps of wrappers."""
    plain = without_wrappers(key).removeprefix(PREFIX)
    inside = plain.startswith("module.") and not any(name.startswith("module.") for name in bases)
    return plain.removeprefix("module.") if inside else plain


def _split(key: str, parts: list[str], bases: dict[str, nn.Module]) -> tuple[str, str]:
    """The layer's name and what follows it: one of `parts`, or anything if none are given."""
    plain = PREFIX + own_name(key, bases)
    if parts:
        either = "|".join(map(re.escape, (*parts, *EMBEDDING_FACTORS)))
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({either})", plain, re.DOTALL)
        if match is None:
            kind = "DoRA" if len(parts) > len(FACTORS) else "plain LoRA"
            raise AdapterError(f"expected only {' and '.join(parts)} of linear layers, got {key!r}: not {kind}")
        return match[1], match[2]
    steps = plain.removeprefix(PREFIX).split(".")
    for end in range(len(steps) - 1, 0, -1):
        if (name := ".".join(steps[:end])) in bases:
            return name, ".".join(steps[end:])
    return key, ""


def without_wrappers(key: str) -> str:
    """A tensor's name without the steps that torch.compile, FSDP and checkpointing add."""
    return ".".join(step for step in key.split(".") if step not in STEPS)
