"""Save and load adapters in PEFT's own file format, so that either library reads what the other wrote."""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.bases import is_conv1d, linear_shape
from lorakit.layers.dora import DoRALinear
from lorakit.layers.lora import SCALINGS, LoRALinear
from lorakit.layers.pissa import PiSSALinear
from lorakit.models.inject import Count, adapters, count, wrap
from lorakit.models.peft_files import AdapterError, read_adapter, write_adapter
from lorakit.models.targets import is_named, linear_layers

PREFIX = "base_model.model."  # PEFT's wrapper and the model inside it


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Writes the adapters of a model as PEFT would, each file atomically.

    Args:
        model: a model with LoRALinear, DoRALinear or PiSSALinear layers; ranks and scales may differ between them. A
            scaling rule of the reader's own is written as the alpha that gives the same scale; PiSSA as plain LoRA of
            twice the rank, which fits the base as it was before.
        folder: made if missing; other files in it are kept.

    Returns:
        the folder.

    Raises:
        ValueError: no adapters, adapters of other kinds or of several, values that are not finite, or further trainable
            parameters, which the files could not hold.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("expected a model with adapters, got a plain one")
    kind = type(next(iter(layers.values())))
    for name, layer in layers.items():
        if type(layer) is not kind or kind not in (LoRALinear, DoRALinear, PiSSALinear):
            expected = kind.__name__ if kind in (DoRALinear, PiSSALinear) else "LoRALinear"
            raise ValueError(f"expected {expected} layers, got {type(layer).__name__} for layer {name!r}")
    inside = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost:
        raise ValueError(f"expected only adapters to be trainable, got also {', '.join(lost[:4])}: they would be lost")
    tensors = {}
    for name, layer in layers.items():
        for part, parameter in _parts(layer).items():
            tensors[f"{PREFIX}{name}.{part}"] = parameter.detach().cpu().contiguous()
    write_adapter(Path(folder), tensors, _config(model, layers))
    return Path(folder)


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> Count:
    """Puts a saved adapter, written by `save_adapter` or by PEFT as plain LoRA, rsLoRA or DoRA, into a model.

    A plain model is injected and its other parameters are frozen. A model that already carries adapters of the same
    layers, ranks and scales gets the file's values in place, so that an optimiser keeps its parameters.

    Args:
        model: the base model, or the base model with matching adapters.
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.

    Returns:
        how many parameters train, and of how many.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: the files are damaged (truncated, altered, not finite), name another method, or do
            not fit the model. The model is untouched.
    """
    tensors, config = read_adapter(Path(folder))
    present = adapters(model)
    bases = {n: a.base for n, a in present.items()} if present else linear_layers(model)
    settings = _settings(tensors, config, bases)
    scaling = "rslora" if config.get("use_rslora") else "lora"
    kind = DoRALinear if config.get("use_dora") else LoRALinear
    if present:
        for name, layer in present.items():
            rank, alpha = settings[name]
            if type(layer) is not kind:
                raise AdapterError(f"expected a file for {type(layer).__name__} layers, got one for {kind.__name__}")
            if layer.rank != rank or not math.isclose(layer.scale, SCALINGS[scaling](alpha, rank)):
                raise AdapterError(
                    f"expected rank {layer.rank} and scale {layer.scale:g} for layer {name!r}, got others"
                )
        for name, layer in present.items():
            _fill(layer, name, tensors)
        return count(model)
    dropout = config.get("lora_dropout") or 0.0

    def make(name: str, base: nn.Module) -> LoRALinear:
        rank, alpha = settings[name]
        return _fill(kind(base, rank, alpha, dropout, scaling), name, tensors)

    return wrap(model, settings, make)


def _fill(layer: LoRALinear, name: str, tensors: dict[str, Tensor]) -> LoRALinear:
    with torch.no_grad():
        for part, parameter in _parts(layer).items():
            parameter.copy_(tensors[f"{PREFIX}{name}.{part}"])
    return layer


def _parts(layer: LoRALinear) -> dict[str, Tensor]:
    """What a layer has learned, by the names that PEFT's files have for it."""
    A, B = layer.as_lora() if isinstance(layer, PiSSALinear) else (layer.A, layer.B)
    parts = {"lora_A.weight": A, "lora_B.weight": B}
    return parts | ({"lora_magnitude_vector": layer.magnitude} if isinstance(layer, DoRALinear) else {})


def _config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    """The adapter_config.json of a model: the commonest rank and alpha, and a pattern for each layer that differs."""
    rule = "rslora" if all(layer.scaling == "rslora" for layer in layers.values()) else "lora"
    ranks = {name: layer.rank * (2 if isinstance(layer, PiSSALinear) else 1) for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rule, ranks[name]) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    last = {name.rsplit(".", 1)[-1] for name in layers}
    others = any(name.rsplit(".", 1)[-1] in last and name not in layers for name, _ in model.named_modules())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(getattr(layer.dropout, "p", 0.0) for layer in layers.values()),
        "target_modules": sorted(layers if others else last),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": rule == "rslora",
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(layer: LoRALinear, rule: str, rank: int) -> float:
    """The alpha that gives the layer's scale under the rule that the file names, at the rank that it has there."""
    same = layer.scaling == rule and layer.rank == rank
    return layer.alpha if same else layer.scale * (rank**0.5 if rule == "rslora" else rank)


def _settings(tensors: dict[str, Tensor], config: dict, bases: dict[str, nn.Module]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer in the file, once names, shapes and settings are seen to fit the model."""
    found: dict[str, dict[str, Tensor]] = {}
    parts = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else [])]
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, parts))})", key)
        if match is None:
            kind = "DoRA" if config.get("use_dora") else "plain LoRA"
            raise AdapterError(
                f"expected only {' and '.join(parts)} of linear layers, got {key!r}, which is not {kind}"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    foreign = [name for name in found if name not in bases]
    if foreign:
        raise AdapterError(
            f"expected layers of this model, got {foreign[0]!r} ({len(foreign)} unknown): another model's file?"
        )
    expected = {name for name in bases if _is_targeted(name, config)}
    odd = sorted(expected ^ set(found)) or sorted(name for name, got in found.items() if len(got) < len(parts))
    if odd:
        raise AdapterError(
            f"expected {' and '.join(parts)} of every layer that target_modules names, not so: {odd[0]!r}"
        )
    settings = {}
    for name in (name for name in bases if name in found):
        rank = pattern_value(config.get("rank_pattern"), name, config.get("r"))
        alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if type(rank) is not int or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise AdapterError(f"expected an integer r and a finite lora_alpha, got {rank!r} and {alpha!r}")
        d_out, d_in = linear_shape(bases[name])
        for part, shape in zip(parts, ((rank, d_in), (d_out, rank), (d_out,)), strict=False):
            got = tuple(found[name][part].shape)
            if got != shape or not found[name][part].is_floating_point():
                raise AdapterError(f"expected floats of shape {shape} for {part} of layer {name!r}, got {got}")
        settings[name] = (rank, alpha)
    return settings


def _is_targeted(name: str, config: dict[str, Any]) -> bool:
    """PEFT's rule for which layers a config adapts (`peft.tuners.tuners_utils.check_target_module_exists`)."""

    def named(targets: str | list[str]) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(is_named(name, target) for target in targets)

    if not named(config.get("target_modules") or []) or named(config.get("exclude_modules") or []):
        return False
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if indices in (None, []) or isinstance(config["target_modules"], str):
        return True
    starts = rf"(?:^|.*?\.)(?:{'|'.join([patterns] if isinstance(patterns, str) else patterns)})\.(\d+)\."
    match = re.match(starts, name)
    return match is not None and int(match[1]) in ([indices] if isinstance(indices, int) else indices)


def pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that the layer's name, or its last parts, match (PEFT's `get_pattern_key`)."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
