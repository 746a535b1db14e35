"""What a saved adapter is, from its two files alone: settings, layers, each update's size and rank, what is wrong."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lorakit.layers.config import LoRAConfig
from lorakit.layers.lora import checked_scale
from lorakit.layers.lowrank import effective_rank, factored_singular_values
from lorakit.merging.serving import Extra, Served, served_by
from lorakit.models.peft_files import CONFIG, WEIGHTS, AdapterError, _digest, _read_both, as_config
from lorakit.models.save_load import PREFIX

FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what rank and scale follow from
EXTRA_KINDS = (  # what a tensor that is no factor is: the first part of a name that its key has
    ("trainable_tokens_delta", "token rows"),
    ("lora_B.bias", "bias of B"),
    (".bias", "bias"),
    (".base_layer.", "the base's own weight"),
    ("embed", "whole embeddings"),
    ("lm_head", "whole output head"),
)


@dataclass(frozen=True)
class Layer:
    """One layer's update `s B A`: its size is the Frobenius norm, None where a factor is not finite."""

    name: str
    kind: str  # the last part of its name
    shape: tuple[int, int]  # d_out and d_in; of an embedding its width and its tokens
    rank: int
    alpha: float
    scale: float
    norm: float | None
    effective_rank: float | None  # 0 of an update that is zero
    embedding: bool = False

    @property
    def idle(self) -> bool:
        """True if the update is zero."""
        return self.norm == 0


@dataclass(frozen=True)
class Inspection:
    """What the two files of an adapter hold; `layers` is empty for methods other than LoRA."""

    folder: str
    method: str  # LoRA, rsLoRA, DoRA, rsLoRA with DoRA, or PEFT's name of another method
    saved_by: str
    base: str | None  # as the settings name it
    bytes: int  # of both files
    dtypes: dict[str, int]  # dtype -> numbers stored in it
    numbers: int
    settings: dict[str, Any]  # those that say something
    layers: tuple[Layer, ...]
    extra: tuple[Extra, ...]
    not_finite: tuple[str, ...]  # keys
    zero: tuple[str, ...]  # keys
    problems: tuple[str, ...]
    served: tuple[Served, ...]

    @property
    def idle(self) -> list[str]:
        """Names of the layers whose update is zero."""
        return [layer.name for layer in self.layers if layer.idle]


@dataclass(frozen=True)
class Factors:
    """One layer's factors as the file holds them, as matrices, and its magnitudes if it is DoRA's."""

    B: Float[Tensor, "d_out rank"]
    A: Float[Tensor, "rank d_in"]
    magnitude: Tensor | None = None


def inspect_adapter(folder: str | os.PathLike) -> Inspection:
    """Says what a saved adapter is, lorakit's or PEFT's, without its base; no matrix of a layer's size is built.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`. LoRA, rsLoRA and DoRA are taken apart; of
            other methods the settings and the numbers are told.

    Returns:
        what the files hold. Values that are not finite are told, not refused.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: a file is damaged, or has settings out of range.
    """
    folder = Path(folder)
    tensors, file, checksum = _read_both(folder)
    if not isinstance(file.get("peft_type"), str):
        raise AdapterError(
            f"expected an adapter's method as peft_type in {folder / CONFIG}, got {file.get('peft_type')!r}"
        )
    not_finite = tuple(key for key, tensor in tensors.items() if not tensor.double().isfinite().all())
    factors, rest, problems = _sort(tensors, file)
    layers = tuple(_layer(name, each, file, name_is_embedding) for (name, name_is_embedding), each in factors.items())
    problems += [
        f"{layer.name} has rank {layer.rank}, not {wanted} as its settings say"
        for layer in layers
        if layer.rank != (wanted := _config(file).at(layer.name)[0])
    ]
    if checksum is not None and checksum != _digest(tensors, file):
        problems.append("the files are not as lorakit saved them: another checksum")
    extra = tuple(Extra(key, _extra_kind(key, file), tensor.numel()) for key, tensor in rest.items())
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return Inspection(
        folder=str(folder),
        method=_method(file),
        saved_by="lorakit"
        if checksum is not None
        else f"PEFT {file['peft_version']}"
        if file.get("peft_version")
        else "?",
        base=file.get("base_model_name_or_path") or None,
        bytes=sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG)),
        dtypes=dict(dtypes),
        numbers=dtypes.total(),
        settings={key: value for key, value in sorted(file.items()) if value not in (None, False, "", [], {})},
        layers=layers,
        extra=extra,
        not_finite=not_finite,
        zero=tuple(key for key, tensor in tensors.items() if not tensor.any()),
        problems=tuple(problems),
        served=tuple(served_by(file, [each.rank for each in layers], [each.scale for each in layers], extra)),
    )


def read_factors(folder: str | os.PathLike) -> dict[str, Factors]:
    """The factors of a saved LoRA or DoRA by the name of the layer, as its file holds them.

    Raises:
        FileNotFoundError, AdapterError: as `inspect_adapter`.
    """
    tensors, file, _ = _read_both(Path(folder))
    return {name: each for (name, _), each in _sort(tensors, file)[0].items()}


def _sort(
    tensors: Mapping[str, Tensor], file: Mapping[str, Any]
) -> tuple[dict[tuple[str, bool], Factors], dict[str, Tensor], list[str]]:
    """Factors by (name, whether it is an embedding), the other tensors, and what does not fit together."""
    if file.get("peft_type") != "LORA":
        return {}, dict(tensors), []
    parts: dict[tuple[str, bool], dict[str, Tensor]] = {}
    rest, problems = dict(tensors), []
    for key, tensor in tensors.items():
        if (match := FACTOR.fullmatch(key)) and tensor.ndim >= 2:
            name = (match[1].removeprefix(PREFIX), match[2] is not None)
            parts.setdefault(name, {})[match[3]] = tensor.flatten(1)  # a convolution's factors are products as well
            del rest[key]
    found = {}
    for (name, embedding), pair in parts.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            problems.append(
                f"{name} has no pair of factors: {', '.join(f'{k} {tuple(v.shape)}' for k, v in pair.items())}"
            )
            continue
        magnitudes = [key for key in rest if key.removeprefix(PREFIX).startswith(f"{name}.lora_magnitude_vector")]
        magnitude = rest.pop(magnitudes[0]) if magnitudes and file.get("use_dora") else None
        if file.get("use_dora") and magnitude is None:
            problems.append(f"{name} has no magnitudes, which DoRA needs")
        found[name, embedding] = Factors(pair["B"], pair["A"], magnitude)
    return found, rest, problems


def _layer(name: str, factors: Factors, file: Mapping[str, Any], embedding: bool) -> Layer:
    config = _config(file)
    rank, alpha = factors.A.shape[0], config.at(name)[1]
    scale = checked_scale(rank, alpha, scale_rule=config.scale_rule)
    B, A = factors.B.double(), factors.A.double()
    norm = effective = None
    if B.isfinite().all() and A.isfinite().all():
        values = abs(scale) * factored_singular_values(B, A)
        norm = values.norm().item()
        effective = effective_rank(values) if norm > 0 else 0.0
    shape = (B.shape[0], A.shape[1])
    return Layer(name, name.rsplit(".", 1)[-1], shape, rank, alpha, scale, norm, effective, embedding)


def _config(file: Mapping[str, Any]) -> LoRAConfig:
    """The settings that rank and scale follow from, whatever the others are."""
    plain = {key: file[key] for key in SETTINGS if key in file}
    return as_config({"peft_type": "LORA", "target_modules": "all-linear", **plain})


def _method(file: Mapping[str, Any]) -> str:
    if file["peft_type"] != "LORA":
        return file["peft_type"]
    names = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if file.get(key)]
    return " with ".join(names) or "LoRA"


def _extra_kind(key: str, file: Mapping[str, Any]) -> str:
    if file["peft_type"] != "LORA":
        return file["peft_type"]
    saved = file.get("modules_to_save") or []
    if any(f".{name}." in key for name in saved):
        return "whole layer (modules_to_save)"
    return next((kind for part, kind in EXTRA_KINDS if part in key), "unknown")
