"""Modules that answer otherwise for a while."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

NAMES = ("forward", "__deepcopy__")  # what a patched module has of its own


@contextmanager
def patched_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While it is open, each module has a forward of its own, which on any exit gives way to its class's again.

    A copy that is made meanwhile has its class's from the start: the other one computes with the original's weights.
    """
    try:
        for module, forward in forwards.items():
            module.forward = forward
            vars(module)["__deepcopy__"] = _copies_without(module)
        yield
    finally:
        for module, forward in forwards.items():
            vars(module).pop("__deepcopy__", None)
            if vars(module).get("forward") is forward:  # nobody has put another in its place
                del module.forward


def _copies_without(module: nn.Module) -> Callable[[dict[int, Any]], nn.Module]:
    """A `__deepcopy__` that leaves out the forward, and itself."""

    def copied(memo: dict[int, Any]) -> nn.Module:
        own: dict[str, Any] = {name: vars(module).pop(name) for name in NAMES if name in vars(module)}
        try:
            return copy.deepcopy(module, memo)
        finally:
            vars(module).update(own)

    return copied


@contextmanager
def own_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While it is open inside of `patched_forwards`, the modules are as they were before: to be copied, say."""
    patched = [module for module, forward in forwards.items() if vars(module).get("forward") is forward]
    for module in patched:
        del module.forward
    try:
        yield
    finally:
        for module in patched:
            if "forward" not in vars(module):  # nobody has put another in its place
                module.forward = forwards[module]
