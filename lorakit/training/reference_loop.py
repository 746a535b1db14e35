"""A training loop as people write it: what `fit` is compared with, and room for what `fit` cannot train."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorakit.training.batch import Example, collate
from lorakit.training.recipe import batches, schedule_share


def plain_loop(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    after_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """`fit`'s recipe as people write it, with the model's own loss and none of the settings: what it is compared with.

    `after_step(step)` is called after each step of the optimiser, while the gradients are there.

    Returns:
        the loss of every step, in nats a labelled token.
    """
    params = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(params, lr=lr, weight_decay=0.0), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule_share(s, steps, math.ceil(steps / 10)))
    for step, indices in enumerate(batches(len(examples), batch_size, steps, seed)):
        loss = model(**collate([examples[i] for i in indices], params[0].device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
