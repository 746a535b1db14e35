"""The two files of an adapter in PEFT's format, read without trust: safetensors and JSON, never a pickle.

Names and defaults follow PEFT 0.21 (`peft.LoraConfig`, `peft.utils.save_and_load`).
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_128

from lorakit._atomic import write_atomically

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKSUM = "lorakit_xxh3"  # a field of the safetensors header, which PEFT ignores; it finds damage, not forgery
EDITABLE = ("base_model_name_or_path", "revision", "task_type", "inference_mode")  # settings outside the checksum

# Settings of a LoraConfig that leave a trained layer plain LoRA or DoRA, or that adapter.py reads.
PLAIN = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # starts that keep the base's weights


def _is_pattern(value: Any) -> bool:
    """True for a regular expression or a list of names."""
    return bool(re.compile(value) if isinstance(value, str) else all(isinstance(name, str) for name in value))


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


CHECKS = {
    "target_modules": lambda value: value and _is_pattern(value),
    "exclude_modules": lambda value: not value or _is_pattern(value),
    "layers_pattern": lambda value: not value or _is_pattern("|".join(_as_list(value))),
    "layers_to_transform": lambda value: value is None or {type(i) for i in _as_list(value)} <= {int},
    "rank_pattern": lambda value: not value or _is_pattern("|".join(value.keys())),
    "alpha_pattern": lambda value: not value or _is_pattern("|".join(value.keys())),
    "lora_dropout": lambda value: value is None or 0 <= value < 1,
}


class AdapterError(ValueError):
    """A file that is damaged, is not plain LoRA, or does not fit the model; the model is left untouched."""


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes both files into the folder, which is made if missing, with a checksum over both."""
    _check_finite(tensors)
    metadata = {"format": "pt", CHECKSUM: _digest(tensors, config)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        {folder / WEIGHTS: lambda path: save_file(tensors, path, metadata), folder / CONFIG: text.encode()}
    )


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads both files and verifies what can be verified without a model.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: a file is damaged, or the configuration is neither plain LoRA nor DoRA.
    """
    config = _read_config(folder / CONFIG)
    tensors, checksum = _read_tensors(folder / WEIGHTS)
    if checksum is not None and checksum != _digest(tensors, config):
        raise AdapterError(f"expected the files as they were saved, got another checksum: {folder} was altered")
    _check_finite(tensors)
    return tensors, config


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected an adapter's {CONFIG}, got none at {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"expected JSON in {path}, got a damaged file: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        method = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"expected plain LoRA (peft_type 'LORA'), got {method!r}")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise AdapterError(f"expected a start that keeps the base's weights, got init_lora_weights = {start!r}")
    for key, value in config.items():
        if key not in PLAIN and value not in (None, False, "none", [], {}):
            raise AdapterError(f"expected plain LoRA, got {key} = {value!r}")
    for key, is_right in CHECKS.items():
        try:
            right = is_right(config.get(key))
        except (TypeError, AttributeError, re.error):
            right = False
        if not right:
            raise AdapterError(f"expected a valid {key}, got {config.get(key)!r}")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    if not path.is_file():
        pickled = path.with_suffix(".bin").exists()
        hint = "; adapter_model.bin is a pickle, which could run code: save it again as safetensors" if pickled else ""
        raise FileNotFoundError(f"expected an adapter's {WEIGHTS}, got none at {path}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata.get(CHECKSUM)  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"expected a safetensors file, got a damaged one at {path}: {error}") from None


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        fast = tensor.numel() and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        finite = all(map(math.isfinite, tensor.aminmax())) if fast else tensor.isfinite().all()  # NaN is both
        if not finite:
            raise AdapterError(f"expected finite values, got NaN or infinity in {key!r}")


def _digest(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """A checksum of the tensors and of the settings, less those that people edit by hand."""
    fixed = {key: value for key, value in config.items() if key not in EDITABLE}
    digest = xxh3_128(json.dumps(fixed, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
