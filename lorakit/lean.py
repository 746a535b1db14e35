"""A model's own layers with less kept for the backward pass: what a LoRA step holds is mostly theirs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorakit import gated, norms
from lorakit.fused import is_watched


@contextmanager
def lean(model: nn.Module) -> Iterator[int]:
    """While it is open, gated feed-forward blocks and RMSNorms compute the same, to rounding, with less memory.

    Modules with hooks or a forward of their own stay as they are, and so does whatever does not answer a trial input as
    the formulas in `gated` and `norms` do.

    Yields:
        how many modules it is.
    """
    found = {}
    for module in model.modules():
        if not is_watched(module) and (forward := gated.lean_forward(module) or norms.lean_forward(module)):
            found[module] = forward
    for module, forward in found.items():
        module.forward = forward
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward
