"""One plain training loop: whatever requires a gradient is trained, on the completion's tokens alone."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._numbers import check_integer, check_positive
from lorakit._progress import Progress
from lorakit._random import Stream
from lorakit._words import short
from lorakit.speed.accelerated import accelerated
from lorakit.training.batch import Example
from lorakit.training.checkpoint import Checkpoints, Training, fingerprint, pinned
from lorakit.training.history import History, Step
from lorakit.training.objective import Objective, tokens_of
from lorakit.training.optim import loraplus_groups
from lorakit.training.recipe import Recipe, batches
from lorakit.training.validation import Validation

STOP = "stop"  # what `after_step` returns to end the training
EVERY = 100  # steps between two checkpoints


@dataclass
class Run:
    """One training: what it moves, what it reads, and what became of it. Several can share a loop, see `train`."""

    params: list[nn.Parameter]
    examples: Sequence[Any]
    lr: float
    seed: int
    groups: list[dict] | None = None  # the same parameters with rates of their own, None for `lr` for all
    history: History = field(default_factory=History)
    error: str = ""  # why it stopped early


def fit(
    model: nn.Module,
    examples: Sequence[Any],
    recipe: Recipe | None = None,
    *,
    lr: float = 2e-3,
    loraplus_ratio: float = 1.0,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[Step], object] | None = None,
    validation: Sequence[Any] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
    accelerate: bool = True,
    show: bool = True,
    **numbers: Any,
) -> History:
    """Trains the parameters that require a gradient, with AdamW if nothing else is asked for, in place.

        fit(model, examples, steps=44, lr=3e-3)                     fit(model, examples, Recipe(steps=44), lr=3e-3)

    Args:
        model: a causal language model: called with input_ids and attention_mask, it returns `.logits`. Any model, if
            there is a `loss_fn`.
        examples: from `encode`; they are reused, freshly shuffled, when the steps need more than there are.
        recipe: steps, batch size, warm-up, weight decay, clipping; or give its numbers by name.
        lr: peak learning rate.
        loraplus_ratio: rate of every adapter's B, as a multiple of `lr` (LoRA+, see `loraplus_groups`); 1 for LoRA.
        optimizer: called with the parameter groups, each with its `lr`, such as `torch.optim.SGD`; it sets its own
            weight decay. None for torch's AdamW.
        after_step: called with a `Step` after each one, such as to save an adapter or to log its numbers. If it returns
            the word "stop", the training ends there; what it raises ends it too, without a history.
        validation: held-out examples, whose mean loss in eval mode goes into `History.validation`.
        validate_every: steps between two validations; one more follows the last step. None for that one alone.
        patience: how many validations in a row without a lower loss end the training. With it, the weights of the
            lowest loss are put back at the end, however it came, and `History.best` is their step.
        checkpoint: a folder of this training alone. If the process is killed and the same call is made again, it goes
            on from the newest whole checkpoint, and weights, history and validation are those of a training that was
            not killed, to the bit, on one kind of machine with as many threads. A finished training is not made again.
        checkpoint_every: steps between two checkpoints; one more follows the last step. None for 100.
        keep: how many checkpoints stay.
        loss_fn: called with the model and a batch, it returns the batch's mean loss, a scalar tensor, as
            `lambda model, batch: model(**batch).loss` does for a classifier. Examples are then whatever makes a batch,
            such as mappings of tensors, numbers or lists. In portions, and in validation, each batch's mean counts by
            its number of examples.
        collate: with `loss_fn`: makes a batch of a list of examples. None for torch's `default_collate`, or for
            padding if they are from `encode`. Its tensors are moved to the model's device.
        seed: of the data's order and of dropout; the global random state is left as it was.
        accelerate: use what `speed.accelerated` finds to pay; False for the plain formulas.
        show: draw a progress bar.
        numbers: those of a `Recipe`: steps, batch_size, warmup, weight_decay, clip, accumulate, schedule.

    With checkpoints, what `accelerated` decided by the clock or by trial (oneDNN, packing) is written down, and pinned
    when the training goes on; answers of frozen layers are not kept, since they differ in rounding with the batch that
    a text first came in. Functions are not compared, nor what they draw from elsewhere than torch: they are to be the
    same. `after_step` may see the last steps before a kill twice.

    Returns:
        loss, learning rate, tokens and times of each step, and what made it faster. The model keeps the mode it was in.

    Raises:
        ValueError: nothing requires a gradient, no examples, a number out of range, an example longer than the model's
            context, examples or a model that need a `loss_fn`, or checkpoints of another training: it says what
            differs.
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
    objective, held_out = Objective(loss_fn, collate), Validation(validation, validate_every, patience)
    if checkpoint is None and checkpoint_every is not None:
        raise ValueError(f"expected a checkpoint folder with checkpoint_every, got {checkpoint_every} alone")
    every = EVERY if checkpoint_every is None else checkpoint_every
    files = None if checkpoint is None else Checkpoints(Path(checkpoint), every, keep)
    train(model, [run], recipe, accelerate, show, optimizer, after_step, objective, held_out, files)
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
    after_step: Callable[[Step], object] | None = None,
    objective: Objective = Objective(),  # noqa: B008  it is frozen
    held_out: Validation | None = None,
    files: Checkpoints | None = None,
) -> None:
    """Does the trainings of `runs` in one loop, as `fit` does one: each has its part of the batch, in their order.

    The model must keep the parts apart, as a `LoRAStack` does. Each run has its own order of data, learning rate and
    clipping. One that diverges stops, with the reason in its `error` and its last finite weights; the others go on.
    Only a run that is alone may have an objective, a validation and checkpoints of its own.
    """
    first, held_out = runs[0], held_out or Validation(None, None, None)
    for run in runs:
        _check(run)
        objective.check(model, run.examples)
    if held_out.examples is not None:
        objective.check(model, held_out.examples)
    device, steps, size = first.params[0].device, recipe.steps, recipe.batch_size
    groups = [group for run in runs for group in run.groups or [{"params": run.params, "lr": run.lr}]]
    fused: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": device.type in ("cpu", "cuda")}
    optimizer = make(groups) if make else torch.optim.AdamW(groups, **fused)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"expected an optimizer that makes one of torch's, got {short(optimizer)}")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.share)
    orders = [batches(len(run.examples), size, steps, run.seed) for run in runs]
    tokens = size / recipe.accumulate * sum(_mean_length(run, objective) for run in runs)
    repeats = len(runs) == 1 and steps * size > len(first.examples) and objective.loss_fn is None and files is None
    again = [text.input_ids for text in first.examples] if repeats else ()
    was_training, stream = model.training, Stream(first.seed)
    training = Training(model, optimizer, schedule, stream, held_out, first.history)
    settings = asdict(recipe) | {"lr": first.lr, "seed": first.seed, "accelerate": accelerate}
    same = fingerprint(model, optimizer, held_out, examples=first.examples, **settings) if files else {}
    found = files.newest(same) if files else None
    if found and found["done"]:
        training.go_on(found)
        return
    model.train()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            accelerated(model, tokens, trains=True, texts=again, onednn=pinned(found), on=accelerate) as speed,
            Progress(steps, "training", show=show) as progress,
        ):
            done = training.go_on(found, speed) if found else 0
            progress.update(done)
            for step in range(done, steps):
                wall, cpu = time.perf_counter(), time.process_time()
                chosen = [[run.examples[i] for i in order[step]] for run, order in zip(runs, orders, strict=True)]
                with stream.drawing():
                    losses = objective.backward(model, chosen, orders[0][step], recipe.accumulate, speed)
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
                        run.history.note(loss.item(), run.lr * share, sum(map(tokens_of, texts)), *shares)
                going = [run.history.loss[-1] for run in runs if not run.error]
                if not going:
                    break
                ends = held_out.due(step + 1, steps) and held_out.look(
                    model, objective, math.ceil(size / recipe.accumulate), speed, first.history
                )
                if after_step:
                    with speed.suspended():
                        answer = after_step(first.history.last())
                    _check_held(model, runs, step + 1)
                    stream.watch()
                    ends |= isinstance(answer, str) and answer == STOP
                progress.update(1, f"loss {sum(going) / len(going):.3f}")
                if ends:
                    break
                if files and (step + 1) % files.every == 0:
                    files.write(step + 1, training.state(same, speed))
            for run in runs:
                run.history.speed = speed.words()
            if not first.error:
                held_out.put_back(model, first.history)
            if files and not first.error:
                files.write(len(first.history.loss), training.state(same, speed, done=True))
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


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


def _check(run: Run) -> None:
    if not run.params:
        raise ValueError("expected parameters that require a gradient, got none: inject() adapters first")
    if any(p.is_inference() for p in run.params):
        raise ValueError("expected parameters that can train, got some made inside of torch.inference_mode()")
    if isinstance(run.examples, Example):
        raise ValueError("expected a list with at least one example, got one that is none")
    check_positive("lr", run.lr)
    check_integer("seed", run.seed, -(2**63), 2**64 - 1)


def _mean_length(run: Run, objective: Objective) -> float:
    """Tokens an example; of those for a `loss_fn`, which may be slow to read, the first few say it."""
    n = len(run.examples) if objective.loss_fn is None else min(len(run.examples), 16)
    return sum(tokens_of(run.examples[i]) for i in range(n)) / n


def _check_held(model: nn.Module, runs: Sequence[Run], step: int) -> None:
    """Refuses to go on once somebody has taken what trains out of the model."""
    held = {id(p) for p in model.parameters()}
    if not all(id(p) in held for run in runs for p in run.params):
        raise ValueError(
            f"expected the parameters that train to stay in the model, got others after step {step}: "
            "use folded(), or merge a copy"
        )
