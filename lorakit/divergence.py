"""How far one model's predictions are from another's: the Kullback-Leibler divergence of their next tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.batch import Example, collate
from lorakit.loss import labelled_logits


@torch.no_grad()
def log_probabilities(
    model: nn.Module, examples: Sequence[Example], batch_size: int = 32
) -> Float[Tensor, "labelled vocab"]:
    """What the model expects at each labelled token, in nats and float32, examples in their order.

    Memory: 4 bytes times vocabulary a labelled token. The model is left in the mode it was in.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        found = []
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
    """
    return max(0.0, F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item())  # rounding may go below
