"""Any causal language model from one function: the course's, a local folder's, or a hub's."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit._optional import need, quiet
from lorakit._paths import as_path
from lorakit._words import one_line
from lorakit.layers.bases import FLOATS
from lorakit.models.download import MODELS, fetch_model
from lorakit.models.tensor_file import tensor_file

INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several


def load_model(
    name_or_path: str | os.PathLike = "smollm2", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.nn.Module, Any]:
    """Loads a causal language model, in eval mode, and its tokenizer.

    The tokenizer pads on the right, as training wants it. Before generating for a batch of prompts of different
    lengths, set `tokenizer.padding_side = "left"`.

    Args:
        name_or_path: a name in `MODELS`, a folder with `config.json` and safetensors weights, or a hub id such as
            `"HuggingFaceTB/SmolLM2-360M-Instruct"`; what the hub's cache already holds is loaded without a network.
        dtype: of the weights: float32, bfloat16, float16 or float64.
        device: `"cpu"`, `"cuda"`, or `"auto"` for a GPU if there is one.

    Raises:
        ValueError: unknown name, unusable dtype or device, a download with a wrong checksum, damaged files, or weights
            that are not all of this model's and of no other: nothing is made up in their place.
        FileNotFoundError: no such folder, or no model in it.
        ConnectionError: in no cache, and the download failed.
        ImportError: transformers is not installed.
    """
    if dtype not in FLOATS:
        raise ValueError(f"expected dtype in {FLOATS}, got {dtype}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"expected device 'cpu' or 'auto', because torch sees no GPU here, got {device!r}")
    folder = _find_folder(name_or_path)
    held = _check_files(folder)
    transformers = need("transformers")
    safe = {"trust_remote_code": False}
    with quiet():
        with _reading("a config", folder):
            config = transformers.AutoConfig.from_pretrained(folder, **safe)
        check_causal(config, str(folder))
        with _reading("a tokenizer", folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        with _reading("a model", folder):
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **safe,
            )
    if problem := _find_strangers(model, found, held):
        raise ValueError(f"expected the weights of {type(model).__name__} in {folder}, {problem}")
    return model.to(device).eval(), tokenizer


@contextmanager
def _reading(what: str, folder: Path) -> Iterator[None]:
    """Says in one line whatever the libraries make of files that they cannot read."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"expected {what} in {folder}, got {type(error).__name__}: {one_line(error)}") from error


def check_causal(config: Any, name: str) -> None:
    """Refuses the config of what is no causal language model; of Whisper, a decoder alone would be made.

    Raises:
        ValueError: says what kind of model it is.
    """
    known = type(config) in need("transformers").MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"expected a causal language model, got {name!r}, a config of {config.model_type!r}")


def _find_folder(name_or_path: str | os.PathLike) -> Path:
    """From a short name, a path or a hub id to a folder that holds a model."""
    path = as_path("a model (or its name)", name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if name in MODELS:
        return fetch_model(name)
    means_path = isinstance(name_or_path, Path) or name.startswith((".", "~")) or path.is_absolute()
    if means_path or path.exists() or "\\" in name or name.count("/") > 1:
        if problem := _find_problem(path):
            raise FileNotFoundError(f"expected a folder with a model, got {name!r}: {problem}")
        return path
    return _find_hub_folder(name) if "/" in name else fetch_model(name)


def _find_problem(folder: Path) -> str | None:
    """What keeps a folder from being loaded, None if nothing does."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not any(folder.glob("*.safetensors")):
        return "it has no safetensors weights (pickled ones, *.bin or *.pt, can run code and are refused)"
    return None


def _find_hub_folder(hub_id: str) -> Path:
    """The folder of a hub model in the hub's own cache; the hub itself is asked only if it is not there."""
    hub, files = need("huggingface_hub"), ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    for offline in (True, False):
        try:
            folder = Path(hub.snapshot_download(hub_id, allow_patterns=files, local_files_only=offline))
            problem = _find_problem(folder)
        except OSError as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]  # the first says it
        if problem is None:
            return folder
    raise ConnectionError(
        f"{hub_id!r} is no folder here, is not in the hub's cache, and the hub did not give it: {problem}\n"
        f"Check the spelling and the connection, or use a local folder or a model without a hub: {sorted(MODELS)}"
    )


def _check_files(folder: Path) -> dict[str, tuple[str, int]]:
    """Refuses files that are damaged or not there; says of every tensor that they hold its dtype and dimensions."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"expected a base model alone, got an adapter_config.json with it in {folder}: transformers would load "
            "that adapter, or another base, in its place; keep adapters in folders of their own, for load_adapter"
        )
    held: dict[str, tuple[str, int]] = {}
    for path in _weight_files(folder):
        try:
            with tensor_file(path) as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                held |= {key: (each.get_dtype(), len(each.get_shape())) for key, each in slices.items()}
        except FileNotFoundError:
            raise FileNotFoundError(f"expected the weights' file {path}, which {INDEX} names, got none") from None
    return held


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the one with the usual name, else those of the index, else what there is."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"expected a weight_map of tensors and files, got a damaged {folder / INDEX}") from None


def _find_strangers(model: Any, found: dict[str, Any], held: dict[str, tuple[str, int]]) -> str | None:
    """How the files' weights are not the model's, None if they are; transformers has taken out what may be missing.

    A tensor that the model has no place for may belong to a part beside it, such as a classifier's head or a tower for
    images. Within a block or a layer that the model has, it says that the weights are of another model.
    """
    for what, names in (
        ("got none for", found["missing_keys"]),
        ("got other shapes for", [name for name, *_ in found["mismatched_keys"]]),
        ("got none that the files' other tensors fit, such as", _within(model, found["unexpected_keys"], held)),
    ):
        if names := sorted(names):
            words = f"{what} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} ({len(names)} in all)"
            wrapped = any(".base." in name for name in found["unexpected_keys"])
            return words + (": it was saved with adapters in it; merge() or remove() them first" if wrapped else "")
    return None


def _within(model: Any, names: set[str], held: dict[str, tuple[str, int]]) -> list[str]:
    """Those of the names that are weights inside of one of the model's blocks or layers."""
    modules = dict(model.named_modules())
    inside = []
    for name in names:
        steps = name.split(".")
        around = [modules.get(".".join(steps[:end])) for end in range(1, len(steps))]
        known = any(m is not None and (isinstance(m, torch.nn.ModuleList) or not any(m.children())) for m in around)
        dtype, dimensions = held.get(name, ("F32", 1))
        if known and dimensions and dtype.startswith(("F", "BF")):  # no mask or counter of older files
            inside.append(name)
    return inside
