"""One plain training loop: whatever requires a gradient is trained, on the completion's tokens alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit._numbers import check_integer, check_positive
from lorakit._progress import Progress
from lorakit._random import Stream
from lorakit.speed.accelerated import Report, accelerated
from lorakit.training.batch import IGNORE, Example, check_examples, collate, pack, rows_of, spans
from lorakit.training.loss import token_losses
from lorakit.training.optim import loraplus_groups
from lorakit.training.recipe import Recipe, batches


@dataclass
class History:
    """What happened, one entry a step."""

    loss: list[float] = field(default_factory=list)  # nats a labelled token
    lr: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # in the batch, padding not counted
    seconds: list[float] = field(default_factory=list)  # wall time; a fair share of it, if several runs share a loop
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process
    speed: dict[str, str] = field(default_factory=dict)  # each trick of `speed.accelerated`: used or not, and why

    def __str__(self) -> str:
        used = [name for name, words in self.speed.items() if words.startswith("used")]
        return (
            f"{len(self.loss)} steps, {sum(self.tokens):,} tokens, loss {self.loss[0]:.3f} -> {self.loss[-1]:.3f}, "
            f"{sum(self.seconds):.0f} s ({sum(self.cpu_seconds):.0f} CPU-seconds)"
            + (f", with {', '.join(used)}" if used else "")
        )


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
    recipe: Recipe | None = None,
    *,
    lr: float = 2e-3,
    loraplus_ratio: float = 1.0,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], object] | None = None,
    seed: int = 0,
    accelerate: bool = True,
    show: bool = True,
    **numbers: Any,
) -> History:
    """Trains the parameters that require a gradient, with AdamW if nothing else is asked for, in place.

        fit(model, examples, steps=44, lr=3e-3)                     fit(model, examples, Recipe(steps=44), lr=3e-3)

    Args:
        model: a causal language model: called with input_ids and attention_mask, it returns `.logits`.
        examples: from `encode`; they are reused, freshly shuffled, when the steps need more than there are.
        recipe: steps, batch size, warm-up, weight decay, clipping; or give its numbers by name.
        lr: peak learning rate.
        loraplus_ratio: rate of every adapter's B, as a multiple of `lr` (LoRA+, see `loraplus_groups`); 1 for LoRA.
        optimizer: called with the parameter groups, each with its `lr`, such as `torch.optim.SGD`; it sets its own
            weight decay. None for torch's AdamW.
        after_step: called with the number of steps done after each one, such as to save a checkpoint; what it raises
            ends the training.
        seed: of the data's order and of dropout; the global random state is left as it was.
        accelerate: use what `speed.accelerated` finds to pay; False for the plain formulas.
        show: draw a progress bar.
        numbers: those of a `Recipe`: steps, batch_size, warmup, weight_decay, clip.

    Returns:
        loss, learning rate, tokens and times of each step, and what made it faster. The model keeps the mode it was in.

    Raises:
        ValueError: nothing requires a gradient, no examples, a number out of range, or an example longer than the
            model's context.
        FloatingPointError: the loss or a gradient is NaN or infinite. The model keeps the last finite weights.
    """
    recipe = Recipe.of(recipe, numbers)
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, got {type(model).__name__}")
    for what, function in (("optimizer", optimizer), ("after_step", after_step)):
        if function is not None and not callable(function):
            raise ValueError(f"expected {what} as a function, got {function!r}")
    check_positive("loraplus_ratio", loraplus_ratio)
    groups = None if loraplus_ratio == 1 else loraplus_groups(model, lr, loraplus_ratio)
    run = Run([p for p in model.parameters() if p.requires_grad], examples, lr, seed, groups)
    train(model, [run], recipe, accelerate, show, optimizer, after_step)
    if run.error:
        raise FloatingPointError(run.error)
    return run.history


def train(
    model: nn.Module,
    runs: Sequence[Run],
    recipe: Recipe,
    accelerate: bool,
    show: bool,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """Does the trainings of `runs` in one loop, as `fit` does one: each has its part of the batch, in their order.

    The model must keep the parts apart, as a `LoRAStack` does. Each run has its own order of data, learning rate and
    clipping. One that diverges stops, with the reason in its `error` and its last finite weights; the others go on.
    """
    for run in runs:
        _check(model, run)
    device, steps, size = runs[0].params[0].device, recipe.steps, recipe.batch_size
    groups = [group for run in runs for group in run.groups or [{"params": run.params, "lr": run.lr}]]
    fused: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": device.type in ("cpu", "cuda")}
    optimizer = make(groups) if make else torch.optim.AdamW(groups, **fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.share)
    orders = [batches(len(run.examples), size, steps, run.seed) for run in runs]
    tokens = size * sum(sum(len(text.input_ids) for text in run.examples) / len(run.examples) for run in runs)
    repeats = len(runs) == 1 and steps * size > len(runs[0].examples)
    again = [text.input_ids for text in runs[0].examples] if repeats else ()
    was_training, stream = model.training, Stream(runs[0].seed)
    model.train()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            accelerated(model, tokens, trains=True, texts=again, on=accelerate) as speed,
            Progress(steps, "training", show=show) as progress,
        ):
            for step in range(steps):
                wall, cpu = time.perf_counter(), time.process_time()
                chosen = [[run.examples[i] for i in order[step]] for run, order in zip(runs, orders, strict=True)]
                with stream.drawing():
                    losses = _losses(model, chosen, device, speed, orders[0][step])
                    cast(Tensor, sum(losses)).backward()
                share = recipe.share(step)
                for run, loss in zip(runs, losses, strict=True):
                    _clip(run, loss, step, recipe.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                torch.clear_autocast_cache()  # it holds A and B as they were before the step
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
                    with speed.suspended():
                        after_step(step + 1)
                    _check_held(model, runs, step + 1)
                    stream.watch()
                progress.update(1, f"loss {sum(going) / len(going):.3f}")
            for run in runs:
                run.history.speed = speed.words()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _losses(
    model: nn.Module, chosen: list[list[Example]], device: torch.device, speed: Report, indices: list[int]
) -> list[Tensor]:
    """The mean loss of each run's texts, from one forward pass."""
    texts = [text for some in chosen for text in some]
    lengths = [len(text.input_ids) for text in texts]
    packed = len(chosen) == 1 and len(rows_of(lengths)) < len(texts) and speed.packs()
    batch = (pack if packed else collate)(texts, device)
    counts = [sum(label != IGNORE for text in some for label in text.labels[1:]) for some in chosen]
    with speed.known(indices, spans(lengths, packed), batch["input_ids"].shape):
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


def _check(model: nn.Module, run: Run) -> None:
    if not run.params:
        raise ValueError("expected parameters that require a gradient, got none: inject() adapters first")
    if any(p.is_inference() for p in run.params):
        raise ValueError("expected parameters that can train, got some made inside of torch.inference_mode()")
    if isinstance(run.examples, Example) or not run.examples:
        raise ValueError("expected a list with at least one example, got none")
    check_examples(model, run.examples)
    check_positive("lr", run.lr)
    check_integer("seed", run.seed, -(2**63), 2**64 - 1)


def _check_held(model: nn.Module, runs: Sequence[Run], step: int) -> None:
    """Refuses to go on once somebody has taken what trains out of the model."""
    held = {id(p) for p in model.parameters()}
    if not all(id(p) in held for run in runs for p in run.params):
        raise ValueError(
            f"expected the parameters that train to stay in the model, got others after step {step}: "
            "use folded(), or merge a copy"
        )
