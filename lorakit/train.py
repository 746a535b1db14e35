"""One plain training loop: whatever requires a gradient is trained, on the completion's tokens alone."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lorakit.batch import Example, collate, pack, packable, rows_of
from lorakit.loss import completion_loss
from lorakit.machine import fast
from lorakit.progress import Progress


def linear_schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: up from 0, then down to 0, as transformers' linear schedule."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


@dataclass
class History:
    """What happened, one entry a step."""

    loss: list[float] = field(default_factory=list)  # nats a labelled token
    lr: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # in the batch, padding not counted
    seconds: list[float] = field(default_factory=list)  # wall time
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process

    def __str__(self) -> str:
        return (
            f"{len(self.loss)} steps, {sum(self.tokens):,} tokens, loss {self.loss[0]:.3f} -> {self.loss[-1]:.3f}, "
            f"{sum(self.seconds):.0f} s ({sum(self.cpu_seconds):.0f} CPU-seconds)"
        )


def batches(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's batch: a seeded shuffle of all examples an epoch, epochs joined without a gap."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)]).tolist()
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def fit(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 2e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    show: bool = True,
) -> History:
    """Trains the parameters that require a gradient with AdamW, in place.

    Args:
        model: a causal language model: called with input_ids and attention_mask, it returns `.logits`.
        examples: from `encode`; they are reused, freshly shuffled, when `steps` needs more than there are.
        steps: optimiser steps.
        batch_size: examples a step.
        lr: peak learning rate; it rises from 0 over the first `warmup` of the steps and falls linearly to 0.
        warmup: share of the steps, in [0, 1).
        weight_decay: AdamW's.
        clip: largest norm of all gradients together; `math.inf` for none.
        seed: of the data's order and of dropout; the global random state is left as it was.
        show: draw a progress bar.

    Returns:
        loss, learning rate, tokens and times of each step. The model is left in the mode it was in.

    Raises:
        ValueError: nothing requires a gradient, no examples, or an example longer than the model's context.
        FloatingPointError: the loss or a gradient is NaN or infinite. The model keeps the last finite weights.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    _check(model, params, examples, steps, batch_size, lr, warmup)
    device = params[0].device
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    warmup_steps = math.ceil(steps * warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, steps, warmup_steps))
    history, was_training = History(), model.training
    model.train()
    try:
        with torch.random.fork_rng(), fast(model), Progress(steps, "training", show=show) as progress:
            torch.manual_seed(seed)
            for step, indices in enumerate(batches(len(examples), batch_size, steps, seed)):
                wall, cpu = time.perf_counter(), time.process_time()
                chosen = [examples[i] for i in indices]
                crowded = len(rows_of([len(each.input_ids) for each in chosen])) < len(chosen) and packable(model)
                batch = (pack if crowded else collate)(chosen, device)
                loss = completion_loss(model, batch)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(params, clip)
                if not (loss.isfinite() and norm.isfinite()):
                    raise FloatingPointError(
                        f"expected a finite loss and gradient, got {loss.item():g} and {norm.item():g} at step {step}: "
                        f"the weights are those before it; try a learning rate below {lr:g}"
                    )
                history.lr.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                history.loss.append(loss.item())
                history.tokens.append(sum(len(each.input_ids) for each in chosen))
                history.seconds.append(time.perf_counter() - wall)
                history.cpu_seconds.append(time.process_time() - cpu)
                progress.update(1, f"loss {history.loss[-1]:.3f}")
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return history


def _check(model, params, examples, steps, batch_size, lr, warmup) -> None:
    if not params:
        raise ValueError("expected parameters that require a gradient, got none: inject() adapters first")
    if not examples:
        raise ValueError("expected at least one example, got none")
    if steps < 1 or batch_size < 1 or not 0 <= warmup < 1 or not (lr > 0 and math.isfinite(lr)):
        raise ValueError(
            f"expected steps, batch_size >= 1, lr > 0, 0 <= warmup < 1, got {(steps, batch_size, lr, warmup)}"
        )
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(example.input_ids) for example in examples)
    if context is not None and longest > context:
        raise ValueError(f"expected examples of at most {context} tokens, the model's context, got {longest}")
