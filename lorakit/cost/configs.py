"""A causal language model's config from whatever names it, without its weights."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

from lorakit._optional import need, quiet
from lorakit._paths import as_path
from lorakit._suggest import near_names
from lorakit._words import one_line
from lorakit.models.download import MODELS, fetch_model
from lorakit.models.load import check_causal


def _llama(width: int, inner: int, layers: int, heads: int, context: int = 4096, **more: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "max_position_embeddings": context, "vocab_size": 32_000}
    return {"model_type": "llama", **sizes, **more}


def _sized(
    kind: str, width: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, **more: Any
) -> dict:
    sizes = _llama(width, inner, layers, heads, num_key_value_heads=shared, **more)
    return sizes | {"model_type": kind, "vocab_size": vocabulary}


# Models by their published sizes. LLaMA: Touvron et al. 2023, arXiv:2302.13971, table 2. Llama 2: Touvron et al. 2023,
# arXiv:2307.09288, section 2.2; the inner widths are those of its weights. GPT-3: Brown et al. 2020, arXiv:2005.14165,
# table 2.1, here without its sparse attention, as OPT, which has its sizes and separate query and value matrices.
# Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, table 3. Mistral 7B: Jiang et al. 2023, arXiv:2310.06825, table 1.
# Mixtral: Jiang et al. 2024, arXiv:2401.04088, table 1. Qwen2.5: Yang et al. 2024, arXiv:2412.15115, table 1. Qwen3:
# Yang et al. 2025, arXiv:2505.09388, table 1; widths and vocabularies of both are those of their weights.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-65b": _llama(8192, 22_016, 80, 64, 2048),
    "llama-2-7b": _llama(4096, 11_008, 32, 32),
    "llama-2-13b": _llama(5120, 13_824, 40, 40),
    "llama-2-70b": _llama(8192, 28_672, 80, 64, num_key_value_heads=8),
    "llama-3-8b": _sized("llama", 4096, 14_336, 32, 32, 8, 128_256, context=8192),
    "llama-3-70b": _sized("llama", 8192, 28_672, 80, 64, 8, 128_256, context=8192),
    "mistral-7b": _sized("mistral", 4096, 14_336, 32, 32, 8, 32_000, context=8192),
    "mixtral-8x7b": _sized("mixtral", 4096, 14_336, 32, 32, 8, 32_000, context=32_768, num_local_experts=8),
    "qwen2.5-7b": _sized("qwen2", 3584, 18_944, 28, 28, 4, 152_064, context=32_768),
    "qwen3-8b": _sized("qwen3", 4096, 12_288, 36, 32, 8, 151_936, context=32_768, head_dim=128),
    "gpt-3-175b": {
        **{"model_type": "opt", "vocab_size": 50_257, "max_position_embeddings": 2048, "num_hidden_layers": 96},
        **{"hidden_size": 12_288, "word_embed_proj_dim": 12_288, "ffn_dim": 49_152, "num_attention_heads": 96},
        **{"activation_function": "gelu", "dropout": 0.0},
    },
}


def find_config(model: Any) -> tuple[str, Any]:
    """A short name for a model, and its config, which may be changed.

    Args:
        model: a transformers config; a name in `PUBLISHED` or in `lorakit.models.download.MODELS`; a folder with
            `config.json`, or such a file; or a hub id such as `"Qwen/Qwen2.5-7B"`, of which the config alone is asked
            for.

    Raises:
        ValueError: unknown name (the message lists near ones), or no config of a causal language model.
        FileNotFoundError: no such file or folder, or no `config.json` in it.
        ConnectionError: not in the hub's cache, and the hub did not give it.
        ImportError: transformers is not installed.
    """
    transformers = need("transformers")
    if isinstance(model, transformers.PreTrainedConfig):
        name, config = model.model_type, copy.deepcopy(model)
    elif as_path("a model's config (or its name)", model) and os.fspath(model) in PUBLISHED:
        name, config = model, transformers.AutoConfig.for_model(**PUBLISHED[model])
    else:
        name, config = _read(os.fspath(model), isinstance(model, Path))
    check_causal(config, name)
    return name, config


def _read(model: str, is_path: bool) -> tuple[str, Any]:
    """A config from a file: named, in a folder, of the course, or on the hub."""
    path = Path(model).expanduser()
    hub = not is_path and not path.exists() and model.count("/") == 1 and not model.startswith((".", "~", "/"))
    source: str | Path
    if model in MODELS and not is_path:
        source = fetch_model(model)
    elif hub:
        source = model
    elif is_path or path.exists() or "/" in model or os.sep in model:
        source = path / "config.json" if path.is_dir() else path
        if not source.is_file():
            raise FileNotFoundError(f"expected a folder with a config.json, or that file, got {model!r}")
    else:
        hint = near_names(model, [*MODELS, *PUBLISHED])
        raise ValueError(f"expected a model's name, a config, a folder or a hub id, {hint}")
    name = path.name if path.is_dir() else path.parent.name if path.is_file() else model
    log = logging.getLogger("huggingface_hub")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells of each attempt
        with quiet():
            return name, need("transformers").AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if not hub:
            raise ValueError(f"expected a readable config.json, got {source}: {one_line(error)}") from error
        raise ConnectionError(
            f"the config of {model!r} is not in the hub's cache, and the hub did not give it\n"
            f"Check the spelling and the connection, or use a local config.json or one of {[*MODELS, *PUBLISHED]}"
        ) from error
    except Exception as error:  # transformers and huggingface_hub raise whatever a wrong value leads to
        raise ValueError(f"expected a model's config, got {source}: {one_line(error)}") from error
    finally:
        log.setLevel(level)
