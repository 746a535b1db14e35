"""How long and in what portions a training goes: one set of numbers for one adapter or many."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from lorakit._numbers import check_integer, is_number
from lorakit._suggest import near_names


@dataclass(frozen=True)
class Recipe:
    """What `fit` and `fit_many` share; the learning rate is the run's own.

    Args:
        steps: optimiser steps.
        batch_size: examples a step.
        warmup: share of the steps, in [0, 1), over which the learning rate rises from 0; it then falls linearly to 0.
        weight_decay: AdamW's.
        clip: largest norm of all gradients of a run together; `math.inf` for none.

    Raises:
        ValueError: a number is out of range.
    """

    steps: int
    batch_size: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        check_integer("steps", self.steps)
        check_integer("batch_size", self.batch_size)
        if not is_number(self.warmup) or not 0 <= self.warmup < 1:
            raise ValueError(f"expected 0 <= warmup < 1, got {self.warmup!r}")
        if not is_number(self.weight_decay) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected a finite weight_decay >= 0, got {self.weight_decay!r}")
        if not is_number(self.clip) or not self.clip > 0:
            raise ValueError(f"expected clip > 0, got {self.clip!r}")

    @classmethod
    def of(cls, recipe: "Recipe | None", numbers: dict[str, Any]) -> "Recipe":
        """A recipe, or the one that its numbers, given by name, make: `fit`'s two ways to be called."""
        if recipe is not None and numbers:
            raise ValueError(f"expected a Recipe or its numbers, got both: {sorted(numbers)}")
        if recipe is not None and not isinstance(recipe, cls):
            raise ValueError(f"expected a Recipe, got {recipe!r}")
        known = [field.name for field in fields(cls)]
        for name in numbers:
            if name not in known:
                raise ValueError(f"expected a number of a Recipe, {near_names(name, known)}")
        if recipe is None and "steps" not in numbers:
            raise ValueError("expected steps, got none")
        return cls(**numbers) if recipe is None else recipe

    @property
    def warmup_steps(self) -> int:
        """Steps before the learning rate is at its peak."""
        return math.ceil(self.steps * self.warmup)

    def share(self, step: int) -> float:
        """Of the peak learning rate, at a step."""
        return linear_schedule(step, self.steps, self.warmup_steps)


def linear_schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: up from 0, then down to 0, as transformers' linear schedule."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


def batches(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's batch: a seeded shuffle of all examples an epoch, epochs joined without a gap."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)]).tolist()
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
