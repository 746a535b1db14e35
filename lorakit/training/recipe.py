"""How long and in what portions a training goes: one set of numbers for one adapter or many."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from lorakit._numbers import check_integer, is_number
from lorakit._suggest import check_name

# how the learning rate falls after the warm-up: from the share of those steps that is left to its share of the peak
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "constant": lambda left: 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """What `fit` and `fit_many` share; the learning rate is the run's own.

    Args:
        steps: optimiser steps.
        batch_size: examples a step.
        warmup: share of the steps, in [0, 1), over which the learning rate rises from 0.
        weight_decay: AdamW's.
        clip: largest norm of all gradients of a run together; `math.inf` for none.
        accumulate: in how many portions a step's examples are read, one after the other: the step is the same, to
            rounding, and its activations take so many times less memory.
        schedule: what the learning rate does after the warm-up: "linear" and "cosine" fall to 0, "constant" stays.

    Raises:
        ValueError: a number is out of range, or the schedule has no such name.
    """

    steps: int
    batch_size: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    schedule: str = "linear"

    def __post_init__(self):
        check_integer("steps", self.steps)
        check_integer("batch_size", self.batch_size)
        check_integer("accumulate", self.accumulate, 1, self.batch_size)
        if not is_number(self.warmup) or not 0 <= self.warmup < 1:
            raise ValueError(f"expected 0 <= warmup < 1, got {self.warmup!r}")
        if not is_number(self.weight_decay) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected a finite weight_decay >= 0, got {self.weight_decay!r}")
        if not is_number(self.clip) or not self.clip > 0:
            raise ValueError(f"expected clip > 0, got {self.clip!r}")
        check_name("a schedule", self.schedule, SCHEDULES)

    @classmethod
    def of(cls, recipe: "Recipe | None", numbers: dict[str, Any]) -> "Recipe":
        """A recipe, or the one that its numbers, given by name, make: `fit`'s two ways to be called."""
        if recipe is not None and numbers:
            raise ValueError(f"expected a Recipe or its numbers, got both: {sorted(numbers)}")
        if recipe is not None and not isinstance(recipe, cls):
            raise ValueError(f"expected a Recipe, got {recipe!r}")
        known = [field.name for field in fields(cls)]
        for name in numbers:
            check_name("a number of a Recipe", name, known)
        if recipe is None and "steps" not in numbers:
            raise ValueError("expected steps, got none")
        return cls(**numbers) if recipe is None else recipe

    @property
    def warmup_steps(self) -> int:
        """Steps before the learning rate is at its peak."""
        return math.ceil(self.steps * self.warmup)

    def share(self, step: int) -> float:
        """Of the peak learning rate, at a step."""
        return schedule_share(step, self.steps, self.warmup_steps, self.schedule)


def schedule_share(step: int, steps: int, warmup_steps: int, name: str = "linear") -> float:
    """Share of the peak learning rate at a step: up from 0, then as `SCHEDULES` say, with transformers' values."""
    if step < warmup_steps:
        return step / warmup_steps
    return SCHEDULES[name]((steps - step) / max(1, steps - warmup_steps))


def batches(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's batch: a seeded shuffle of all examples an epoch, epochs joined without a gap."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)]).tolist()
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
