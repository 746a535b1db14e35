"""A base and an adapter become one plain model in a folder, checked before it gets its name."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit._atomic import new_folder
from lorakit._optional import quiet
from lorakit._paths import as_path
from lorakit._suggest import check_name
from lorakit.models.load import load_model
from lorakit.models.merge import merge
from lorakit.models.peft_files import read_adapter
from lorakit.models.save_load import load_adapter
from lorakit.training.batch import Example
from lorakit.training.evaluate import kl_divergence, log_probabilities

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR = 1e-3  # nats a token: below this two models give the same answers but for ties
SHARE = 0.1  # of the adapter's own effect that rounding may cost


@dataclass(frozen=True)
class Exported:
    """A merged model in a folder, and how near it is to the unmerged one, in nats a token (Kullback-Leibler)."""

    folder: Path
    dtype: torch.dtype
    effect: float  # of the adapter: from the unmerged model to the base
    error: float  # of merging and rounding: from the unmerged model to the folder's

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.folder}: {kind}, KL to the unmerged model {self.error:.1e} (to the base {self.effect:.1e})"


@torch.no_grad()
def export_merged(
    base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike, dtype: str = "auto"
) -> Exported:
    """Merges a saved adapter into its base and saves the plain model with its tokenizer, for any transformers.

    The sum W + s B A is made in float32 and rounded once. The folder is written under another name, loaded again, and
    compared with the unmerged model on random tokens; only then it gets its name.

    Args:
        base: as for `load_model`.
        adapter: a folder with LoRA, rsLoRA or DoRA, as for `load_adapter`.
        out: the new folder; its parents are made.
        dtype: "float32", "bfloat16", "float16", or "auto" for the base's own.

    Raises:
        FileExistsError: there is something at `out`; it stays as it is.
        FileNotFoundError, AdapterError: no base or adapter, or they do not fit.
        ValueError: another dtype, or the merged model is not the unmerged one's equal: what it loses is more than
            0.001 nats a token and more than a tenth of what the adapter does. Nothing is left behind.
    """
    out = as_path("a new folder", out)
    check_name("a dtype", dtype, ["auto", *DTYPES])
    with new_folder(out) as folder:
        found = _make(base, adapter, folder, dtype)
    return replace(found, folder=out)


def _make(base: str | os.PathLike, adapter: str | os.PathLike, folder: Path, dtype: str) -> Exported:
    """Writes the merged model into a new folder, and compares it."""
    read_adapter(as_path("an adapter's folder", adapter))  # found now if there is none, not after the base is loaded
    model, tokenizer = load_model(base)
    chosen = _own_dtype(model) if dtype == "auto" else DTYPES[dtype]
    probe = probe_texts(model)
    plain = log_probabilities(model, probe)
    load_adapter(model, adapter)
    unmerged = log_probabilities(model, probe)
    _save(merge(model).to(chosen), tokenizer, folder)
    del model
    merged = log_probabilities(load_model(folder, chosen)[0], probe)
    found = Exported(folder, chosen, kl_divergence(unmerged, plain), kl_divergence(unmerged, merged))
    if not found.error <= max(NEAR, SHARE * found.effect):
        raise ValueError(f"expected the unmerged model's answers, got others: {found}; nothing was saved")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are written for their owner alone
    folder.chmod(0o755)
    return found


def _own_dtype(model: Any) -> torch.dtype:
    """The dtype that the base's files have, by its config, read anew: loading has overwritten it in the model."""
    from transformers import AutoConfig

    with quiet():
        own = getattr(AutoConfig.from_pretrained(model.config._name_or_path), "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == own), torch.float32)


def probe_texts(model: Any) -> list[Example]:
    """Random tokens, each of which is to be predicted; the same for every model with that vocabulary."""
    size = model.config.get_text_config().vocab_size
    rows = torch.randint(size, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(row, row) for row in rows]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
