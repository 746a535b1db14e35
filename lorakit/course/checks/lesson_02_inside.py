"""The checks of what a reader writes inside lesson 02: forward pass, injection, loss and training step."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.course.checks.exercise import Case, exercise
from lorakit.course.checks.grading import CheckFailed, ask, judge, random_matrix, require
from lorakit.layers.lora import LoRALinear


@exercise("right: W x + s B A x for two shapes, ranks and scales", "the output")
def check_forward() -> Iterator[Case]:
    """Checks `forward(x, W, A, B, alpha) -> y`, rows of x for rows of y."""
    for d_out, d_in, rank, alpha in [(4, 6, 2, 3.0), (7, 7, 3, 8.0)]:
        x, W = random_matrix(5, d_in, seed=1), random_matrix(d_out, d_in, seed=2)
        A, B = random_matrix(rank, d_in, seed=3), random_matrix(d_out, rank, seed=4)
        update = x @ A.T @ B.T
        mistakes = {
            "has no scale: s = alpha / r": x @ W.T + update,
            "is scaled by alpha: divide by the rank, the number of rows of A": x @ W.T + alpha * update,
            "is the update alone: add the frozen layer's output": alpha / rank * update,
            "is the frozen layer's alone: add the update": x @ W.T,
            "has the scale on both paths: it belongs to the update": alpha / rank * (x @ W.T + update),
        }
        on = f"x (5, {d_in}), W ({d_out}, {d_in}), r = {rank}, alpha = {alpha:g}"
        yield Case(on, (x, W, A, B, alpha), x @ W.T + alpha / rank * update, mistakes)


def check_inject(inject: Any) -> None:
    """Checks `inject(model, names, wrap) -> model`: the named layers wrapped, at any depth, and all else frozen."""
    on = 'a model with layers "head" and "blocks.0.up", which are named, and "blocks.1.up", which is not'
    names = ["head", "blocks.0.up"]
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2))})
        model["norm"], model["head"] = nn.LayerNorm(3), nn.Linear(3, 2)
    before = dict(model.named_modules())
    got = ask(inject, model, names, partial(LoRALinear, rank=2, alpha=4.0), on=on, in_place=True)
    require(isinstance(got, nn.Module), on, f"expected the model, got {type(got).__name__}")
    after = dict(got.named_modules())
    for name in names:
        layer = after.get(name)
        if not isinstance(layer, LoRALinear):
            raise CheckFailed(f"{on}: {name!r} is not wrapped: set the attribute of the module that holds it")
        require(layer.base is before[name], on, f"{name!r} has another layer inside: wrap the one that is there")
    others = [name for name, module in after.items() if isinstance(module, LoRALinear) and name not in names]
    require(not others, on, f"{', '.join(others)} should have no adapter: wrap the named layers alone")
    trains = {name for name, p in got.named_parameters() if p.requires_grad}
    wanted = {f"{name}.{matrix}" for name in names for matrix in "AB"}
    require(trains >= wanted, on, "A and B do not train: freeze the model before you wrap its layers, not afterwards")
    extra = ", ".join(sorted(trains - wanted))
    require(trains == wanted, on, f"{extra} would train too: freeze the whole model first")
    require(got is model, on, "expected the same model, changed in place, not a copy of it")
    print("right: layers at two depths wrapped, the others left alone, and A and B alone would train")


@exercise("right: the next token's loss, over labelled positions alone, in nats per token", "the loss")
def check_masked_loss() -> Iterator[Case]:
    """Checks `masked_loss(logits, labels) -> loss`: logits (batch, seq, vocabulary), labels (batch, seq)."""
    for batch, seq, vocabulary, seed in [(2, 6, 9, 1), (3, 4, 7, 2)]:
        logits = 2 * random_matrix(batch, seq, vocabulary, seed=seed)
        labels = torch.randint(vocabulary, (batch, seq), generator=torch.Generator().manual_seed(seed))
        labels[:, : seq // 2], labels[0, -1] = -100, -100  # the question; and padding in one row
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        rows, counted = each.view(batch, -1).sum(1), (labels[:, 1:] != -100).sum(1)
        backward = F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())
        mistakes = {
            "is not shifted: the logits at a position predict the token after it": _loss(logits, labels),
            "is shifted the wrong way: drop the last logits and the first labels": backward,
            "is a sum: divide by the number of labelled tokens": each.sum(),
            "is divided by all positions: only labelled ones count": each.mean(),
            "is a mean of the rows' means: a long answer has more tokens, and counts for more": (rows / counted).mean(),
            "counts unlabelled positions too, as if -100 were a token": _loss(logits[:, :-1], labels[:, 1:].clamp(0)),
            "is not in nats: take the natural logarithm": each.sum() / counted.sum() / math.log(2),
        }
        on = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        yield Case(on, (logits, labels), each.sum() / counted.sum(), mistakes)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def check_training_step(step: Any) -> None:
    """Checks `training_step(model, batch, loss_of, optimizer) -> loss`: clipped to norm 1, gradients cleared."""
    on = "two steps of SGD on a linear layer, the gradient's norm above 1"
    reference, losses = _two_steps("", on)
    moved = {hint: _two_steps(mistake, on)[0] for mistake, hint in STEP_MISTAKES.items()}
    model, got = _two_steps(step, on)
    judge(model, reference, moved, on, "the model after them")
    for number, (value, want) in enumerate(zip(got, losses, strict=True), 1):
        judge(value, want, {}, on, f"the loss that step {number} returns")
    print("right: loss, backward, clip, step, and no gradient left over for the next step")


STEP_MISTAKES = {  # what is done otherwise -> its hint
    "uncleared": "has the first step's gradient in the second step: set the gradients to None or zero",
    "unclipped": "moved by the whole gradient: clip its norm to 1, before the optimiser's step",
    "cleared early": "has not moved: gradients were cleared between backward and the optimiser's step",
    "values": "moved by a gradient whose values were clipped: clip its norm",
}


def _two_steps(step: Any, on: str) -> tuple[Tensor, list]:
    """Two steps of a reader's function, or of ours with a named mistake: the parameters then, and the losses."""
    model = nn.utils.skip_init(nn.Linear, 3, 2)
    for seed, p in enumerate(model.parameters()):
        p.data = random_matrix(*p.shape, seed=seed)
    batches = [(random_matrix(4, 3, seed=seed), random_matrix(4, 2, seed=seed + 1)) for seed in (5, 7)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        function = partial(_step, mistake=step) if isinstance(step, str) else step
        losses.append(ask(function, model, batch, _distance, optimizer, on=on, in_place=True))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def _distance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 10 * (model(batch[0]) - batch[1]).square().mean()


def _step(model: nn.Module, batch: Any, loss_of: Any, optimizer: torch.optim.Optimizer, mistake: str) -> float:
    params = list(model.parameters())
    loss = loss_of(model, batch)
    loss.backward()
    if mistake == "cleared early":
        optimizer.zero_grad()
    if mistake == "values":
        nn.utils.clip_grad_value_(params, 1.0)
    elif mistake != "unclipped":
        nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    if mistake != "uncleared":
        optimizer.zero_grad()
    return loss.item()
