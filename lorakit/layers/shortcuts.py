"""The switch of all shortcuts: what computes a formula's result in another way asks here whether it may.

It holds for the whole process, as torch's own switches of numerics do: a backward pass may run in another thread.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ENVIRONMENT = "LORAKIT_ACCELERATE"  # 0: no shortcut in this process
_forbidden = 0  # how many blocks that forbid them are open
_lock = threading.Lock()


def allowed() -> bool:
    """True unless a block or the environment forbids shortcuts."""
    return _forbidden == 0 and by_environment()


def by_environment() -> bool:
    """True unless the environment forbids shortcuts for the whole process."""
    return os.environ.get(ENVIRONMENT) != "0"


@contextmanager
def forbidden() -> Iterator[None]:
    """While it is open, every result is the plain formula's, whatever opens inside."""
    global _forbidden
    with _lock:
        _forbidden += 1
    try:
        yield
    finally:
        with _lock:
            _forbidden -= 1


def is_transformed() -> bool:
    """True inside `torch.func`'s transforms (vmap, grad, ...), which an autograd function of ours can't follow.

    torch has no public name for it; tests/project/test_private_names.py watches this one.
    """
    return torch._C._are_functorch_transforms_active()


def may_be_recomputed() -> bool:
    """True inside what gradient checkpointing runs, the first time and again: a shortcut that is taken while a block is
    open must not be taken there, since the second time the block may be closed.

    torch has no public name for it; tests/project/test_private_names.py watches this one.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
