"""Save and load adapters in PEFT's own file format, so that either library reads what the other wrote."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapter import own_parameters
from lorakit.layers.bases import has_float_weight, is_conv1d, linear_shape
from lorakit.layers.config import PLAIN, LoRAConfig, names_a_layer
from lorakit.layers.experts import LoRAExperts, peft_shapes
from lorakit.layers.lora import checked_scale, scale_of
from lorakit.models.expert_files import in_module, named_by_weight, settings_of, short_names
from lorakit.models.inject import adapters, grads_kept, is_adapter, wrap
from lorakit.models.peft_files import AdapterError, as_config, check_finite, read_adapter, write_adapter
from lorakit.models.targets import (
    WRAPPERS,
    find_parameters,
    is_target,
    linear_layers,
    named_modules,
    plain_modules,
    unwrapped,
)

PREFIX = "base_model.model."  # PEFT's wrapper and the model inside it
BY_LAYER = ("r", "lora_alpha", "use_rslora", "lora_dropout")  # settings that may differ between a file's layers
FACTORS = ("lora_A.weight", "lora_B.weight")
STEPS = set(WRAPPERS.values()) - {"module"}  # of names in files that were saved from inside a wrapper


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Writes the adapters of a model as PEFT would, each file atomically.

    Args:
        model: with adapters that say what a file needs, as lorakit's do (`lorakit.layers.adapter`); ranks and scales
            may differ between them. It may be compiled or distributed: the file has the model's own names. A scale
            rule of the reader's own is written as the alpha that gives the same scale; PiSSA as plain LoRA of twice the
            rank, which fits the base as it was before; a layer of the reader's own under its name, which PEFT refuses.
        folder: made if missing; other files in it are kept.

    Returns:
        the folder.

    Raises:
        ValueError: no adapters, some that do not say it, or of several kinds; values that are not finite; further
            trainable parameters, which the files could not hold; or a process's share of an adapter in place of all.
    """
    write_adapter(Path(folder), *as_file(model))
    return Path(folder)


def as_file(model: nn.Module, layers: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an adapter's two files hold, tensors and settings: those of the model's adapters, or of some outside of it.

    Raises:
        ValueError: as `save_adapter`.
    """
    if layers is None:
        layers = adapters(model)
        inside = {id(p) for layer in layers.values() for p in own_parameters(layer).values()}
        lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        if layers and lost:
            raise ValueError(
                f"expected only adapters to be trainable, got also {', '.join(lost[:4])}: they would be lost"
            )
    if not layers:
        raise ValueError("expected a model with adapters, got a plain one")
    config, tensors = _config(model, layers), {}
    for name, layer in layers.items():
        ranks = {key.removeprefix(f"{name}."): each["r"] for key, each in settings_of(name, layer).items()}
        wanted = _factor_shapes(layer.base, ranks, isinstance(layer, LoRAExperts))
        for part, tensor in layer.peft_tensors().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP's, of all processes
            _check_shape(whole, wanted.get(part, tuple(whole.shape)), part, name)
            tensors[f"{PREFIX}{name}.{part}"] = whole.detach().cpu().contiguous()
    return tensors, config


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, layer: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Puts a saved adapter, written by `save_adapter` or by PEFT as plain LoRA, rsLoRA or DoRA, into a model.

    A plain model is injected and its other parameters are frozen. A model that already carries adapters of the same
    layers, ranks and scales gets the file's values in place, so that an optimiser keeps its parameters.

    Args:
        model: the base model, or the base model with matching adapters.
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        layer: the adapter's class, if it is one of the reader's own and the model is plain.

    Returns:
        the same model.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: the files are damaged (truncated, altered, not finite), name another method, or do
            not fit the model. The model is untouched.
    """
    present = adapters(model)
    bases = {name: each.base for name, each in present.items()} if present else linear_layers(model)
    with grads_kept(model):
        layers = read_layers(model, Path(folder), layer, bases, present)
        return model if present else wrap(model, layers, lambda name, _: layers[name])


def read_layers(
    model: nn.Module,
    source: Path | tuple[dict[str, Tensor], dict[str, Any]],
    layer: Callable[..., nn.Module] | None,
    bases: dict[str, nn.Module],
    present: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The layers of an adapter with its values in them: those that are present, or new ones that are not in the model.

    Args:
        model: that of the bases.
        source: a folder, or what `as_file` returns.
        layer: as for `load_adapter`, which says what is refused.
        bases: every layer that may have an adapter.
        present: the model's adapters, which get all values or none; without them, new ones are made.
    """
    present = present or {}
    kinds = {"LORA", *(own["peft_type"] for each in present.items() for own in settings_of(*each).values())}
    frozen = _base_tensors(model, bases)
    layers: dict[str, Any] = dict(present)
    keys: dict[str, dict[str, str]] = {}  # layer -> what follows its name in the file -> the whole name there

    def check(header: dict[str, Tensor], file: dict[str, Any]) -> None:
        config = as_config(file, layer)
        parameters = _parameters(model, config)
        bases.update({name: module for name, module in plain_modules(model) if name in parameters})
        keys.update(_by_layer(header, file, config, bases, parameters, frozen))
        if left := sorted(present.keys() - keys.keys()):
            raise AdapterError(f"expected a file for all adapters of the model, got none for {left[0]!r}")
        for name, parts in keys.items():
            chosen = _chosen(name, config, parameters)
            if not present:
                layers[name] = config.make(name, bases[name], chosen)
            _check(layers[name], name, {part: header[key] for part, key in parts.items()}, file, config, chosen)

    if isinstance(source, Path):
        tensors, _ = read_adapter(source, kinds if layer is None else None, check)
    else:
        tensors, file = source
        check_finite(tensors)
        check(tensors, file)
    for key in tensors.keys() & frozen.keys():
        _check_base(key, tensors[key], frozen[key])
    _fill(layers, {name: {part: tensors[key] for part, key in parts.items()} for name, parts in keys.items()})
    return layers


def _parameters(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """The parameters that the settings name and that are no linear layer's weight, by the name of their module."""
    try:
        found = find_parameters(model, config.target_parameters or ())
    except ValueError as error:
        raise AdapterError(str(error)) from None
    modules = dict(plain_modules(model))
    return {name: own for name, own in found.items() if not names_a_layer(modules[name], own)}


def _chosen(name: str, config: LoRAConfig, parameters: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The parameters by which the settings name a module; a linear layer may be named by its weight."""
    by_weight = config.target_parameters and is_target(f"{name}.weight", config.target_parameters)
    return parameters.get(name) or (("weight",) if by_weight else ())


def _config(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json of a model: the commonest rank and alpha, and a pattern for each layer that differs."""
    common = {name: _common(name, layer) for name, layer in layers.items()}
    first = next(iter(layers))
    for name, layer in layers.items():
        if common[name] != common[first]:
            raise ValueError(
                f"expected {type(layers[first]).__name__} layers, got {type(layer).__name__} for layer {name!r}"
            )
    by_weight = named_by_weight(model, layers)
    settings = {
        f"{key}.weight" if name in by_weight else key: own
        for name, layer in layers.items()
        for key, own in settings_of(name, layer).items()
    }
    linear = [name for name in layers if name in settings]
    rslora = all(each["use_rslora"] for each in settings.values())
    ranks = {name: each["r"] for name, each in settings.items()}
    alphas = {
        name: each["lora_alpha"] if each["use_rslora"] == rslora else scale_of(each) * each["r"]
        for name, each in settings.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    last = {name.rsplit(".", 1)[-1] for name in linear}
    others = any(name.rsplit(".", 1)[-1] in last and name not in linear for name, _ in named_modules(model))
    parameters = short_names(model, [name for name in settings if name not in layers])
    whole = unwrapped(model)
    return common[first] | {
        "task_type": "CAUSAL_LM" if type(whole).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": getattr(whole, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(each["lora_dropout"] for each in settings.values()),
        "target_modules": sorted(linear if others else last),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _common(name: str, layer: Any) -> dict[str, Any]:
    """The settings that all layers of a file must have alike."""
    own = next(iter(settings_of(name, layer).values()))
    return {key: value for key, value in own.items() if key not in BY_LAYER}


def _by_layer(
    header: dict[str, Tensor],
    file: dict[str, Any],
    config: LoRAConfig,
    bases: dict[str, nn.Module],
    parameters: dict[str, tuple[str, ...]],
    frozen: dict[str, Tensor],
) -> dict[str, dict[str, str]]:
    """Which of the file's names belong to each layer, once they and the factors' shapes are seen to fit the model."""
    parts = []  # of a layer of the reader's own: what it wants to have
    if file["peft_type"] == "LORA":
        parts = [*FACTORS, *(["lora_magnitude_vector"] if file.get("use_dora") else [])]
    found: dict[str, dict[str, str]] = {}
    for key, tensor in header.items():
        if key in frozen:
            _check_shape(tensor, tuple(frozen[key].shape), "the base's own tensor", key)
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
        chosen = {name: _chosen(name, config, parameters) for name in bases}
        expected = {name for name in bases if chosen[name] or (is_target(name, config.targets) and config.keeps(name))}
        ranks = {name: _ranks(name, config, chosen[name]) for name in found}
    except ValueError as error:  # an expression that nobody can wait for
        raise AdapterError(str(error)) from None
    shapes = {name: _factor_shapes(bases[name], ranks[name], name in parameters) for name in found}
    needed = {name: shapes[name].keys() if name in parameters else set(parts) for name in found}
    odd = sorted(expected ^ set(found)) or sorted(name for name, got in found.items() if not got.keys() >= needed[name])
    if odd:
        what = " and ".join(parts) or "tensors"
        raise AdapterError(f"expected {what} of every layer that target_modules names, not so: {odd[0]!r}")
    for name, got in found.items():
        for part, shape in shapes[name].items():
            if part in got:
                _check_shape(header[got[part]], shape, part, name)
    return {name: found[name] for name in bases if name in found}


def _ranks(name: str, config: LoRAConfig, parameters: tuple[str, ...]) -> dict[str, int]:
    """The rank of a layer, or of each parameter by which the settings name it."""
    return {each: config.at(f"{name}.{each}")[0] for each in parameters} or {name: config.at(name)[0]}


def _factor_shapes(base: nn.Module, ranks: dict[str, int], of_parameters: bool) -> dict[str, tuple[int, ...]]:
    if of_parameters:
        return {**peft_shapes(base, ranks)}
    (rank,), (d_out, d_in) = ranks.values(), linear_shape(base)
    return dict(zip((*FACTORS, "lora_magnitude_vector"), ((rank, d_in), (d_out, rank), (d_out,)), strict=True))


def _base_tensors(model: nn.Module, bases: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors of the base that PEFT writes beside the factors, by their names in the file.

    It does so where the output head or the input embedding is adapted or is asked for (`save_embedding_layers`).
    """
    found = {f"{name}.base_layer": base for name, base in bases.items() if has_float_weight(base)}
    whole = unwrapped(model)
    ends = [getattr(whole, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    for name, module in named_modules(model):
        if any(module is end for end in ends) and not is_adapter(module):
            found[name] = module
    return {f"{PREFIX}{name}.{part}": p for name, module in found.items() for part, p in module.named_parameters()}


def _check_base(key: str, theirs: Tensor, ours: Tensor) -> None:
    """Refuses a file whose base is another; that of a narrower dtype may have been rounded."""
    ours = ours.detach().cpu()
    if not (torch.equal(theirs.to(ours.dtype), ours) or torch.equal(ours.to(theirs.dtype), theirs)):
        raise AdapterError(f"expected this model's own values of {key!r}, got others: it was trained or resized there")


def _split(key: str, parts: list[str], bases: dict[str, nn.Module]) -> tuple[str, str]:
    """The layer's name and what follows it: one of `parts`, or anything if none are given."""
    plain = without_wrappers(key)
    if plain.removeprefix(PREFIX).startswith("module.") and not any(name.startswith("module.") for name in bases):
        plain = PREFIX + plain.removeprefix(PREFIX).removeprefix("module.")
    if parts:
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, parts))})", plain, re.DOTALL)
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


def _check(
    adapter: Any, name: str, got: dict[str, Tensor], file: dict[str, Any], config: LoRAConfig, chosen: tuple[str, ...]
) -> None:
    """Refuses what an adapter's layer cannot take."""
    kind = (file["peft_type"], bool(file.get("use_dora")))
    for key, settings in settings_of(name, adapter).items():
        if (settings["peft_type"], bool(settings.get("use_dora"))) != kind:
            theirs = "DoRALinear" if kind == ("LORA", True) else "LoRALinear" if kind == ("LORA", False) else kind[0]
            raise AdapterError(f"expected a file for {type(adapter).__name__} layers, got one for {theirs}")
        rank, alpha = config.at(key if key != name or not chosen else f"{name}.weight")
        scale, r, own = checked_scale(rank, alpha, scale_rule=config.scale_rule), settings["r"], scale_of(settings)
        if r != rank or not math.isclose(own, scale):
            raise AdapterError(f"expected rank {r} and scale {own:g} for layer {key!r}, got {rank} and {scale:g}")
        for each in settings.keys() - PLAIN:
            if settings[each] != file.get(each):
                raise AdapterError(f"expected {each} = {settings[each]!r}, got {file.get(each)!r}")
    wanted = adapter.peft_tensors()
    if wanted.keys() != got.keys():
        raise AdapterError(f"expected {', '.join(wanted)} of layer {name!r}, got {', '.join(map(repr, got))}")
    for part, tensor in wanted.items():
        _check_shape(got[part], tuple(tensor.shape), part, name)


def _check_shape(tensor: Tensor, shape: tuple[int, ...], part: str, name: str) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise AdapterError(f"expected floats of shape {shape} for {part} of layer {name!r}, got {tuple(tensor.shape)}")


def _fill(layers: dict[str, Any], found: dict[str, dict[str, Tensor]]) -> None:
    """Gives every layer its values, or none of them."""
    before = [(p, p.detach().clone()) for layer in layers.values() for p in own_parameters(layer).values()]
    try:
        for name, layer in layers.items():
            layer.load_peft(found[name])
            if any(tensor.dtype == torch.float64 for tensor in found[name].values()):
                check_finite({f"{name}.{part}": tensor.detach() for part, tensor in layer.peft_tensors().items()})
        torch.clear_autocast_cache()  # it holds A and B as they were
    except BaseException as error:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        if isinstance(error, ValueError):
            raise AdapterError(str(error)) from None
        raise
