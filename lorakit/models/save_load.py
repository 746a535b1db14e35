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

from lorakit.layers.adapter import Adapter, own_parameters
from lorakit.layers.bases import is_conv1d, linear_shape
from lorakit.layers.config import PLAIN, LoRAConfig
from lorakit.layers.lora import SCALE_RULES, checked_scale
from lorakit.models.inject import adapters, wrap
from lorakit.models.peft_files import AdapterError, as_config, read_adapter, write_adapter
from lorakit.models.targets import is_target, linear_layers

PREFIX = "base_model.model."  # PEFT's wrapper and the model inside it
BY_LAYER = ("r", "lora_alpha", "use_rslora", "lora_dropout")  # settings that may differ between a file's layers
FACTORS = ("lora_A.weight", "lora_B.weight")


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Writes the adapters of a model as PEFT would, each file atomically.

    Args:
        model: with adapters that say what a file needs, as lorakit's do (`lorakit.layers.adapter`); ranks and scales
            may differ between them. A scale rule of the reader's own is written as the alpha that gives the same scale;
            PiSSA as plain LoRA of twice the rank, which fits the base as it was before; a layer of the reader's own
            under its name, which PEFT refuses.
        folder: made if missing; other files in it are kept.

    Returns:
        the folder.

    Raises:
        ValueError: no adapters, some that do not say it, or of several kinds; values that are not finite; or further
            trainable parameters, which the files could not hold.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("expected a model with adapters, got a plain one")
    config = _config(model, layers)
    inside = {id(p) for layer in layers.values() for p in own_parameters(layer).values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost:
        raise ValueError(f"expected only adapters to be trainable, got also {', '.join(lost[:4])}: they would be lost")
    tensors = {}
    for name, layer in layers.items():
        for part, tensor in layer.peft_tensors().items():
            tensors[f"{PREFIX}{name}.{part}"] = tensor.detach().cpu().contiguous()
    write_adapter(Path(folder), tensors, config)
    return Path(folder)


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
    kinds = {"LORA", *(_settings(each, name)["peft_type"] for name, each in present.items())}
    tensors, file = read_adapter(Path(folder), kinds if layer is None else None)
    config = as_config(file, layer)
    bases = {name: each.base for name, each in present.items()} if present else linear_layers(model)
    found = _by_layer(tensors, file, config, bases)
    if present:
        for name, each in present.items():
            _check(each, name, found[name], file, config)
        _fill(present, found)
        return model

    def make(name: str, base: nn.Module) -> nn.Module:
        adapter = config.make(name, base)
        _check(adapter, name, found[name], file, config)
        _fill({name: adapter}, found)
        return adapter

    return wrap(model, found, make)


def _settings(layer: Any, name: str) -> dict[str, Any]:
    if not isinstance(layer, Adapter):
        raise ValueError(f"expected a layer with peft_settings() and the like, got {type(layer).__name__} for {name!r}")
    return layer.peft_settings()


def _config(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    """The adapter_config.json of a model: the commonest rank and alpha, and a pattern for each layer that differs."""
    settings = {name: _settings(layer, name) for name, layer in layers.items()}
    common = [{key: value for key, value in each.items() if key not in BY_LAYER} for each in settings.values()]
    first = type(next(iter(layers.values()))).__name__
    for (name, layer), own in zip(layers.items(), common, strict=True):
        if own != common[0]:
            raise ValueError(f"expected {first} layers, got {type(layer).__name__} for layer {name!r}")
    rslora = all(each["use_rslora"] for each in settings.values())
    ranks = {name: each["r"] for name, each in settings.items()}
    alphas = {
        name: each["lora_alpha"] if each["use_rslora"] == rslora else _scale(each) * each["r"]
        for name, each in settings.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    last = {name.rsplit(".", 1)[-1] for name in layers}
    others = any(name.rsplit(".", 1)[-1] in last and name not in layers for name, _ in model.named_modules())
    return common[0] | {
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(each["lora_dropout"] for each in settings.values()),
        "target_modules": sorted(layers if others else last),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _scale(settings: Mapping[str, Any]) -> float:
    return SCALE_RULES["rslora" if settings["use_rslora"] else "lora"](settings["lora_alpha"], settings["r"])


def _by_layer(
    tensors: dict[str, Tensor], file: dict[str, Any], config: LoRAConfig, bases: dict[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """What the file has for each layer, once names and the factors' shapes are seen to fit the model."""
    parts = []  # of a layer of the reader's own: what it wants to have
    if file["peft_type"] == "LORA":
        parts = [*FACTORS, *(["lora_magnitude_vector"] if file.get("use_dora") else [])]
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _split(key, parts, bases)
        found.setdefault(name, {})[part] = tensor
    foreign = [name for name in found if name not in bases]
    if foreign:
        raise AdapterError(
            f"expected layers of this model, got {foreign[0]!r} ({len(foreign)} unknown): another model's file?"
        )
    expected = {name for name in bases if is_target(name, config.targets)}
    odd = sorted(expected ^ set(found)) or sorted(name for name, got in found.items() if not got.keys() >= set(parts))
    if odd:
        what = " and ".join(parts) or "tensors"
        raise AdapterError(f"expected {what} of every layer that target_modules names, not so: {odd[0]!r}")
    for name, got in found.items():
        rank, (d_out, d_in) = config.at(name)[0], linear_shape(bases[name])
        for part, shape in zip(FACTORS, ((rank, d_in), (d_out, rank)), strict=True):
            _check_shape(got.get(part), shape, part, name)
    return {name: found[name] for name in bases if name in found}


def _split(key: str, parts: list[str], bases: dict[str, nn.Module]) -> tuple[str, str]:
    """The layer's name and what follows it: one of `parts`, or anything if none are given."""
    if parts:
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, parts))})", key)
        if match is None:
            kind = "DoRA" if len(parts) > len(FACTORS) else "plain LoRA"
            raise AdapterError(f"expected only {' and '.join(parts)} of linear layers, got {key!r}: not {kind}")
        return match[1], match[2]
    steps = key.removeprefix(PREFIX).split(".")
    for end in range(len(steps) - 1, 0, -1):
        if (name := ".".join(steps[:end])) in bases:
            return name, ".".join(steps[end:])
    return key, ""


def _check(adapter: Any, name: str, got: dict[str, Tensor], file: dict[str, Any], config: LoRAConfig) -> None:
    """Refuses what an adapter's layer cannot take."""
    settings, rank = _settings(adapter, name), config.at(name)[0]
    kind = (file["peft_type"], bool(file.get("use_dora")))
    if (settings["peft_type"], bool(settings.get("use_dora"))) != kind:
        theirs = "DoRALinear" if kind == ("LORA", True) else "LoRALinear" if kind == ("LORA", False) else kind[0]
        raise AdapterError(f"expected a file for {type(adapter).__name__} layers, got one for {theirs}")
    scale = checked_scale(*config.at(name), scale_rule=config.scale_rule)
    if settings["r"] != rank or not math.isclose(_scale(settings), scale):
        raise AdapterError(
            f"expected rank {settings['r']} and scale {_scale(settings):g} for layer {name!r}, got {rank} and {scale:g}"
        )
    for key in settings.keys() - PLAIN:
        if settings[key] != file.get(key):
            raise AdapterError(f"expected {key} = {settings[key]!r}, got {file.get(key)!r}")
    wanted = adapter.peft_tensors()
    if wanted.keys() != got.keys():
        raise AdapterError(f"expected {', '.join(wanted)} of layer {name!r}, got {', '.join(got)}")
    for part, tensor in wanted.items():
        _check_shape(got[part], tuple(tensor.shape), part, name)


def _check_shape(tensor: Tensor | None, shape: tuple[int, ...], part: str, name: str) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_floating_point()):
        raise AdapterError(f"expected floats of shape {shape} for {part} of layer {name!r}, got {tuple(tensor.shape)}")


def _fill(layers: dict[str, Any], found: dict[str, dict[str, Tensor]]) -> None:
    """Gives every layer its values, or none of them."""
    before = [(p, p.detach().clone()) for layer in layers.values() for p in own_parameters(layer).values()]
    try:
        for name, layer in layers.items():
            layer.load_peft(found[name])
        torch.clear_autocast_cache()  # it holds A and B as they were
    except BaseException as error:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        if isinstance(error, ValueError):
            raise AdapterError(str(error)) from None
        raise
