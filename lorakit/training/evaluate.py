"""How far one model's predictions are from another's: the Kullback-Leibler divergence of their next tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._numbers import check_integer
from lorakit._progress import Progress
from lorakit._words import short
from lorakit.layers.named_adapters import check_one_choice
from lorakit.speed.accelerated import accelerated
from lorakit.training.batch import IGNORE, Example, check_examples, collate
from lorakit.training.generate import _in_batches
from lorakit.training.loss import labelled_logits


@torch.no_grad()
def log_probabilities(
    model: nn.Module, examples: Sequence[Example], batch_size: int = 32, *, accelerate: bool = True
) -> Float[Tensor, "labelled vocab"]:
    """What the model expects at each labelled token, in nats and float32, examples in their order.

    Memory: 4 bytes times vocabulary a labelled token. The model is left in the mode it was in.
    """
    check_integer("batch_size", batch_size)
    check_examples(model, examples)
    if not len(examples):
        raise ValueError("expected at least one example, got none")
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        found = []
        with accelerated(model, batch_size * 16, on=accelerate):
            for start in range(0, len(examples), batch_size):
                logits, _ = labelled_logits(model, collate(examples[start : start + batch_size], device))
                found.append(F.log_softmax(logits.float(), dim=-1))
        return torch.cat(found)
    finally:
        model.train(was_training)


def kl_divergence(p: Float[Tensor, "labelled vocab"], q: Float[Tensor, "labelled vocab"]) -> float:
    """KL(p || q) = sum p (log p - log q), in nats a token: zero for the same predictions, never below.

    Args:
        p: log-probabilities of the model that is right by definition.
        q: those of the model that is compared with it, at the same tokens.

    Raises:
        ValueError: they are no log-probabilities of the same tokens, or some are NaN.
    """
    for each in (p, q):
        if not isinstance(each, Tensor) or each.dim() != 2 or not each.is_floating_point() or each.isnan().any():
            raise ValueError(f"expected log-probabilities, (labelled, vocab), none of them NaN, got {short(each)}")
    if p.shape != q.shape or not p.numel():
        raise ValueError(f"expected log-probabilities of the same tokens, got {tuple(p.shape)} and {tuple(q.shape)}")
    terms = F.kl_div(q, p, reduction="none", log_target=True).masked_fill(p.isneginf(), 0)  # 0 log 0 = 0
    return max(0.0, terms.sum(-1).mean().item())  # rounding may go below


def exact_match(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, accelerate: bool = True, show: bool = True
) -> list[bool]:
    """Whether the model's first choice is right at every labelled token, given the true tokens before it.

    Greedy generation writes an example's completion exactly if and only if this holds, so one forward pass replaces a
    generation of as many steps as the completion has tokens.

    Args:
        model: a causal language model that returns `.logits`.
        examples: from `encode`.
        batch_size: examples at a time, padded on the right.
        accelerate: use what `speed.accelerated` finds to pay; False for the plain formulas.
        show: draw a progress bar.

    Returns:
        one truth value an example, in their order.
    """
    scored = teacher_forced(model, examples, batch_size=batch_size, accelerate=accelerate, show=show)
    return [exact for exact, _ in scored]


@torch.no_grad()
def teacher_forced(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, accelerate: bool = True, show: bool = True
) -> list[tuple[bool, float]]:
    """For each example what `exact_match` says, and its completion's cross-entropy, in nats, all tokens together.

    The arguments are those of `exact_match`.
    """
    check_integer("batch_size", batch_size)
    check_examples(model, examples)
    check_one_choice(model)
    found, was_training = [(False, 0.0)] * len(examples), model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with (
            accelerated(model, batch_size * 16, on=accelerate),
            Progress(len(examples), "scoring", "example", show) as progress,
        ):
            for batch in _in_batches([len(example.input_ids) for example in examples], batch_size):
                inputs = collate([examples[i] for i in batch], device)
                logits, targets = labelled_logits(model, inputs)
                losses = F.cross_entropy(logits.float(), targets, reduction="none")
                labelled = inputs["labels"][:, 1:] != IGNORE  # (batch, seq - 1)
                wrong, nats = torch.zeros_like(labelled), losses.new_zeros(labelled.shape)
                wrong[labelled], nats[labelled] = logits.argmax(-1) != targets, losses
                for i, bad, total in zip(batch, wrong.any(-1).tolist(), nats.sum(-1).tolist(), strict=True):
                    found[i] = not bad, total
                progress.update(len(batch))
    finally:
        model.train(was_training)
    return found


def share_and_nats(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, accelerate: bool = True, show: bool = True
) -> tuple[float, float]:
    """The share of completions that are exact, in [0, 1], and the cross-entropy in nats per labelled token.

    The arguments are those of `exact_match`.

    Raises:
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("expected at least one example, got none")
    found = teacher_forced(model, examples, batch_size=batch_size, accelerate=accelerate, show=show)
    labelled = sum(label != IGNORE for example in examples for label in example.labels[1:])
    return sum(exact for exact, _ in found) / len(found), sum(nats for _, nats in found) / labelled
