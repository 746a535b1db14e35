"""What a step minimises: the mean loss of the labelled tokens, or a reader's own; in portions, if it is too large."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lorakit._numbers import check_list
from lorakit._words import short
from lorakit.speed.accelerated import Report
from lorakit.training.batch import IGNORE, Example, check_examples, collate, pack, rows_of, spans
from lorakit.training.loss import token_losses


@dataclass(frozen=True)
class Objective:
    """The mean loss of some examples.

    Args:
        loss_fn: called with a model and a batch, it returns their mean loss, a scalar. None for the cross-entropy of
            the labelled tokens, in nats.
        collate: makes a batch of a list of examples, for `loss_fn`. None for padding, if they are from `encode`, or
            else torch's `default_collate`, after lists have become tensors.
    """

    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        """Refuses what cannot be trained so."""
        check_list("examples", examples)
        for name, function in (("loss_fn", self.loss_fn), ("collate", self.collate)):
            if function is not None and not callable(function):
                raise ValueError(f"expected a function as {name}, got {short(function)}")
        if not len(examples):
            raise ValueError("expected at least one example, got none")
        if self.loss_fn is not None:
            return
        if self.collate is not None:
            raise ValueError("expected a loss_fn with collate, got collate alone")
        others = {type(example).__name__ for example in examples if not isinstance(example, Example)}
        if others:
            raise ValueError(f"expected examples from encode(), or a loss_fn for others, got {', '.join(others)}")
        config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
        if getattr(config, "is_encoder_decoder", False) or (can_generate and not can_generate()):
            raise ValueError(f"expected a causal language model, or a loss_fn for others, got {type(model).__name__}")
        check_examples(model, examples)

    def weight(self, examples: Sequence[Any]) -> int:
        """What the mean is over: how many labelled tokens, or examples if there is a `loss_fn`."""
        if self.loss_fn is not None:
            return len(examples)
        return sum(label != IGNORE for text in examples for label in text.labels[1:])

    def backward(
        self, model: nn.Module, chosen: list[list[Any]], indices: list[int], portions: int, speed: Report
    ) -> list[Tensor]:
        """Adds the gradient of each run's mean loss to its parameters', portion by portion, and returns the losses.

        Each run's mean is over all its examples of the step, in however many portions they are read.

        Args:
            chosen: each run's examples, as many for each.
            indices: name the first run's examples.
        """
        cuts = [len(chosen[0]) * i // portions for i in range(portions + 1)]
        parts = [slice(*ends) for ends in pairwise(cuts)]
        weights = [[self.weight(examples[part]) for examples in chosen] for part in parts]
        totals = [sum(column) for column in zip(*weights, strict=True)]
        found = []
        for part, counts in zip(parts, weights, strict=True):
            means = self._means(model, [examples[part] for examples in chosen], counts, speed, indices[part])
            losses = [
                mean if n == total else mean * (n / total) for mean, n, total in zip(means, counts, totals, strict=True)
            ]
            cast(Tensor, sum(losses)).backward()
            found.append([loss.detach() for loss in losses])
        return [cast(Tensor, sum(column)) for column in zip(*found, strict=True)]

    def mean(self, model: nn.Module, examples: Sequence[Any], size: int, speed: Report) -> float:
        """The mean loss of any number of examples, read `size` at a time."""
        total = weight = 0.0
        for start in range(0, len(examples), size):
            some = [examples[i] for i in range(start, min(start + size, len(examples)))]
            count = self.weight(some)
            total += count * self._means(model, [some], [count], speed)[0].item()
            weight += count
        return total / weight

    def _means(
        self, model: nn.Module, chosen: list[list[Any]], counts: list[int], speed: Report, indices: Sequence[int] = ()
    ) -> list[Tensor]:
        """The mean loss of each run's examples, from one forward pass."""
        device = next(model.parameters()).device
        examples = [example for some in chosen for example in some]
        if self.loss_fn is not None:
            loss = self.loss_fn(model, _moved((self.collate or _collated)(examples), device))
            if not isinstance(loss, Tensor) or loss.ndim:
                shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
                raise ValueError(f"expected a scalar tensor, got a {type(loss).__name__}{shape}, for loss_fn's answer")
            return [loss]
        lengths = [len(text.input_ids) for text in examples]
        packed = len(chosen) == 1 and len(rows_of(lengths)) < len(examples) and speed.packs()
        batch = (pack if packed else collate)(examples, device)
        known = speed.known(indices, spans(lengths, packed), batch["input_ids"].shape) if indices else nullcontext()
        with known:
            return [part.mean() for part in token_losses(model, batch).split(counts)]


def tokens_of(example: Any) -> int:
    """How long an example is; 0 if it has no `input_ids`."""
    ids = example.input_ids if isinstance(example, Example) else _input_ids(example)
    return ids.numel() if isinstance(ids, Tensor) else len(ids)


def _input_ids(example: Any) -> Any:
    return example.get("input_ids", ()) if isinstance(example, Mapping) else ()


def _collated(examples: list[Any]) -> Any:
    if all(isinstance(example, Example) for example in examples):
        return collate(examples)
    try:
        return default_collate([_tensors(example) for example in examples])
    except RuntimeError as error:
        raise ValueError(f"expected examples of one shape, or a collate that makes them so, got: {error}") from error


def _tensors(example: Any) -> Any:
    """A mapping whose lists are tensors: torch would take a list for a tuple of separate things."""
    if not isinstance(example, Mapping):
        return example
    return {name: torch.as_tensor(value) if isinstance(value, list) else value for name, value in example.items()}


def _moved(batch: Any, device: torch.device) -> Any:
    """Tensors, and mappings and sequences of them, on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch
