"""An adapter of any method becomes a LoRA of a rank, with a certificate of what that costs (07)."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._atomic import new_folder
from lorakit._numbers import check_integer, is_number
from lorakit._paths import as_path
from lorakit._progress import Progress
from lorakit.layers.lowrank import factored_svd
from lorakit.merging.any_method import changes_of, check_rest, put_on
from lorakit.merging.arithmetic import from_svd
from lorakit.merging.export import probe_texts
from lorakit.merging.updates import Update, attach
from lorakit.models.load import load_model
from lorakit.models.merge import remove
from lorakit.models.save_load import load_adapter, save_adapter
from lorakit.training.audit_tokens import load_tokenizer
from lorakit.training.batch import Example
from lorakit.training.chat import shown
from lorakit.training.evaluate import kl_divergence, log_probabilities
from lorakit.training.generate import greedy
from lorakit.training.rows import ASSISTANT, Row, read_rows

CERTIFICATE = "conversion.json"
AT_A_TIME = 8  # texts, whose log-probabilities are in memory together
ROUNDING = 1e-12  # of the energy, which float64 does not tell from none


@dataclass(frozen=True)
class Kept:
    """What is left of one update, of all experts together: its Frobenius norm before, and the share of its square."""

    name: str
    rank: int
    norm: float
    energy: float


@dataclass(frozen=True)
class Conversion:
    """A LoRA in a folder, and how near it is to the adapter that it was made of."""

    folder: Path
    layers: tuple[Kept, ...]
    texts: int  # of the user's; without any, the divergences are those on random tokens
    effect: float  # of the original: its divergence to the base, in nats a token
    kl: float  # from the original to the LoRA, in nats a token
    equal_answers: float | None  # share of the texts, which both continue greedily

    @property
    def energy(self) -> float:
        """The share that is left in all layers together."""
        total = sum(each.norm**2 for each in self.layers)
        return sum(each.energy * each.norm**2 for each in self.layers) / total

    def as_record(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"folder": str(self.folder), "energy": self.energy}

    def __str__(self) -> str:
        ranks = sorted({each.rank for each in self.layers})
        least = min(self.layers, key=lambda each: each.energy)
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        where = f"{self.texts} texts" if self.texts else "random tokens"
        lines = [
            f"{self.folder}: LoRA of rank {rank} in {len(self.layers)} layers",
            f"energy kept {self.energy:.2%}; the least, {least.energy:.2%}, in {least.name}",
            f"KL to the original {self.kl:.1e} nats a token on {where} (base: {self.effect:.1e})",
        ]
        if self.equal_answers is not None:
            lines.append(f"greedy answers equal to the original's: {self.equal_answers:.0%}")
        return "\n".join(lines)


@torch.no_grad()
def convert_adapter(
    adapter: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    *,
    texts: Sequence[str] = (),
    max_new_tokens: int = 48,
    layer: Callable[..., nn.Module] | None = None,
    show: bool = False,
) -> Conversion:
    """Saves the nearest LoRA to an adapter of any method whose layers are linear in their input, in PEFT's format.

    Of each layer's change of the weight the singular values and vectors of the largest energy are kept, which no other
    LoRA of that rank can better (Eckart & Young 1936), and so of an embedding's and each expert's. A change of at most
    that rank is kept whole. The folder also holds `conversion.json`, the certificate.

    Args:
        adapter: a folder with lorakit's or PEFT's adapter: LoRA, DoRA, LoHa, LoKr, VeRA, OFT, BOFT, IA3, HRA, ...
        base: as for `load_model`.
        out: the new folder.
        rank: of every layer, but for those that are narrower; or instead
        energy: in (0, 1], each layer gets the smallest rank that keeps this share of its update's squared norm; the
            experts of a parameter get one, for the share of them all.
        texts: on which both are compared: their next tokens, and what they answer. Without any, random tokens.
        max_new_tokens: of an answer.
        layer: the adapter's class, if it is one of the reader's own.
        show: draws progress bars.

    Raises:
        FileExistsError: there is something at `out`; it stays as it is.
        FileNotFoundError, AdapterError: no base or adapter, or they do not fit.
        ValueError: the adapter changes more than layers and experts, or nothing, or a setting is out of range;
            nothing is left behind.
        ImportError: it takes PEFT, which is not installed.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"expected a rank or a share of the energy, got {rank} and {energy}")
    if rank is not None:
        check_integer("rank", rank)
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"expected a share of the energy in (0, 1], got {energy!r}")
    out, adapter = as_path("a new folder", out), as_path("an adapter's folder", adapter)
    with new_folder(out) as folder:
        plain, tokenizer = load_model(base)
        examples = [_example(tokenizer, text) for text in texts] or probe_texts(plain)
        original, _ = load_model(base)
        adapted = put_on(original, adapter, layer)
        check_rest(original, adapted, plain)
        updates, kept = {}, []
        with Progress(len(adapted), "converting", "layer", show) as bar:
            for name, each in adapted.items():
                for key, change in changes_of(each, plain.get_submodule(name), name).items():
                    U, S, Vh = _svd(change)
                    energies = S.square().view(-1, S.shape[-1]).sum(0)  # of all experts
                    total = energies.sum()
                    if total > 0:
                        r = rank if rank is not None else _smallest_rank(energies, energy or 1.0)
                        updates[key] = from_svd(U, S, Vh, r)
                        share = (energies[:r].sum() / total).item()
                        kept.append(Kept(key, min(r, len(energies)), total.sqrt().item(), share))
                bar.update()
        if not updates:
            raise ValueError("expected an adapter that changes something, got one whose updates are zero")
        save_adapter(attach(plain, updates), folder)
        converted = load_adapter(remove(plain), folder)
        answers = _equal_answers(original, converted, tokenizer, texts, max_new_tokens, show) if texts else None
        kl = _divergence(original, converted, examples)
        found = Conversion(
            out,
            tuple(kept),
            len(texts),
            _divergence(original, remove(converted), examples),
            kl,
            answers,
        )
        (folder / CERTIFICATE).write_text(json.dumps(found.as_record(), indent=1) + "\n", encoding="utf-8")
    return found


def read_texts(path: Path, base: str | os.PathLike) -> list[str]:
    """What is to be continued: the lines of a text file, or the prompts of a .jsonl, those in messages as a chat.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds none.
    """
    if path.suffix != ".jsonl":
        texts = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"expected texts in {path}, a line each, got none")
        return texts
    tokenizer, _ = load_tokenizer(base)
    return [_asked(tokenizer, row) if row.messages else str(row.prompt) for row in read_rows(path)]


def _asked(tokenizer: Any, row: Row) -> str:
    """A conversation up to its last answer."""
    ends = len(row.messages) - (row.messages[-1]["role"] == ASSISTANT)
    return shown(tokenizer, row.messages[: ends if row.given is None else row.given], row, prompt=True)


def _svd(change: Update | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(change, Update):
        return factored_svd(change.B, change.A)
    return torch.linalg.svd(change, full_matrices=False)


def _smallest_rank(energies: Tensor, energy: float) -> int:
    """How many of the singular values' squares, which fall, have that share of them all."""
    shares = energies.cumsum(0) / energies.sum()
    return int((shares < energy - ROUNDING).sum()) + 1


def _divergence(original: Any, other: Any, examples: Sequence[Example]) -> float:
    """From the original to the other, in nats a token; its own predictions are made anew, as they would fill memory."""
    total, tokens = 0.0, 0
    for start in range(0, len(examples), AT_A_TIME):
        batch = examples[start : start + AT_A_TIME]
        right = log_probabilities(original, batch)  # (tokens, vocab)
        total += len(right) * kl_divergence(right, log_probabilities(other, batch))
        tokens += len(right)
    return total / tokens


def _equal_answers(
    original: Any, converted: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int, show: bool
) -> float:
    """The share of the texts that both continue alike."""
    first, second = (
        greedy(model, tokenizer, texts, max_new_tokens=max_new_tokens, show=show) for model in (original, converted)
    )
    return sum(map(str.__eq__, first, second)) / len(texts)


def _example(tokenizer: Any, text: str) -> Example:
    """A text, each token of which but the first is to be predicted."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"expected texts of two tokens or more, got {text!r}")
    return Example(ids, ids)
