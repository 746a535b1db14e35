"""The two files of an adapter in PEFT's format, read without trust: safetensors and JSON, never a pickle.

Names and defaults follow PEFT 0.21 (`peft.LoraConfig`, `peft.utils.save_and_load`).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from xxhash import xxh3_128

from lorakit._atomic import locked, write_atomically
from lorakit._words import shortened
from lorakit.layers.config import PLAIN, LoRAConfig
from lorakit.models.tensor_file import STORED, tensor_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKSUM = "lorakit_xxh3"  # a field of the safetensors header, which PEFT ignores; it finds damage, not forgery
# Of an adapter that is saved over another one, the weights' header carries the new settings and a checksum of the file
# of settings before it: the weights' new name is the switch, whether or not the settings' new name came after it.
SETTINGS, REPLACED = "lorakit_config", "lorakit_replaced_xxh3"
VOCABULARY = "lorakit_vocabulary"  # how many tokens the adapter's model had
EDITABLE = ("base_model_name_or_path", "revision", "task_type", "inference_mode")  # settings outside the checksum

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # starts that keep the base's weights
MAX_SETTINGS = 1 << 24  # bytes; PEFT's files have a few thousand
Check = Callable[[dict[str, Tensor], dict[str, Any], dict[str, str]], object]


class AdapterError(ValueError):
    """A file that is damaged, is not plain LoRA, or does not fit the model; the model is left untouched."""

    def __init__(self, message: str):
        super().__init__(shortened(message, 1000))  # a file's names and settings may have any length


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], further: Mapping[str, str] | None = None
) -> None:
    """Writes both files into the folder, which is made if missing, with a checksum over both, and `further` metadata.

    A reader, and whoever comes after a kill, finds the adapter that was there or the new one, never half of each.
    """
    check_finite(tensors)
    metadata = {"format": "pt", CHECKSUM: digest(tensors, config), **(further or {})}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        before = (folder / CONFIG).read_bytes() if (folder / CONFIG).is_file() else None
        if before is not None and before != text.encode():
            metadata |= {SETTINGS: text, REPLACED: xxh3_128(before).hexdigest()}
        write_atomically(
            {folder / WEIGHTS: lambda path: save_file(tensors, path, metadata), folder / CONFIG: text.encode()}
        )


def read_adapter(
    folder: Path, kinds: Container[str] | None = ("LORA",), check: Check = lambda *_: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads both files: the settings first, then the names and shapes, and the tensors only if all of that is right.

    Args:
        folder: holds both files.
        kinds: the methods that are welcome, as `peft_type` names them; None for any.
        check: called before a tensor is read, with what the file says of them (tensors with shapes and dtypes, on the
            device "meta"), the settings, and the metadata of the tensors' header; it raises what is wrong.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: a file is damaged, or the configuration is of another method or has settings out of range.
    """
    tensors, config, checksum = read_both(folder, lambda config: _check_settings(config, kinds), check)
    if checksum is not None and checksum != digest(tensors, config):
        raise AdapterError(f"expected the files as they were saved, got another checksum: {folder} was altered")
    check_finite(tensors)
    return tensors, config


def read_both(
    folder: Path,
    look: Callable[[dict[str, Any]], None] = lambda config: None,
    check: Check = lambda *_: None,
) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Tensors, settings and checksum of one adapter, though somebody may save another over it meanwhile.

    `look` sees the settings first, then `check` also what the file says of its tensors; only then they are read.
    """
    text = _read_bytes(folder / CONFIG)
    while True:
        with _opened(folder / WEIGHTS) as file:
            again = _read_bytes(folder / CONFIG)
            if again == text:  # else somebody has saved another adapter over it meanwhile
                metadata = file.metadata() or {}
                if metadata.get(REPLACED) == xxh3_128(text).hexdigest():
                    text = metadata.get(SETTINGS, "").encode()
                config = _parse(text, folder / CONFIG)
                look(config)
                header = {key: _described(key, file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
                check(header, config, metadata)
                return {key: file.get_tensor(key) for key in header}, config, metadata.get(CHECKSUM)
        text = again


def _check_settings(config: dict[str, Any], kinds: Container[str] | None) -> None:
    if not isinstance(config.get("peft_type"), str) or (kinds is not None and config["peft_type"] not in kinds):
        raise AdapterError(
            f"expected plain LoRA (peft_type 'LORA'), got {config.get('peft_type')!r}; for a layer of your own, give "
            "load_adapter its class: layer=..."
        )
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS or not isinstance(start, bool | str | None):
        raise AdapterError(f"expected a start that keeps the base's weights, got init_lora_weights = {start!r}")
    as_config(config)


def as_config(file: Mapping[str, Any], layer: Callable[..., nn.Module] | None = None) -> LoRAConfig:
    """What an adapter_config.json means, whatever its layers started from.

    Args:
        file: of plain LoRA or DoRA; or of a layer of the reader's own, whose further settings are its keywords.
        layer: that layer, None for LoRA and DoRA.

    Raises:
        AdapterError: a setting is not read here, or out of range.
    """
    own: dict[str, Any] = {}
    if file["peft_type"] != "LORA":
        own = {key: value for key, value in file.items() if key not in PLAIN and key != "bias"}
        file = {key: value for key, value in file.items() if key not in own} | {"peft_type": "LORA"}
    try:
        config = LoRAConfig.from_peft({**file, "init_lora_weights": True})
        return replace(config, layer=config.layer if layer is None else layer, settings={} if layer is None else own)
    except ValueError as error:
        raise AdapterError(str(error)) from None


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"expected an adapter's {CONFIG}, got none at {path}")
    if path.stat().st_size > MAX_SETTINGS:
        raise AdapterError(f"expected JSON in {path}, got a file of {path.stat().st_size:,} bytes")
    return path.read_bytes()


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text.decode(), object_pairs_hook=_each_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"expected JSON in {path}, got a damaged file: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"expected a JSON object in {path}, got {type(config).__name__}")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r} is there {times} times")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file of tensors, of which only the header has been read."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").exists()
        hint = "; adapter_model.bin is a pickle, which could run code: save it again as safetensors" if pickled else ""
        raise FileNotFoundError(f"expected an adapter's {WEIGHTS}, got none at {path}{hint}")
    with tensor_file(path, AdapterError) as file:
        yield file


def _described(key: str, part: Any) -> Tensor:
    """A tensor with the shape and dtype of one that has not been read."""
    if (stored := part.get_dtype()) not in STORED:
        raise AdapterError(f"expected tensors of {', '.join(STORED)}, got {stored} for {key!r}")
    try:
        return torch.empty(part.get_shape(), dtype=STORED[stored], device="meta")
    except (RuntimeError, OverflowError, TypeError):
        raise AdapterError(f"expected a shape that torch has, got {part.get_shape()} for {key!r}") from None


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuses NaN and infinity.

    Raises:
        AdapterError: there is one.
    """
    for key, tensor in tensors.items():
        fast = tensor.numel() and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        finite = all(map(math.isfinite, tensor.aminmax())) if fast else tensor.isfinite().all()  # NaN is both
        if not finite:
            raise AdapterError(f"expected finite values, got NaN or infinity in {key!r}")


def check_shape(tensor: Tensor, shape: tuple[int, ...], part: str, name: str) -> None:
    """Refuses a file's tensor that is not of this shape.

    Raises:
        AdapterError: it is of another, or holds no floats.
    """
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise AdapterError(f"expected floats of shape {shape} for {part} of layer {name!r}, got {tuple(tensor.shape)}")


def digest(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """A checksum of the tensors and of the settings, less those that people edit by hand."""
    fixed = {key: value for key, value in config.items() if key not in EDITABLE}
    digest = xxh3_128(json.dumps(fixed, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
