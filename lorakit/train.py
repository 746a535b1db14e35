"""One plain training loop: whatever requires a gradient is trained, on the completion's tokens alone."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.machine import kept_memory
from lorakit.progress import Progress

IGNORE = -100  # the label of a position that the loss leaves out, as in torch and transformers


@dataclass(frozen=True)
class Example:
    """A tokenised text and its labels: the same ids where the loss counts, `IGNORE` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self):
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"expected one label a token, got {len(self.input_ids)} ids, {len(self.labels)} labels")
        if all(label == IGNORE for label in self.labels[1:]):
            raise ValueError("expected at least one labelled token after the first, got none: nothing to learn from")


def encode(tokenizer: Any, prompt: str, completion: str) -> Example:
    """Tokenises a prompt and its completion apart, as generation will see them, and labels the completion only."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return Example(prompt_ids + completion_ids, [IGNORE] * len(prompt_ids) + completion_ids)


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, Int[Tensor, "batch seq"]]:
    """Pads examples on the right to one length: input_ids, attention_mask and labels, as transformers' models take."""
    longest = max(len(example.input_ids) for example in examples)

    def stack(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    ids = [example.input_ids for example in examples]
    return {
        "input_ids": stack(ids, 0),  # any id: the mask hides it
        "attention_mask": stack([[1] * len(row) for row in ids], 0),
        "labels": stack([example.labels for example in examples], IGNORE),
    }


def labelled_logits(
    model: nn.Module, batch: dict[str, Int[Tensor, "batch seq"]]
) -> tuple[Float[Tensor, "labelled vocab"], Int[Tensor, " labelled"]]:
    """The logits that predict each labelled token, and those tokens, row by row.

    The output head is the widest layer of a small model, so it is shown the labelled positions only. A model without
    `get_output_embeddings` computes all logits, of which these are picked.
    """
    labels = batch["labels"]
    before_label = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (batch, seq): True where the next token is labelled
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        logits = model(**inputs).logits[before_label]
    else:
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][before_label].unsqueeze(0),))
        try:
            logits = model(**inputs).logits.squeeze(0)  # (labelled, vocab)
        finally:
            hook.remove()
    return logits, labels[:, 1:][before_label[:, :-1]]


def completion_loss(model: nn.Module, batch: dict[str, Int[Tensor, "batch seq"]]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the labelled tokens, each given the tokens before it."""
    logits, targets = labelled_logits(model, batch)
    return F.cross_entropy(logits.float(), targets)


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
        with torch.random.fork_rng(), kept_memory(), Progress(steps, "training", show=show) as progress:
            torch.manual_seed(seed)
            for step, indices in enumerate(batches(len(examples), batch_size, steps, seed)):
                wall, cpu = time.perf_counter(), time.process_time()
                batch = collate([examples[i] for i in indices], device)
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
                history.tokens.append(int(batch["attention_mask"].sum()))
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
