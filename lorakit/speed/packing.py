"""Whether a model keeps texts apart that share a row, so that short ones need not be padded to the longest."""

import torch
from torch import nn

from lorakit.layers.bnb import repacking_prevented
from lorakit.speed.decision import Decision

TOLERANCE = {2: 0.05, 4: 1e-4, 8: 1e-4}  # of the logits, relative, by bytes a value of the weights


@torch.no_grad()
def packable(model: nn.Module) -> Decision:
    """Tries whether a model keeps packed texts apart.

    What stands before a text must not change a bit of the text's logits, and they must be those of the text alone.
    """
    like, was_training = next(model.parameters()), model.training
    first, other, text = [3, 1, 2, 4, 1], [2, 4, 3, 1, 3], [1, 3, 2, 4, 2, 1]
    places = torch.tensor([[*range(len(first)), *range(len(text))]], dtype=torch.long, device=like.device)
    model.eval()
    try:
        with repacking_prevented(model):
            alone = model(input_ids=torch.tensor([text], dtype=torch.long, device=like.device)).logits.float()
            rows = [torch.tensor([before + text], dtype=torch.long, device=like.device) for before in (first, other)]
            answers = [model(input_ids=row, position_ids=places, use_cache=False).logits for row in rows]
            behind = [logits[:, len(first) :] for logits in answers]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return Decision(False, "the model takes no positions, or not such ones")
    finally:
        model.train(was_training)
    if not torch.equal(*behind):
        return Decision(False, "the model does not keep packed texts apart")
    error, allowed = (
        ((behind[0].float() - alone).norm() / alone.norm()).item(),
        TOLERANCE.get(like.element_size(), 0.05),
    )
    return Decision(error < allowed, f"relative error of the logits {error:.0e}, below {allowed:.0e} is needed")
