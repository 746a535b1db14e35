"""Cross-entropy of the labelled tokens, without ever holding the logits of a whole batch."""

import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lorakit.layers import shortcuts
from lorakit.layers.bases import frozen_weight, linear_shape
from lorakit.training.batch import IGNORE, PACKED, Batch

CHUNK = 128  # tokens whose logits exist at a time
_not_last: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # heads whose output a model was seen to change


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "labelled vocab"], Int[Tensor, " labelled"]]:
    """The logits that predict each labelled token, and those tokens, row by row.

    The output head is the widest layer of a small model, so it is shown the labelled positions only. A model without
    `get_output_embeddings` computes all logits, of which these are picked.
    """
    before, targets = _labelled(batch)
    head = _head(model)
    if head is None:
        return _forward(model, batch)[before], targets
    whole = False

    def shorten(_, args):
        nonlocal whole
        whole = shortcuts.may_be_recomputed()  # when this hook is gone
        return None if whole else (args[0][before].unsqueeze(0),)

    hook = head.register_forward_pre_hook(shorten)
    try:
        logits = _forward(model, batch)
    finally:
        hook.remove()
    return logits[before] if whole else logits.squeeze(0), targets


def token_losses(model: nn.Module, batch: Batch) -> Float[Tensor, " labelled"]:
    """The cross-entropy, in nats, of each labelled token, given the tokens before it, row by row.

    Where the output head is a frozen linear layer and its output is the model's, the logits of `CHUNK` tokens exist at
    a time, and each chunk's gradient is computed as soon as its logits are. Otherwise as the formula says: for models
    that scale the logits, or cap them. Every pass shows which it is, by what the model makes of an output of the head
    that stands for the logits; a head that was changed once is left to the formula for good.
    """
    head = _head(model)
    if head is None or head in _not_last or frozen_weight(head, next(head.parameters(), batch["labels"])) is None:
        return _formula(model, batch)
    before, targets = _labelled(batch)
    losses: list[Tensor] = []
    whole = False
    hooks: list[RemovableHandle] = []
    state = torch.get_rng_state()
    sign = torch.linspace(-60, 60, linear_shape(head)[0], dtype=torch.float32, device=batch["labels"].device)[
        None, None
    ]

    def shorten(_, args):
        nonlocal whole
        hooks.pop().remove()
        whole = shortcuts.may_be_recomputed()  # when this hook is gone
        if whole:
            return None
        hidden = args[0][before]  # (labelled, d)
        W = frozen_weight(head, hidden)  # asked here: a wrapper may have changed the weight for this pass
        if W is None:
            return (hidden.unsqueeze(0),)
        losses.append(_TokenLosses.apply(hidden, W, getattr(head, "bias", None), targets))
        hooks.append(head.register_forward_hook(lambda _, __, output: sign.to(output.dtype)))
        return (hidden[:0].unsqueeze(0),)  # the head has nothing to do

    hooks.append(head.register_forward_pre_hook(shorten))
    try:
        logits = _forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not losses:
        return F.cross_entropy((logits[before] if whole else logits.squeeze(0)).float(), targets, reduction="none")
    if torch.equal(logits.float(), sign.to(logits.dtype).float()):
        return losses[0]
    _not_last.add(head)
    torch.set_rng_state(state)  # dropout must not notice
    return _formula(model, batch)


def left_to_formula(model: nn.Module) -> bool:
    """Whether `token_losses` has seen that this model changes its head's output."""
    return _head(model) in _not_last


def leave_to_formula(model: nn.Module) -> None:
    """Lets `token_losses` know it without looking, as a training that goes on does."""
    if (head := _head(model)) is not None:
        _not_last.add(head)


def _formula(model: nn.Module, batch: Batch) -> Tensor:
    logits, targets = labelled_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def completion_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the labelled tokens, each given the tokens before it."""
    return token_losses(model, batch).mean()


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of `h W' + b`; its gradient, (softmax - one-hot) W, is made while the logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        W = weight() if callable(weight) else weight  # (vocab, d)
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits, target = F.linear(hidden[part], W, bias).to(losses.dtype), targets[part, None]  # (chunk, vocab)
            logp = logits.log_softmax(-1)
            del logits
            losses[part] = -logp.gather(1, target).squeeze(1)
            if gradient is not None:
                p = logp.exp_()
                p.scatter_add_(1, target, -torch.ones_like(target, dtype=p.dtype))
                gradient[part] = p.to(hidden.dtype) @ W
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses):
        (gradient,) = ctx.saved_tensors
        return gradient * d_losses[:, None].to(gradient.dtype), None, None, None


def _labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the next token is labelled, (batch, seq), and those tokens, (labelled)."""
    labels = batch["labels"]
    before = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    return before, labels[:, 1:][before[:, :-1]]


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "labels"}
    inputs |= PACKED if "position_ids" in batch else {}
    return model(**inputs).logits
