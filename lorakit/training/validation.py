"""Held-out examples: how good the model is at what it does not learn, when to stop, and the best weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._numbers import check_integer
from lorakit._random import seeded
from lorakit.layers.bnb import repacking_prevented
from lorakit.speed.accelerated import Report
from lorakit.training.history import History
from lorakit.training.objective import Objective


@dataclass
class Validation:
    """What a training is validated on, and its best weights so far.

    Args:
        examples: held out.
        every: steps between two validations; one more follows the last step. None for that one alone.
        patience: how many validations without a lower loss end the training. None for any number: then no weights are
            put back.

    Raises:
        ValueError: no examples, or a number is out of range.
    """

    examples: Sequence[Any] | None
    every: int | None
    patience: int | None
    weights: dict[str, Tensor] = field(default_factory=dict)  # of the lowest loss; empty without patience

    def __post_init__(self):
        if self.examples is None and (self.every is not None or self.patience is not None):
            raise ValueError("expected validation examples with validate_every and patience, got none")
        if self.patience is not None and self.every is None:
            raise ValueError(f"expected validate_every with patience, got patience {self.patience} alone")
        for name, number in (("validate_every", self.every), ("patience", self.patience)):
            if number is not None:
                check_integer(name, number)

    def due(self, step: int, steps: int) -> bool:
        """Whether there is one after so many steps done, of `steps`."""
        return self.examples is not None and (step == steps or (self.every is not None and step % self.every == 0))

    def look(self, model: nn.Module, objective: Objective, size: int, speed: Report, history: History) -> bool:
        """Validates in eval mode, `size` examples at a time, and notes the loss; True if patience is at its end."""
        assert self.examples is not None
        try:
            with torch.no_grad(), seeded(0), repacking_prevented(model):
                loss = objective.mean(model.eval(), self.examples, size, speed)
        finally:
            model.train()
            torch.clear_autocast_cache()  # it may hold weights without their gradients
        history.validation.append((len(history.loss), loss))
        if self.patience is None:
            return False
        best = _best(history)
        if best == len(history.validation) - 1:
            self.weights = {name: value.detach().clone() for name, value in moving(model).items()}
        return len(history.validation) - 1 - best >= self.patience

    def put_back(self, model: nn.Module, history: History) -> None:
        """Gives the model the best weights, if there were validations with patience."""
        if self.weights:
            restore(model, self.weights)
            history.best = history.validation[_best(history)][0]


def _best(history: History) -> int:
    """Which validation had the lowest loss, the first of several."""
    losses = [math.inf if math.isnan(loss) else loss for _, loss in history.validation]
    return losses.index(min(losses))


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes in a model: what requires a gradient, and buffers that its state dict has, such as
    running means; those of single bytes are codes of quantised weights, and stay."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    kept = model.state_dict(keep_vars=True).keys() & buffers.keys() if buffers else ()
    return found | {name: buffers[name] for name in buffers if name in kept and buffers[name].element_size() > 1}


@torch.no_grad()
def restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Gives a model back what `moving` has found."""
    for name, tensor in moving(model).items():
        tensor.copy_(values[name])
