"""Layers below the first that trains answer a text always the same: they are asked once, and their answer is kept.

With adapters in the upper half of a model alone, the forward pass costs half as much from the second epoch on. (The
backward pass stops at the first adapter by itself.)
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit._random import seeded
from lorakit.layers.bases import is_watched
from lorakit.speed.patching import patched_forwards

MAX_BYTES = 1 << 30  # of kept activations

Span = tuple[int, int, int]  # a text's place in a batch: row, first column, length


class Below:
    """The blocks of a model under the first one that trains, and what came out of them, text by text.

    Args:
        blocks: in the order in which the model runs them, each (batch, seq, d) -> (batch, seq, d).
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = blocks
        self.kept: dict[Hashable, Tensor] = {}

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
        with patched_forwards(dict.fromkeys(self.blocks, lambda *_, **__: hidden)):
            yield


def below(model: nn.Module, texts: Sequence[Sequence[int]]) -> tuple[Below | None, str]:
    """Finds what can be skipped, None if that is nothing, would not be exact, or takes more than `MAX_BYTES`; and why.

    Exact means: the blocks answer two trials with different random states alike, and the model's logits with their
    kept answer are, bit for bit, those without. So dropout, hooks and whatever passes the blocks by rule it out.

    Args:
        model: in the mode in which it trains.
        texts: token ids of all whose answers would be kept; it is tried on the two longest.
    """
    blocks = _frozen_blocks(model)
    if not blocks:
        return None, "the first block trains, or something outside of the blocks"
    if any(is_watched(module) for block in blocks for module in block.modules()):
        return None, "something in the frozen blocks has a hook or another forward"
    found, trial = Below(blocks), _padded(sorted(texts, key=len)[-2:], next(model.parameters()).device)
    spans = [(row, 0, n) for row, n in enumerate(trial["attention_mask"].sum(1).tolist())]
    once, again = [[f"{name} {row}" for row, _, _ in spans] for name in ("once", "again")]
    try:
        _try(model, trial, found, once, spans, seed=0)
        full, skipping = (_try(model, trial, found, again, spans, seed=1) for _ in range(2))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # no blocks of the usual kind
        return None, "the model does not run without the frozen blocks"
    if not torch.equal(full, skipping) or not all(
        torch.equal(found.kept[a], found.kept[b]) for a, b in zip(once, again, strict=True)
    ):
        return None, "the frozen blocks do not answer twice alike (dropout?), or are passed by"
    token = found.kept[once[0]][0]  # (d)
    size = token.numel() * token.element_size() * sum(map(len, texts))
    if size > MAX_BYTES:
        return None, f"{size / 1e9:.2g} GB of activations, {MAX_BYTES / 1e9:.2g} are allowed"
    return Below(blocks), f"{len(blocks)} frozen blocks, {size / 1e6:.2g} MB of activations"


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    ids, ones = (
        [torch.tensor(row, dtype=torch.long) for row in rows] for rows in (texts, [[1] * len(text) for text in texts])
    )
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device),
        "attention_mask": nn.utils.rnn.pad_sequence(ones, batch_first=True).to(device),
    }


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
    with seeded(seed), found.batch(keys, spans, batch["input_ids"].shape):
        return model(**batch).logits[batch["attention_mask"].bool()]
