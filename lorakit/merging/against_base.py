"""A saved adapter against its base: how large each update is, where it points, and what four bits would leave of it."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._progress import Progress
from lorakit.layers.bases import dense_weight, weight_of
from lorakit.layers.experts import is_transposed
from lorakit.layers.lowrank import count_intruders
from lorakit.layers.nf4 import dequantize, quantize
from lorakit.merging.inspection import Factors, Inspection, Layer, read_factors
from lorakit.models.load import _find_folder, load_model
from lorakit.models.tensor_file import STORED, tensor_file

Read = Callable[[Layer], Tensor | None]  # a layer's weight (d_out, d_in) in float32, None if the base has no such layer


@dataclass(frozen=True)
class AgainstBase:
    """One update dW against its weight W, in Frobenius norms; DoRA's dW is what it makes of W, less W."""

    name: str
    weight_norm: float
    update_norm: float
    intruders: int | None  # None if they were not asked for
    nf4_error: float  # of W, rounded to NF4 in blocks of 64

    @property
    def relative_norm(self) -> float:
        """The update's norm over the weight's."""
        return self.update_norm / self.weight_norm if self.weight_norm else float("inf")

    @property
    def nf4_share(self) -> float:
        """The error of four bits over the update: above 1, the rounding moves W further than the update does."""
        return self.nf4_error / self.update_norm if self.update_norm else float("inf")


@dataclass(frozen=True)
class Compared:
    """All layers that the base has, and what is wrong with the others."""

    base: str
    k: int
    epsilon: float
    layers: tuple[AgainstBase, ...]
    misfits: tuple[str, ...]


@torch.no_grad()
def compare_with_base(
    found: Inspection, base: str | os.PathLike, k: int = 10, epsilon: float = 0.5, show: bool = False
) -> Compared:
    """Compares every update of an adapter with the weight that it changes.

    The weights are read from the base's safetensors one by one where they have the adapter's names and shapes; else,
    and for experts, the model is loaded.

    Args:
        found: what `inspect_adapter` says.
        base: as for `load_model`.
        k, epsilon: as for `count_intruders`; k = 0 leaves them out, which is quicker by far.
        show: draws a progress bar.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as `load_model`.
    """
    factors, layers, misfits = read_factors(found.folder), [], []
    with ExitStack() as stack:
        read = _reader(found, base, stack)
        bar = stack.enter_context(Progress(len(found.layers), "comparing", "layer", show))
        for layer in found.layers:
            bar.update()
            weight, parts = read(layer), _own(factors[layer.whole], layer)
            if weight is None:
                misfits.append(f"the base has no {layer.name}")
            elif tuple(weight.shape) != layer.shape:
                misfits.append(
                    f"{layer.name} is {_size(weight.shape)} in the base, {_size(layer.shape)} in the adapter"
                )
            elif parts.magnitude is not None and parts.magnitude.numel() != len(weight):
                misfits.append(f"{layer.name} has {parts.magnitude.numel()} magnitudes for {len(weight)} outputs")
            elif layer.norm is not None:
                layers.append(_compare(layer, weight, parts, k, epsilon))
    return Compared(os.fspath(base), k, epsilon, tuple(layers), tuple(misfits))


def _own(factors: Factors, layer: Layer) -> Factors:
    return factors if layer.expert is None else Factors(factors.B[layer.expert], factors.A[layer.expert])


def _compare(layer: Layer, weight: Tensor, factors: Factors, k: int, epsilon: float) -> AgainstBase:
    delta = layer.scale * (factors.B.float() @ factors.A.float())
    if factors.magnitude is not None:
        moved = weight + delta
        delta = factors.magnitude.float().view(-1, 1) * nn.functional.normalize(moved, dim=1) - weight
    rounded = dequantize(*quantize(weight), tuple(weight.shape))
    return AgainstBase(
        layer.name,
        weight.norm().item(),
        delta.norm().item(),
        count_intruders(weight, delta, k, epsilon) if k else None,
        (weight - rounded).norm().item(),
    )


def _reader(found: Inspection, base: str | os.PathLike, stack: ExitStack) -> Read:
    """What reads one weight after the other: out of the files if they fit, else out of the loaded model."""
    if not found.settings.get("fan_in_fan_out"):  # GPT-2's files hold their weights the other way round
        files = _open(_find_folder(base), stack)
        if all(_holds(files, layer) for layer in found.layers):
            return lambda layer: _turned(files[f"{layer.name}.weight"].get_tensor(f"{layer.name}.weight"), layer)
    model, _ = load_model(base)
    return lambda layer: _of_model(model, layer)


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Key -> the open file that has it; only headers are read."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(tensor_file(path))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _holds(files: Mapping[str, Any], layer: Layer) -> bool:
    key = f"{layer.name}.weight"
    if key not in files or layer.expert is not None:
        return False
    stored = files[key].get_slice(key)
    shape = layer.shape[::-1] if layer.embedding else layer.shape
    return stored.get_dtype() in STORED and tuple(stored.get_shape()) == shape


def _of_model(model: nn.Module, layer: Layer) -> Tensor | None:
    try:
        if layer.expert is not None:
            return _of_expert(model, layer.whole, layer.expert)
        module = model.get_submodule(layer.name)
        if layer.embedding:
            return _turned(weight_of(module).detach(), layer)
        return dense_weight(module, torch.float32).flatten(1)
    except (AttributeError, ValueError, IndexError):
        return None


def _of_expert(model: nn.Module, name: str, number: int) -> Tensor:
    module = model.get_submodule(name.rpartition(".")[0])
    stack = module.get_parameter(name.rpartition(".")[2]).detach()
    weight = stack.view(-1, *stack.shape[-2:])[number]
    return (weight.T if stack.ndim > 2 and is_transposed(module) else weight).float()


def _turned(weight: Tensor, layer: Layer) -> Tensor:
    return (weight.T if layer.embedding else weight).float()


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
