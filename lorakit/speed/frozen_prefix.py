"""Layers below the first that trains answer a text always the same: they are asked once, and their answer is kept.

With adapters in the upper half of a model alone, the forward pass costs half as much from the second epoch on. (The
backward pass stops at the first adapter by itself.)
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.layers.bases import is_watched

MAX_BYTES = 1 << 30  # of kept activations

Span = tuple[int, int, int]  # a text's place in a batch: row, first column, length


class Below:
    """The blocks of a model under the first one that trains, and what came out of them, text by text.

    Args:
        blocks: in the order in which the model runs them, each (batch, seq, d) -> (batch, seq, d).
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks, self.kept = blocks, {}

    @contextmanager
    def batch(self, keys: Sequence[Hashable], spans: Sequence[Span], shape: torch.Size) -> Iterator[None]:
        """While it is open, a forward pass of these texts skips the blocks if all are known, and else remembers.

        Args:
            keys: name the texts.
            spans: where the texts lie in the batch.
            shape: of the batch, (rows, columns).
        """
        if not all(key in self.kept for key in keys):

            def remember(_, __, output):
                if output.shape[:2] != shape:  # somebody tries the model on something else
                    return
                for key, (row, start, length) in zip(keys, spans, strict=True):
                    self.kept[key] = output[row, start : start + length].detach().clone()

            hook = self.blocks[-1].register_forward_hook(remember)
            try:
                yield
            finally:
                hook.remove()
            return
        like = self.kept[keys[0]]
        hidden = like.new_zeros(*shape, like.shape[-1])
        for key, (row, start, length) in zip(keys, spans, strict=True):
            hidden[row, start : start + length] = self.kept[key]
        for block in self.blocks:
            block.forward = lambda *_, **__: hidden
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def below(model: nn.Module, trial: dict[str, Tensor], lengths: Sequence[int]) -> Below | None:
    """Finds what can be skipped, None if that is nothing, would not be exact, or takes more than `MAX_BYTES`.

    Exact means: the blocks answer two trials with different random states alike, and the model's logits with their
    kept answer are, bit for bit, those without. So dropout, hooks and whatever passes the blocks by rule it out.

    Args:
        model: in the mode in which it trains.
        trial: a batch of one or more texts, padded on the right: input_ids and attention_mask.
        lengths: of all texts whose answers would be kept, in tokens.
    """
    blocks = _frozen_blocks(model)
    if not blocks or any(is_watched(module) for block in blocks for module in block.modules()):
        return None
    found = Below(blocks)
    spans = [(row, 0, n) for row, n in enumerate(trial["attention_mask"].sum(1).tolist())]
    once, again = [[f"{name} {row}" for row, _, _ in spans] for name in ("once", "again")]
    try:
        _try(model, trial, found, once, spans, seed=0)
        full, skipping = (_try(model, trial, found, again, spans, seed=1) for _ in range(2))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # no blocks of the usual kind
        return None
    if not torch.equal(full, skipping) or not all(
        torch.equal(found.kept[a], found.kept[b]) for a, b in zip(once, again, strict=True)
    ):
        return None
    token = found.kept[once[0]][0]  # (d)
    size = token.numel() * token.element_size() * sum(lengths)
    return Below(blocks) if size <= MAX_BYTES else None


def _frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """The members, before the first that trains, of the `ModuleList` that has all trainable parameters."""
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and names and all(n.startswith(f"{name}.") for n in names):
            first = min(int(n[len(name) + 1 :].split(".")[0]) for n in names)
            blocks = list(module)
            return blocks[:first] if len(set(blocks)) == len(blocks) else []
    return []


@torch.no_grad()
def _try(
    model: nn.Module, batch: dict[str, Tensor], found: Below, keys: list[str], spans: list[Span], seed: int
) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.random.fork_rng(), found.batch(keys, spans, batch["input_ids"].shape):
        torch.manual_seed(seed)
        return model(**inputs).logits[batch["attention_mask"].bool()]
