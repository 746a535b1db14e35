"""One plain training loop: whatever requires a gradient is trained, on the completion's tokens alone."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._progress import Progress
from lorakit.speed.activations import lean
from lorakit.speed.cpu import fast
from lorakit.speed.frozen_prefix import Below, below
from lorakit.training.batch import IGNORE, Example, collate, pack, packable, rows_of, spans
from lorakit.training.loss import token_losses
from lorakit.training.optim import loraplus_groups


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
    seconds: list[float] = field(default_factory=list)  # wall time; a fair share of it, if several runs share a loop
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


@dataclass
class Run:
    """One training: what it moves, what it reads, and what became of it. Several can share a loop, see `train`."""

    params: list[nn.Parameter]
    examples: Sequence[Example]
    lr: float
    seed: int
    groups: list[dict] | None = None  # the same parameters with rates of their own, None for `lr` for all
    history: History = field(default_factory=History)
    error: str = ""  # why it stopped early


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
    loraplus_ratio: float = 1.0,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], object] | None = None,
    seed: int = 0,
    show: bool = True,
) -> History:
    """Trains the parameters that require a gradient, with AdamW if nothing else is asked for, in place.

    Args:
        model: a causal language model: called with input_ids and attention_mask, it returns `.logits`.
        examples: from `encode`; they are reused, freshly shuffled, when `steps` needs more than there are.
        steps: optimiser steps.
        batch_size: examples a step.
        lr: peak learning rate; it rises from 0 over the first `warmup` of the steps and falls linearly to 0.
        warmup: share of the steps, in [0, 1).
        weight_decay: AdamW's.
        clip: largest norm of all gradients together; `math.inf` for none.
        loraplus_ratio: rate of every adapter's B, as a multiple of `lr` (LoRA+, see `loraplus_groups`); 1 for LoRA.
        optimizer: called with the parameter groups, each with its `lr`, such as `torch.optim.SGD`; it sets its own
            weight decay. None for torch's AdamW.
        after_step: called with the number of steps done after each one, such as to save a checkpoint; what it raises
            ends the training.
        seed: of the data's order and of dropout; the global random state is left as it was.
        show: draw a progress bar.

    Returns:
        loss, learning rate, tokens and times of each step. The model is left in the mode it was in.

    Raises:
        ValueError: nothing requires a gradient, no examples, or an example longer than the model's context.
        FloatingPointError: the loss or a gradient is NaN or infinite. The model keeps the last finite weights.
    """
    groups = None if loraplus_ratio == 1 else loraplus_groups(model, lr, loraplus_ratio)
    run = Run([p for p in model.parameters() if p.requires_grad], examples, lr, seed, groups)
    train(model, [run], steps, batch_size, warmup, weight_decay, clip, show, optimizer, after_step)
    if run.error:
        raise FloatingPointError(run.error)
    return run.history


def train(
    model: nn.Module,
    runs: Sequence[Run],
    steps: int,
    batch_size: int,
    warmup: float,
    weight_decay: float,
    clip: float,
    show: bool,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """Does the trainings of `runs` in one loop, as `fit` does one: each has its part of the batch, in their order.

    The model must keep the parts apart, as a `LoRAStack` does. Each run has its own order of data, learning rate and
    clipping. One that diverges stops, with the reason in its `error` and its last finite weights; the others go on.
    """
    for run in runs:
        _check(model, run, steps, batch_size, warmup)
    device = runs[0].params[0].device
    groups = [group for run in runs for group in run.groups or [{"params": run.params, "lr": run.lr}]]
    fused = {"weight_decay": weight_decay, "fused": device.type in ("cpu", "cuda")}
    optimizer = make(groups) if make else torch.optim.AdamW(groups, **fused)
    warmup_steps = math.ceil(steps * warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, steps, warmup_steps))
    orders = [batches(len(run.examples), batch_size, steps, run.seed) for run in runs]
    tokens = batch_size * sum(sum(len(text.input_ids) for text in run.examples) / len(run.examples) for run in runs)
    was_training = model.training
    model.train()
    try:
        repeats = len(runs) == 1 and steps * batch_size > len(runs[0].examples)
        frozen = _frozen_prefix(model, runs[0].examples) if repeats else None
        with (
            torch.random.fork_rng(),
            fast(model, tokens),
            lean(model),
            Progress(steps, "training", show=show) as progress,
        ):
            torch.manual_seed(runs[0].seed)
            for step in range(steps):
                wall, cpu = time.perf_counter(), time.process_time()
                chosen = [[run.examples[i] for i in order[step]] for run, order in zip(runs, orders, strict=True)]
                losses = _losses(model, chosen, device, frozen, orders[0][step])
                sum(losses).backward()
                share = linear_schedule(step, steps, warmup_steps)
                for run, loss in zip(runs, losses, strict=True):
                    _clip(run, loss, step, clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                shares = (time.perf_counter() - wall) / len(runs), (time.process_time() - cpu) / len(runs)
                for run, loss, texts in zip(runs, losses, chosen, strict=True):
                    if not run.error:
                        _note(
                            run.history,
                            loss.item(),
                            run.lr * share,
                            sum(len(text.input_ids) for text in texts),
                            *shares,
                        )
                going = [run.history.loss[-1] for run in runs if not run.error]
                if not going:
                    break
                if after_step:
                    after_step(step + 1)
                progress.update(1, f"loss {sum(going) / len(going):.3f}")
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _frozen_prefix(model: nn.Module, examples: Sequence[Example]) -> Below | None:
    """What need not be computed again for texts that come again; tried on the two longest."""
    longest = sorted(examples, key=lambda text: len(text.input_ids))[-2:]
    trial = collate(longest, next(model.parameters()).device)
    return below(model, trial, [len(text.input_ids) for text in examples])


def _losses(
    model: nn.Module, chosen: list[list[Example]], device: torch.device, frozen: Below | None, indices: list[int]
) -> list[Tensor]:
    """The mean loss of each run's texts, from one forward pass."""
    texts = [text for some in chosen for text in some]
    lengths = [len(text.input_ids) for text in texts]
    packed = len(chosen) == 1 and len(rows_of(lengths)) < len(texts) and packable(model)
    batch = (pack if packed else collate)(texts, device)
    counts = [sum(label != IGNORE for text in some for label in text.labels[1:]) for some in chosen]
    with frozen.batch(indices, spans(lengths, packed), batch["input_ids"].shape) if frozen else nullcontext():
        return [part.mean() for part in token_losses(model, batch).split(counts)]


def _clip(run: Run, loss: Tensor, step: int, clip: float) -> None:
    """Scales a run's gradients down to the norm `clip`; stops the run if they are not finite."""
    if not run.error:
        norm = torch.nn.utils.clip_grad_norm_(run.params, clip)
        if loss.isfinite() and norm.isfinite():
            return
        run.error = (
            f"expected a finite loss and gradient, got {loss.item():g} and {norm.item():g} at step {step}: "
            f"the weights are those before it; try a learning rate below {run.lr:g}"
        )
    for parameter in run.params:
        parameter.grad = None  # the optimiser passes it over


def _note(history: History, loss: float, lr: float, tokens: int, seconds: float, cpu_seconds: float) -> None:
    history.loss.append(loss)
    history.lr.append(lr)
    history.tokens.append(tokens)
    history.seconds.append(seconds)
    history.cpu_seconds.append(cpu_seconds)


def _check(model: nn.Module, run: Run, steps: int, batch_size: int, warmup: float) -> None:
    if not run.params:
        raise ValueError("expected parameters that require a gradient, got none: inject() adapters first")
    if not run.examples:
        raise ValueError("expected at least one example, got none")
    if steps < 1 or batch_size < 1 or not 0 <= warmup < 1 or not (run.lr > 0 and math.isfinite(run.lr)):
        raise ValueError(
            f"expected steps, batch_size >= 1, lr > 0, 0 <= warmup < 1, got {(steps, batch_size, run.lr, warmup)}"
        )
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(example.input_ids) for example in run.examples)
    if context is not None and longest > context:
        raise ValueError(f"expected examples of at most {context} tokens, the model's context, got {longest}")
