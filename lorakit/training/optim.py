"""LoRA+: the two factors learn at two rates (Hayou et al. 2024, arXiv:2402.12354)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorakit._numbers import check_positive
from lorakit.layers.adapter import own_parameters
from lorakit.models.inject import adapters


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """The parameters that require a gradient, for any torch optimiser: every B at `ratio` times the rate of the rest.

        torch.optim.AdamW(lorakit.loraplus_groups(model, lr=1e-4))

    Args:
        model: with lorakit's adapters, or PEFT's, whose `lora_B` is meant.
        lr: rate of A and of all that is not a B.
        ratio: of B's rate to it; the paper's section 5 uses 16, and says that the best one depends on the task.

    Returns:
        one group for each of the two rates.

    Raises:
        ValueError: the ratio is not positive, or no B requires a gradient.
    """
    check_positive("lr", lr)
    check_positive("ratio", ratio)
    own = (pair for layer in adapters(model).values() for pair in own_parameters(layer).items())
    ours = {id(p) for name, p in own if name.split(".")[0] == "B"}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trained if id(p) in ours or ".lora_B." in name]
    if not fast:
        raise ValueError("expected adapters with a B that requires a gradient, got none: inject() them first")
    chosen = {id(p) for p in fast}
    slow = [p for _, p in trained if id(p) not in chosen]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def _eight_bit(smallest: int) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    def make(groups):
        from lorakit._optional import quiet

        with quiet():
            import bitsandbytes
        return bitsandbytes.optim.AdamW8bit(groups, weight_decay=0.0, min_8bit_size=smallest)

    return make


# What `fit` makes its optimiser with. bitsandbytes leaves matrices below 4,096 numbers in 32 bit unless it is told to.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None] = {
    "adamw": None,
    "adamw-8bit": _eight_bit(4096),
    "adamw-8bit-all": _eight_bit(1),
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}
