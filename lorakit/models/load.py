"""Any causal language model from one function: the course's, a local folder's, or a hub's."""

import os
from pathlib import Path
from typing import Any

import torch

from lorakit._optional import need, quiet
from lorakit.models.download import MODELS, fetch_model

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        ValueError: unknown name, unusable dtype or device, or a download with a wrong checksum.
        FileNotFoundError: no such folder, or no model in it.
        ConnectionError: in no cache, and the download failed.
        ImportError: transformers is not installed.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"expected dtype in {FLOAT_DTYPES}, got {dtype}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"expected device 'cpu' or 'auto', because torch sees no GPU here, got {device!r}")
    folder = _find_folder(name_or_path)
    transformers = need("transformers")
    safe = {"trust_remote_code": False}
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
    return model.to(device).eval(), tokenizer


def _find_folder(name_or_path: str | os.PathLike) -> Path:
    """From a short name, a path or a hub id to a folder that holds a model."""
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
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
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem is None:
            return folder
    raise ConnectionError(
        f"{hub_id!r} is no folder here, is not in the hub's cache, and the hub did not give it: {problem}\n"
        f"Check the spelling and the connection, or use a local folder or a model without a hub: {sorted(MODELS)}"
    )
