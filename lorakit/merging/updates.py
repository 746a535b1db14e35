"""What adapters change, layer by layer, whatever their ranks, scale rules and files; read, and put back."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit._paths import as_path
from lorakit._words import short
from lorakit.layers.adapter import Adapter
from lorakit.layers.bases import linear_shape
from lorakit.layers.config import LoRAConfig
from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.experts import LoRAExperts, as_stacks, stack_shape
from lorakit.layers.lora import LoRALinear, checked_scale
from lorakit.layers.tied import Tied
from lorakit.models.expert_files import in_module, told_by_file
from lorakit.models.file_layers import EMBEDDING_FACTORS, FACTORS, PREFIX, without_wrappers
from lorakit.models.inject import adapters, check_plain, grads_kept, wrap
from lorakit.models.peft_files import AdapterError, as_config, check_finite, read_adapter
from lorakit.models.several import add_adapter
from lorakit.models.targets import is_target, plain_modules

# what a layer may have in a file: its factors, and the base's own tensors, as PEFT writes those of an output head
EACH = "|".join(map(re.escape, (*FACTORS, *EMBEDDING_FACTORS, "base_layer.weight", "base_layer.bias")))
Factors = tuple[Tensor, Tensor, float]  # A, B and the scale


@dataclass(frozen=True)
class Update:
    """The change of one weight by its factors: `dW = B A`, with the scale in B; `rank` may be any.

    Of a parameter, such as that of all experts, it is a stack of changes, one for each. An embedding is seen as the
    linear layer of one-hot inputs that it is: d_in counts its tokens.
    """

    B: Float[Tensor, "*stack d_out rank"]
    A: Float[Tensor, "*stack rank d_in"]

    @property
    def rank(self) -> int:
        """How many columns B has; the matrix's rank may be less."""
        return self.B.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """d_out and d_in; of a stack, the number of experts before them."""
        return *self.B.shape[:-1], self.A.shape[-1]

    @property
    def matrix(self) -> Float[Tensor, "*stack d_out d_in"]:
        """The change itself."""
        return self.B @ self.A


Updates = Mapping[str, Update]  # by the name of the layer, or of the parameter


def read_updates(source: nn.Module | str | os.PathLike) -> dict[str, Update]:
    """The changes that a model's adapters make, or those of a saved adapter, lorakit's or PEFT's, without its model.

    Args:
        source: a model with LoRA's or PiSSA's layers, on embeddings and experts too, or a folder; any rank, alpha and
            scale rule by layer. Of an output layer that follows an adapted embedding, its own change is told.

    Returns:
        layer -> its change, detached, in float32 or wider.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterError: the files are damaged, or hold something else than LoRA, or what overflows with its scale.
        ValueError: there are no adapters, or of another kind, such as DoRA's, whose change depends on the weight, or a
            folder does not say which parameter its factors are of; `load_adapter(model, folder)` knows.
    """
    found = _from_model(source) if isinstance(source, nn.Module) else _from_folder(source)
    if not found:
        raise ValueError("expected adapters, got none")
    return _updates(found)


def check_updates(updates: Any) -> None:
    """Refuses what does not hold updates by the names of layers.

    Raises:
        ValueError: says what was expected.
    """
    named = isinstance(updates, Mapping) and all(isinstance(name, str) for name in updates)
    if not named or not all(isinstance(update, Update) for update in updates.values()):
        raise ValueError(f"expected updates by the name of their layer, got {short(updates)}")


def attach(model: nn.Module, updates: Updates, name: str | None = None) -> nn.Module:
    """Puts updates into a plain model as adapters of scale 1, to be run, saved, merged or trained.

    Args:
        model: plain; or with named adapters, if these updates get a name too.
        updates: by the names of the model's layers and embeddings, or of parameters such as experts'.
        name: as for `add_adapter`: they answer when they are chosen. None for the model's only adapter.

    Returns:
        the same model.

    Raises:
        ValueError: the model carries adapters, lacks a layer, or has it in another shape. The model is then as it was.
    """
    if name is None:
        check_plain(model)
    check_updates(updates)
    modules = dict(plain_modules(model))
    places = {key: _place(modules, key) for key in updates}
    for key, update in updates.items():
        module, parameter = places[key]
        try:
            base = modules[module]
            shape: tuple[int, ...] = stack_shape(base, parameter) if parameter else _shape(base)
        except (KeyError, ValueError, AttributeError):
            raise ValueError(f"expected linear layers or embeddings of the model, got {key!r}") from None
        if shape != update.shape:
            raise ValueError(f"expected an update of shape {shape} for layer {key!r}, got {update.shape}")

    def make(module: str, base: nn.Module) -> nn.Module:
        own = {parameter: updates[key] for key, (of, parameter) in places.items() if of == module}
        layer: Any
        if "" in own:
            kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
            layer = kind(base, own[""].rank, float(own[""].rank))
            factors = {"": (layer.A, layer.B)}
        else:
            layer = LoRAExperts(base, {each: (update.rank, float(update.rank)) for each, update in own.items()})
            factors = {each: (layer.A[each], layer.B[each]) for each in own}
        with torch.no_grad():
            for each, (A, B) in factors.items():
                A.copy_(own[each].A)
                B.copy_(own[each].B)
        return layer

    chosen = dict.fromkeys(module for module, _ in places.values())
    if name is None:
        return wrap(model, chosen, make)
    with grads_kept(model):
        return add_adapter(model, name, {key: make(key, modules[key]) for key in chosen})


def _shape(base: nn.Module) -> tuple[int, int]:
    return LoRAEmbedding.fitting(base)[:2] if isinstance(base, nn.Embedding) else linear_shape(base)


def _place(modules: Mapping[str, nn.Module], name: str) -> tuple[str, str]:
    """A layer and "", or a module and the name of a parameter in it."""
    return (name, "") if name in modules else (name.rpartition(".")[0], name.rpartition(".")[2])


def _wide(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if one of the two is."""
    dtype = torch.promote_types(tensor.dtype, other.dtype)
    return tensor.detach().to(torch.promote_types(dtype, torch.float32))


def updates_of(name: str, layer: nn.Module) -> dict[str, Update]:
    """The changes that one adapter makes, by the name of its layer or of its parameters; as `read_updates`."""
    return _updates(_of_layer(name, layer))


def _updates(found: Mapping[str, Factors]) -> dict[str, Update]:
    return {name: Update(scale * _wide(B, A), _wide(A, B)) for name, (A, B, scale) in found.items()}


def _from_model(model: nn.Module) -> dict[str, Factors]:
    return {key: each for name, layer in adapters(model).items() for key, each in _of_layer(name, layer).items()}


def _of_layer(name: str, layer: Any) -> dict[str, Factors]:
    if isinstance(layer, LoRAExperts):
        return {f"{name}.{key}": (layer.A[key], layer.B[key], scale) for key, scale in layer.scales.items()}
    if isinstance(layer, Tied) and isinstance(layer.source, LoRAEmbedding):
        tied = layer.source.tied_tensors()
        return {name: (tied[FACTORS[0]], tied[FACTORS[1]], layer.source.scale)}
    if (
        not isinstance(layer, Adapter)
        or (settings := layer.peft_settings()).get("peft_type") != "LORA"
        or settings["use_dora"]
    ):
        raise ValueError(f"expected LoRA, got {type(layer).__name__} for layer {name!r}: its change is no s B A")
    A, B = (layer.peft_tensors()[part] for part in _names(isinstance(layer, LoRAEmbedding)))
    rule = "rslora" if settings["use_rslora"] else "lora"
    return {name: (A, B, checked_scale(A.shape[0], settings["lora_alpha"], scale_rule=rule))}


def _names(embedding: bool) -> tuple[str, str]:
    return EMBEDDING_FACTORS if embedding else FACTORS


def _from_folder(source: str | os.PathLike) -> dict[str, Factors]:
    folder, entries = as_path("an adapter's folder", source), dict[str, _Entry]()

    def check(header: dict[str, Tensor], file: dict[str, Any], _: dict[str, str]) -> None:
        if file.get("use_dora"):
            raise ValueError(f"expected LoRA, got DoRA in {folder.name}: its change depends on W; merge it instead")
        try:
            entries.update(_entries(header, as_config(file)))
        except ValueError as error:
            raise AdapterError(str(error)) from error

    tensors, file = read_adapter(folder, check=check)
    config, found = as_config(file), {}
    for name, each in entries.items():
        A, B = tensors[each.A], tensors[each.B]
        if each.experts:
            A, B = as_stacks(A, B, each.experts)
        found[name] = A, B, checked_scale(*config.at(each.settings), scale_rule=config.scale_rule)
    check_finite({f"{name}, times its scale": scale * _wide(B, A) for name, (A, B, scale) in found.items()})
    return found


@dataclass(frozen=True)
class _Entry:
    """One change in a file: the names of its factors there, of how many experts, and by which name its settings go."""

    A: str
    B: str
    experts: int  # 0 of a layer
    settings: str


def _entries(header: dict[str, Tensor], config: LoRAConfig) -> dict[str, _Entry]:
    """The changes in a file, once names, shapes and targets are seen to agree."""
    pairs, found = _pairs(header), dict[str, _Entry]()
    shapes = {name: (header[a].shape, header[b].shape) for name, (a, b) in pairs.items()}
    flat = {name: (B[0], A[1]) for name, (A, B) in shapes.items() if len(A) == len(B) == 2}

    def is_layer(name: str) -> bool:
        return is_target(name, config.targets) and config.keeps(name)

    told = told_by_file(flat, config.target_parameters or (), is_layer)
    for name, (a, b) in pairs.items():
        (A, B), whole, settings, experts = shapes[name], name, name, 0
        if not is_layer(name):
            place, source = told.get(name), _followed(name, pairs, shapes) if config.ensure_weight_tying else None
            if source is not None:
                settings = source
            elif place is not None and place[1] != "weight":  # which may be a layer's as well
                whole = settings = ".".join(place)
                experts = A[0] // config.at(settings)[0]
            elif config.target_parameters:
                raise AdapterError(
                    f"expected target_parameters that a file tells apart, got {in_module(name, '')[0]!r}, which only "
                    "its model does: read_updates(load_adapter(model, folder))"
                )
            else:
                raise AdapterError(f"expected layers that target_modules names, got {name!r}")
        rank = config.at(settings)[0]
        rows = rank * max(experts, 1)
        if len(A) != 2 or len(B) != 2 or A[0] != rows or B[1] != rows or not A[1] * B[0]:
            raise AdapterError(f"expected factors of rank {rank} for layer {name!r}, got {tuple(A)} and {tuple(B)}")
        found[whole] = _Entry(a, b, experts, settings)
    return found


def _pairs(header: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The names of A and B in the file, by that of their layer."""
    found: dict[str, dict[str, str]] = {}
    for key in header:
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({EACH})", without_wrappers(key), re.DOTALL)
        if match is None or match[2] in found.setdefault(match[1], {}):
            raise AdapterError(f"expected lora_A and lora_B of linear layers or embeddings, got {key!r}")
        found[match[1]][match[2]] = key
    pairs = {}
    for name, own in found.items():
        both = sorted(own.keys() - {"base_layer.weight", "base_layer.bias"})
        if both not in ([*FACTORS], [*EMBEDDING_FACTORS]):
            there = ", ".join(map(repr, own.values()))
            raise AdapterError(f"expected lora_A and lora_B of layer {name!r}, got {there}")
        pairs[name] = own[both[0]], own[both[1]]
    return pairs


def _followed(name: str, pairs: Mapping[str, tuple[str, str]], shapes: Mapping[str, Any]) -> str | None:
    """The embedding that an output layer with factors of these shapes follows."""
    A, B = shapes[name]
    sources = (each for each, (a, _) in pairs.items() if a.endswith(EMBEDDING_FACTORS))
    return next((each for each in sources if shapes[each] == (B[::-1], A[::-1])), None)
