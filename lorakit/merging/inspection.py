"""What a saved adapter is, from its two files alone: settings, layers, each update's size and rank, what is wrong."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lorakit._paths import as_path
from lorakit.layers.config import LoRAConfig
from lorakit.layers.experts import as_stacks
from lorakit.layers.lora import checked_scale
from lorakit.layers.lowrank import effective_rank, factored_singular_values
from lorakit.merging.serving import EXPERTS, Extra, Served, served_by
from lorakit.models.expert_files import told_by_file
from lorakit.models.file_layers import PREFIX
from lorakit.models.peft_files import CONFIG, WEIGHTS, AdapterError, as_config, digest, read_both
from lorakit.models.targets import is_target

FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what rank and scale follow from
EXTRA_KINDS = (  # what a tensor that is no factor is: the first part of a name that its key has
    ("trainable_tokens_delta", "token rows"),
    ("lora_B.bias", "bias of B"),
    (".bias", "bias"),
    (".lora_", EXPERTS),
    (".base_layer.", "the base's own weight"),
    ("embed", "whole embeddings"),
    ("lm_head", "whole output head"),
)


@dataclass(frozen=True)
class Layer:
    """One layer's or expert's update `s B A`: its size is the Frobenius norm, None where a factor is not finite."""

    name: str  # of an expert that of its parameter and a number, "experts.down_proj[3]"
    kind: str  # the last part of its name, of an expert two, without the number
    shape: tuple[int, int]  # d_out and d_in; of an embedding its width and its tokens
    rank: int
    alpha: float
    scale: float
    norm: float | None
    effective_rank: float | None  # 0 of an update that is zero
    embedding: bool = False
    expert: int | None = None  # its number

    @property
    def whole(self) -> str:
        """The name of the layer, or of the parameter that has all experts."""
        return self.name if self.expert is None else self.name.rpartition("[")[0]

    @property
    def idle(self) -> bool:
        """True if the update is zero."""
        return self.norm == 0


@dataclass(frozen=True)
class Inspection:
    """What the two files of an adapter hold; `layers` is empty for methods other than LoRA."""

    folder: str
    method: str  # LoRA, rsLoRA, DoRA, rsLoRA with DoRA, or PEFT's name of another method
    saved_by: str  # lorakit, or PEFT and its version
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
    """A layer's factors as the file holds them, as matrices, and its magnitudes if it is DoRA's; or all experts'."""

    B: Float[Tensor, "*experts d_out rank"]
    A: Float[Tensor, "*experts rank d_in"]
    magnitude: Tensor | None = None
    embedding: bool = False


def inspect_adapter(folder: str | os.PathLike) -> Inspection:
    """Says what a saved adapter is, lorakit's or PEFT's, without its base; no matrix of a layer's size is built.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`. LoRA, rsLoRA and DoRA are taken apart, down
            to each expert where the files tell them apart; of other methods the settings and the numbers are told.

    Returns:
        what the files hold. Values that are not finite are told, not refused.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: a file is damaged, or has settings out of range.
    """
    folder = as_path("an adapter's folder", folder)
    tensors, file, checksum = read_both(folder)
    if not isinstance(file.get("peft_type"), str):
        raise AdapterError(f"expected a method as peft_type in {folder / CONFIG}, got {file.get('peft_type')!r}")
    for key, kind in (("modules_to_save", list), ("base_model_name_or_path", str)):
        if not isinstance(file.get(key), kind | None):
            raise AdapterError(f"expected a {kind.__name__} as {key} in {folder / CONFIG}, got {file[key]!r}")
    factors, rest, problems = _sort(tensors, file)
    layers = tuple(layer for name, each in factors.items() for layer in _layers(name, each, file))
    problems += _wrong_ranks(layers, file)
    if checksum is not None and checksum != digest(tensors, file):
        problems.append("the files are not as lorakit saved them: another checksum")
    extra = tuple(Extra(key, _extra_kind(key, file), tensor.numel()) for key, tensor in rest.items())
    experts = [Extra(each.name, EXPERTS, 0) for each in layers if each.expert is not None]
    dtypes, ranks, scales = _dtypes(tensors), [each.rank for each in layers], [each.scale for each in layers]
    return Inspection(
        folder=str(folder),
        method=_method(file),
        saved_by="lorakit" if checksum is not None else f"PEFT {file.get('peft_version') or ''}".strip(),
        base=file.get("base_model_name_or_path") or None,
        bytes=sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG)),
        dtypes=dtypes,
        numbers=sum(dtypes.values()),
        settings={key: value for key, value in sorted(file.items()) if value not in (None, False, "", [], {})},
        layers=layers,
        extra=extra,
        not_finite=tuple(key for key, tensor in tensors.items() if not tensor.double().isfinite().all()),
        zero=tuple(key for key, tensor in tensors.items() if not tensor.any()),
        problems=tuple(problems),
        served=tuple(served_by(file, ranks, scales, [*experts, *extra])),
    )


def read_factors(folder: str | os.PathLike) -> dict[str, Factors]:
    """The factors of a saved LoRA or DoRA by the name of the layer, or of the experts' parameter, as its file has them.

    Raises:
        FileNotFoundError, AdapterError: as `inspect_adapter`.
    """
    tensors, file, _ = read_both(as_path("an adapter's folder", folder))
    return _sort(tensors, file)[0]


def _sort(
    tensors: Mapping[str, Tensor], file: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor], list[str]]:
    """Factors by the name of what they change, the other tensors, and what does not fit together."""
    if file.get("peft_type") != "LORA":
        return {}, dict(tensors), []
    parts: dict[tuple[str, bool], dict[str, str]] = {}  # the keys of A and B
    rest, problems, found = dict(tensors), [], {}
    for key, tensor in tensors.items():
        if (match := FACTOR.fullmatch(key)) and tensor.ndim >= 2:
            parts.setdefault((match[1].removeprefix(PREFIX), match[2] is not None), {})[match[3]] = key
    pairs: dict[str, Factors] = {}
    for (name, embedding), keys in parts.items():
        A, B = (tensors[keys[part]].flatten(1) if part in keys else None for part in "AB")  # a convolution's too
        if A is None or B is None or A.shape[0] != B.shape[1] or name in pairs:
            problems.append(f"{name} has no pair of factors, but {', '.join(keys.values())}")
        else:
            pairs[name] = Factors(B, A, embedding=embedding)
    told = _told(pairs, file)
    for name, pair in pairs.items():
        place, rows = told.get(name), pair.A.shape[0]
        plain = rows == _at(name, file)[0]
        if place is not None and not (plain and place[1] == "weight"):
            whole = ".".join(place)
            if rows % (rank := _at(whole, file)[0]):
                continue
            A, B = as_stacks(pair.A, pair.B, rows // rank)
            found[whole] = Factors(B, A)
        elif plain or not file.get("target_parameters"):
            magnitude = rest.pop(_magnitude(name, rest), None) if file.get("use_dora") else None
            if file.get("use_dora") and magnitude is None:
                problems.append(f"{name} has no magnitudes, which DoRA needs")
            found[name] = replace(pair, magnitude=magnitude)
        else:
            continue  # those of many experts in one, whose product is no update
        for key in parts[name, pair.embedding].values():
            del rest[key]
    return found, rest, problems


def _told(pairs: Mapping[str, Factors], file: Mapping[str, Any]) -> dict[str, tuple[str, str] | None]:
    """The parameters of `told_by_file`, none where the settings cannot be read."""
    try:
        config = as_config(file)
        shapes = {name: (each.B.shape[0], each.A.shape[1]) for name, each in pairs.items()}
        return told_by_file(shapes, config.target_parameters or (), lambda name: is_target(name, config.targets))
    except ValueError:
        return {}


def _magnitude(name: str, keys: Iterable[str]) -> str:
    ends = [f"{PREFIX}{name}.lora_magnitude_vector{end}" for end in ("", ".weight")]
    return next((key for key in ends if key in keys), ends[0])


def _wrong_ranks(layers: Iterable[Layer], file: Mapping[str, Any]) -> list[str]:
    pairs = [(each, _at(each.whole, file)[0]) for each in layers]
    return [f"{each.name} has rank {each.rank}, its settings say {rank}" for each, rank in pairs if each.rank != rank]


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers each dtype has."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts)


def _layers(name: str, factors: Factors, file: Mapping[str, Any]) -> list[Layer]:
    """One layer, or each expert."""
    rank, alpha = factors.A.shape[-2], _at(name, file)[1]
    scale = checked_scale(rank, alpha, scale_rule=_config(file).scale_rule)
    stacked = factors.A.ndim > 2
    kind, found = ".".join(name.split(".")[-1 - stacked :]), []
    for e, (B, A) in enumerate(zip(factors.B, factors.A, strict=True) if stacked else [(factors.B, factors.A)]):
        norm = effective = None
        if B.isfinite().all() and A.isfinite().all():
            values = abs(scale) * factored_singular_values(B.double(), A.double())
            norm = values.norm().item()
            effective = effective_rank(values) if norm > 0 else 0.0
        own, shape = f"{name}[{e}]" if stacked else name, (B.shape[0], A.shape[1])
        expert = e if stacked else None
        found.append(Layer(own, kind, shape, rank, alpha, scale, norm, effective, factors.embedding, expert))
    return found


def _at(name: str, file: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and alpha of a parameter, or of a layer, which the settings may name by its weight."""
    weight, parameters = f"{name}.weight", file.get("target_parameters") or ()
    by_weight = is_target(weight, parameters) and not is_target(name, parameters)
    return _config(file).at(weight if by_weight else name)


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
