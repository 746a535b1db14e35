"""Texts as batches of tokens: padded to one length, or packed so that short ones share a row and nothing else."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorakit._numbers import check_list

IGNORE = -100  # the label of a position that the loss leaves out, as in torch and transformers
PACKED = {"use_cache": False}  # with a cache, transformers' models take packed texts for one
Batch = dict[str, Int[Tensor, "batch seq"]]


@dataclass(frozen=True)
class Example:
    """A tokenised text and its labels: the same ids where the loss counts, `IGNORE` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self):
        for what, row in (("ids", self.input_ids), ("labels", self.labels)):
            tokens = row if isinstance(row, Sequence) and not isinstance(row, str) else [row]
            for token in tokens:
                if not isinstance(token, Integral) or isinstance(token, bool) or (token < 0 and token != IGNORE):
                    raise ValueError(f"expected {what} of tokens, integers >= 0, got {token!r}")
        if not isinstance(self.input_ids, Sequence) or not isinstance(self.labels, Sequence):
            raise ValueError("expected lists of ids and labels, got a number")
        if IGNORE in self.input_ids:
            raise ValueError(f"expected ids of tokens, integers >= 0, got {IGNORE}, which is a label")
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"expected one label a token, got {len(self.input_ids)} ids, {len(self.labels)} labels")
        if all(label == IGNORE for label in self.labels[1:]):
            raise ValueError("expected at least one labelled token after the first, got none: nothing to learn from")


def check_examples(model: Any, examples: Sequence[Example]) -> None:
    """Refuses what a model cannot read: no examples, texts longer than its context, tokens that it does not have.

    Raises:
        ValueError: says what was expected.
    """
    _check_tokenised(examples)
    known = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    if "input_ids" not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(f"expected a language model, called with input_ids, got {type(model).__name__}")
    context = context_of(model)
    longest = max((len(example.input_ids) for example in examples), default=0)
    if longest > context:
        raise ValueError(
            f"expected examples of at most {context} tokens, the model's context, got {longest}: "
            "encode(..., max_length=) shortens prompts"
        )
    vocabulary = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", math.inf)
    largest = max((max(*example.input_ids, *example.labels) for example in examples), default=0)
    if largest >= vocabulary:
        raise ValueError(f"expected tokens below {vocabulary}, those of the model, got {largest}: another tokenizer's?")


def _check_tokenised(examples: Any) -> None:
    check_list("examples", examples)
    strange = [type(example).__name__ for example in examples if not isinstance(example, Example)]
    if strange:
        raise ValueError(f"expected Examples, as encode() makes them, got {strange[0]}")


def _check_some(examples: Any) -> None:
    _check_tokenised(examples)
    if not len(examples):
        raise ValueError("expected at least one example, got none")


def context_of(model: Any) -> float:
    """How many tokens a model can see at once, by its config; infinite if that does not say."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return math.inf if context is None else context


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Pads examples on the right to one length: input_ids, attention_mask and labels, as transformers' models take.

    Raises:
        ValueError: these are no examples, or none.
    """
    _check_some(examples)
    longest = max(len(example.input_ids) for example in examples)

    def stack(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.long, device=device)

    ids = [example.input_ids for example in examples]
    return {
        "input_ids": stack(ids, 0),  # any id: the mask hides it
        "attention_mask": stack([[1] * len(row) for row in ids], 0),
        "labels": stack([example.labels for example in examples], IGNORE),
    }


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Divides texts, by index, among rows as long as the longest text: first fit, longest first."""
    capacity = max(lengths)
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(free) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Packs examples into rows: input_ids, position_ids and labels, for models that `speed.packing.packable` accepts.

    Positions begin at 0 with each text, which is how transformers' models learn where one ends; no text sees another.
    No row is longer than the longest text, so that packing never costs more than padding.

    Raises:
        ValueError: these are no examples, or none.
    """
    _check_some(examples)
    rows = rows_of([len(example.input_ids) for example in examples])
    longest = max(len(example.input_ids) for example in examples)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        texts = [examples[i] for i in row]
        columns["input_ids"].append([token for text in texts for token in text.input_ids])
        columns["position_ids"].append([place for text in texts for place in range(len(text.input_ids))])
        columns["labels"].append([label for text in texts for label in (IGNORE, *text.labels[1:])])
    fillers = {"input_ids": 0, "position_ids": 0, "labels": IGNORE}  # each filler is a text of its own
    return {
        name: torch.tensor(
            [row + [fillers[name]] * (longest - len(row)) for row in values], dtype=torch.long, device=device
        )
        for name, values in columns.items()
    }


def spans(lengths: Sequence[int], packed: bool) -> list[tuple[int, int, int]]:
    """Where each text lies in the batch that `pack` or `collate` makes: row, first column, length."""
    if not packed:
        return [(row, 0, length) for row, length in enumerate(lengths)]
    places = {}
    for row, texts in enumerate(rows_of(lengths)):
        start = 0
        for i in texts:
            places[i] = (row, start, lengths[i])
            start += lengths[i]
    return [places[i] for i in range(len(lengths))]
