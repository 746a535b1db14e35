"""A vocabulary that `resize_token_embeddings` has changed: an adapter's file has to say so, and to hold the new rows.

The new rows are random, other ones each time that a base is resized. So a file holds both ends of a model whose
vocabulary is not its base's, as PEFT's `save_embedding_layers` does, and loading gives a resized base those rows.
"""

import re
import sys
from collections.abc import Mapping

from torch import Tensor, nn

from lorakit._optional import quiet
from lorakit.layers.bases import has_float_weight
from lorakit.layers.tied import Tied
from lorakit.layers.token_rows import TrainedRows
from lorakit.layers.trained import TrainedModule
from lorakit.models.beside import input_embedding
from lorakit.models.peft_files import VOCABULARY, AdapterError
from lorakit.models.targets import named_modules, unwrapped


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model's input embedding has a row for; None if it has no such embedding."""
    end = input_embedding(model)
    return None if end is None else end.num_embeddings  # type: ignore[return-value]


def is_resized(model: nn.Module) -> bool:
    """True if the model's vocabulary is not that of its base, whose config is looked for where it came from."""
    size, source = vocabulary(model), getattr(unwrapped(model), "name_or_path", None)
    transformers = sys.modules.get("transformers")
    if size is None or not source or transformers is None:
        return False
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        return config.get_text_config().vocab_size != size
    except (OSError, ValueError, AttributeError):  # it is not there any more
        return False


def ends(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding and the output layer by name, or the adapters in their places."""
    whole = unwrapped(model)
    found = [input_embedding(model), getattr(whole, "get_output_embeddings", lambda: None)()]
    return {name: m for name, m in named_modules(model) if any(m is end for end in found)}


def embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of both ends, each once, by what follows PEFT's prefix in its files."""
    found: dict[str, Tensor] = {}
    for name, module in ends(model).items():
        if not isinstance(module, TrainedModule):  # its file part is the whole weight
            place = f"{name}.{_inside(module)}".rstrip(".")
            base = getattr(module, "base", module)
            for part, p in base.named_parameters() if has_float_weight(base) else ():
                if all(p is not known for known in found.values()):
                    found[f"{place}.{part}"] = p
    return found


def _inside(module: nn.Module) -> str:
    """Where PEFT has the frozen layer, inside of what stands in its place."""
    rows = isinstance(module, TrainedRows) or (isinstance(module, Tied) and isinstance(module.source, TrainedRows))
    return "token_adapter.base_layer" if rows else "base_layer" if hasattr(module, "base") else ""


def check_vocabulary(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuses an adapter of another vocabulary, if its file says so.

    Args:
        model: into which it shall go.
        tensors: the file's, by the model's own names.
        metadata: of the file; a model may have more tokens than that of the adapter, but not fewer.

    Raises:
        AdapterError: says how many tokens, and how to resize.
    """
    own, stated = vocabulary(model), metadata.get(VOCABULARY, "")
    if own is None:
        return
    places = tuple(f"{name}." for name in ends(model))
    sizes = {len(t.T if name.endswith("_A") else t) for name, t in tensors.items() if _has_rows(name, places)}
    largest = max([*sizes, int(stated) if stated.isdecimal() and len(stated) < 10 else 0])
    if largest > own:
        raise AdapterError(
            f"expected a model of {largest} tokens, as that of the adapter, got one of {own}: "
            f"model.resize_token_embeddings({largest}) first, and load then"
        )
    if sizes and min(sizes) < own:
        raise AdapterError(
            f"expected a model of {min(sizes)} tokens, as that of the adapter, got one of {own}: load it, then resize"
        )


def _has_rows(name: str, places: tuple[str, ...]) -> bool:
    """True for a tensor of an embedding or an output layer that has a row or a column for every token."""
    return name.startswith(places) and re.search(r"(?<!lora_A)\.weight\Z|\.lora_embedding_A\Z", name) is not None


def new_rows(key: str, theirs: Tensor, ours: Tensor) -> tuple[Tensor, int, Tensor]:
    """The model's tensor, where its last rows begin that a file has otherwise, and the file's.

    Raises:
        AdapterError: others differ, too: the file's base is another. One of a narrower dtype may have been rounded.
    """
    here, there = ours.detach().cpu(), theirs.to(ours.dtype)
    same = ((there == here) | (here.to(theirs.dtype) == theirs)).reshape(len(here), -1).all(1)
    start = int(same.logical_not().nonzero().min()) if not same.all() else len(same)
    if start == 0 or same[start:].any():
        raise AdapterError(f"expected this model's own values of {key!r}, got others: it was trained or resized there")
    return ours, start, there[start:]
