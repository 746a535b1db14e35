"""Save and load adapters in PEFT's own file format, so that either library reads what the other wrote."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._paths import as_path
from lorakit._suggest import near_names
from lorakit.layers.adapter import own_parameters
from lorakit.layers.bases import is_conv1d
from lorakit.layers.config import PLAIN, LoRAConfig
from lorakit.layers.experts import LoRAExperts
from lorakit.layers.lora import checked_scale, scale_of
from lorakit.layers.named_adapters import NamedAdapters
from lorakit.layers.tied import Tied
from lorakit.models.beside import BESIDE, Make, beside_keys, beside_settings, check_beside, is_inside, plan
from lorakit.models.expert_files import named_by_weight, settings_of, short_names
from lorakit.models.file_layers import PREFIX, base_tensors, by_layer, chosen_by, factor_shapes, own_name, parameters_of
from lorakit.models.inject import adapters, grads_kept, wrap
from lorakit.models.peft_files import (
    VOCABULARY,
    AdapterError,
    as_config,
    check_finite,
    check_shape,
    read_adapter,
    write_adapter,
)
from lorakit.models.targets import adaptable_layers, named_modules, plain_modules, unwrapped
from lorakit.models.vocabulary import check_vocabulary, embedding_tensors, is_resized, new_rows, vocabulary

BY_LAYER = ("r", "lora_alpha", "use_rslora", "lora_dropout")  # settings that may differ between a file's layers


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Writes the adapters of a model as PEFT would, each file atomically.

    Args:
        model: with adapters that say what a file needs, as lorakit's do (`lorakit.layers.adapter`); ranks and scales
            may differ between them. It may be compiled or distributed: the file has the model's own names. A scale
            rule of the reader's own is written as the alpha that gives the same scale; PiSSA as plain LoRA of twice the
            rank, which fits the base as it was before; a layer of the reader's own under its name, which PEFT refuses.
            If the vocabulary is not that of the base that the model was loaded from, both embeddings are written, too.
        folder: made if missing; other files in it are kept.
        name: which one, of a model with named adapters.

    Returns:
        the folder.

    Raises:
        ValueError: no adapters, none of that name, some that do not say it, or of several kinds; values that are not
            finite; further trainable parameters, which the files could not hold; or a process's share of an adapter.
    """
    size = vocabulary(model)
    folder = as_path("an adapter's folder", folder)
    write_adapter(folder, *as_file(model, _of_name(model, name)), {} if size is None else {VOCABULARY: str(size)})
    return folder


def _of_name(model: nn.Module, name: str | None) -> dict[str, Any] | None:
    """The layers of a named adapter; None of a model without names."""
    present = {key: each for key, each in adapters(model).items() if isinstance(each, NamedAdapters)}
    known = list(dict.fromkeys(each for layer in present.values() for each in layer.names))
    if name is None and not known:
        return None
    if name not in known:
        raise ValueError(f"expected the name of one of the model's adapters, {near_names(name, known)}")
    return {key: each.get(name) for key, each in present.items() if name in each.names}


def as_file(model: nn.Module, layers: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an adapter's two files hold, tensors and settings: those of the model's adapters, or of some outside of it.

    Raises:
        ValueError: as `save_adapter`.
    """
    tensors: dict[str, Tensor] = {}
    if layers is None:
        layers = adapters(model)
        inside = {id(p) for layer in layers.values() for p in own_parameters(layer).values()}
        lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        if layers and lost:
            raise ValueError(
                f"expected only adapters to be trainable, got also {', '.join(lost[:4])}: they would be lost; "
                "inject(..., modules_to_save=[...]) trains modules that are saved"
            )
        if is_resized(model):
            tensors = {f"{PREFIX}{key}": p.detach().cpu().contiguous() for key, p in embedding_tensors(model).items()}
    lora = {name: layer for name, layer in layers.items() if not isinstance(layer, BESIDE)}
    if not lora:
        raise ValueError("expected a model with adapters, got a plain one")
    config = _config(model, lora) | beside_settings(model, layers)
    names = {id(layer): re.escape(name) for name, layer in lora.items()}
    for name, layer in layers.items():
        source = names.get(id(layer.source)) if isinstance(layer, Tied) else None
        for pattern in (config["rank_pattern"], config["alpha_pattern"]):
            if source in pattern:
                pattern[re.escape(name)] = pattern[source]  # PEFT scales each end by the pattern for its own name
    for name, layer in layers.items():
        ranks = {k.removeprefix(f"{name}."): own["r"] for k, own in settings_of(name, layer).items() if name in lora}
        wanted = factor_shapes(layer.base, ranks, isinstance(layer, LoRAExperts)) if name in lora else {}
        for part, tensor in layer.peft_tensors().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP's, of all processes
            check_shape(whole, wanted.get(part, tuple(whole.shape)), part, name)
            tensors[f"{PREFIX}{name}.{part}"] = whole.detach().cpu().contiguous()
    return tensors, config


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, layer: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Puts a saved adapter, written by `save_adapter` or by PEFT as plain LoRA, rsLoRA or DoRA, into a model.

    A plain model is injected and its other parameters are frozen. A model that already carries adapters of the same
    layers, ranks and scales gets the file's values in place, so that an optimiser keeps its parameters. Rows that the
    vocabulary has more than the base's, which resizing makes at random, get the file's values if it has them.

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
    folder, present = as_path("an adapter's folder", folder), adapters(model)
    own = {name: each.base for name, each in present.items() if not isinstance(each, BESIDE)}
    with grads_kept(model):
        layers, rows = read_layers(model, folder, layer, own if present else adaptable_layers(model), present)
        if not present:
            wrap(model, layers, lambda name, _: layers[name])
        with torch.no_grad():
            for tensor, start, values in rows:
                tensor[start:] = values
        return model


def read_layers(
    model: nn.Module,
    source: Path | tuple[dict[str, Tensor], dict[str, Any]],
    layer: Callable[..., nn.Module] | None,
    bases: dict[str, nn.Module],
    present: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[tuple[Tensor, int, Tensor]]]:
    """The layers of an adapter with its values in them: those that are present, or new ones that are not in the model.

    Args:
        model: that of the bases.
        source: a folder, or what `as_file` returns.
        layer: as for `load_adapter`, which says what is refused.
        bases: every layer that may have an adapter.
        present: the model's adapters, which get all values or none; without them, new ones are made.

    Returns:
        the layers; and what else the model is to take over: a weight, from which row on, and those last rows.
    """
    present = present or {}
    own = {name: each for name, each in present.items() if not isinstance(each, BESIDE)}
    kinds = {"LORA", *(settings["peft_type"] for each in own.items() for settings in settings_of(*each).values())}
    frozen = base_tensors(model, bases | {name: each.base for name, each in present.items()})
    layers: dict[str, Any] = {}
    keys: dict[str, dict[str, str]] = {}  # layer -> what follows its name in the file -> the whole name there

    def check(header: dict[str, Tensor], file: dict[str, Any], metadata: dict[str, str]) -> None:
        config = as_config(file, layer)
        parameters = parameters_of(model, config)
        bases.update({name: module for name, module in plain_modules(model) if name in parameters})
        names = {key: own_name(key, bases) for key in header}
        check_vocabulary(model, {names[key]: tensor for key, tensor in header.items()}, metadata)
        chosen = chosen_by(config, bases, parameters)
        lora, beside = _makers(model, config, chosen, present)
        apart = {key: name for key, name in names.items() if any(is_inside(name, outer) for outer in beside)}
        where = {name: base for name, base in bases.items() if not any(is_inside(name, outer) for outer in beside)}
        rest = {key: tensor for key, tensor in header.items() if key not in apart}
        keys.update(by_layer(rest, file, config, where, parameters, chosen, frozen))
        if left := sorted(own.keys() - keys.keys()):
            raise AdapterError(f"expected a file for all adapters of the model, got none for {left[0]!r}")
        for name, parts in keys.items():
            layers[name] = lora[name](bases[name])
            _check(layers[name], name, {part: header[k] for part, k in parts.items()}, file, config, chosen[name])
        modules = dict(named_modules(model))
        for name, make in beside.items():
            layers[name] = make(modules[name])
            inside = {whole: key for key, whole in apart.items() if is_inside(whole, name)}
            keys[name] = beside_keys(name, layers[name], inside, header, frozen)

    if isinstance(source, Path):
        tensors, _ = read_adapter(source, kinds if layer is None else None, check)
    else:
        tensors, file = source
        check_finite(tensors)
        check(tensors, file, {})
    taken = {key for parts in keys.values() for key in parts.values()}
    rows = [new_rows(key, tensors[key], frozen[key]) for key in (tensors.keys() & frozen.keys()) - taken]
    _fill(layers, {name: {part: tensors[key] for part, key in parts.items()} for name, parts in keys.items()})
    return layers, [(tensor, start, values) for tensor, start, values in rows if len(values)]


def _makers(
    model: nn.Module, config: LoRAConfig, chosen: Mapping[str, tuple[str, ...]], present: Mapping[str, Any]
) -> tuple[dict[str, Make], dict[str, Make]]:
    """What makes the adapters of LoRA, and those beside it; of a model that has them, those themselves."""
    try:
        if not present:
            return plan(model, config, chosen)
        check_beside(model, config, present)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    lora, beside = dict[str, Make](), dict[str, Make]()
    for name, adapter in present.items():
        (beside if isinstance(adapter, BESIDE) else lora)[name] = partial(_itself, adapter)
    return lora, beside


def _itself(adapter: nn.Module, _: nn.Module) -> nn.Module:
    return adapter


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
        check_shape(got[part], tuple(tensor.shape), part, name)


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
