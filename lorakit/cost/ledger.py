"""Follows the tensors of a piece of work: the bytes that exist at its peak, of which kind, and its matrix products."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Products of groups of rows with a matrix each, as a mixture of experts does them."""
    return 2 * a.numel() * b.shape[-1]


# torch's FlopCounterMode counts as well, but what it holds meanwhile adds to the peak that is measured here.
FLOPS = {
    **flop_registry,  # torch's own formulas know neither attention on a CPU nor experts
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
    aten._grouped_mm: _grouped_flops,
}


class Ledger(TorchDispatchMode):
    """While it is open, sees every storage come and go, and counts the FLOPs of matrix products.

    It counts what torch's operations return, views once; what a kernel needs for itself stays unseen. Work on fake
    tensors (`torch._subclasses.FakeTensorMode`), which have shapes and no values, costs no memory and counts the same.

    Args:
        kind_of: names the kind of a new tensor.

    Attributes:
        now: bytes of every kind that exist.
        peak: the same at the moment when they were the most.
        peak_flops: what `flops` was then.
        flops: of matrix products, convolutions and attention so far; a multiplication and an addition are two. Causal
            attention counts as full.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda _: "temporaries"):
        super().__init__()
        self.kind_of, self.flops, self.peak_flops = kind_of, 0, 0
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}  # a storage's id -> itself, its bytes, its kind

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Enters a tensor's storage, under `kind` or what `kind_of` says; one that is known keeps its kind."""
        storage = tensor.untyped_storage()
        place, size = id(storage), storage.nbytes()
        if place in self._live:
            return
        kind = kind or self.kind_of(tensor)
        self._live[place] = weakref.ref(storage, lambda _: self._remove(place)), size, kind
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak, self.peak_flops = self.now.copy(), self.flops

    def move(self, tensor: Tensor, kind: str) -> None:
        """Gives a known tensor's storage another kind."""
        self._move(id(tensor.untyped_storage()), kind)

    def move_all(self, old: str, new: str) -> None:
        """Gives all that exists of one kind another."""
        for place in [place for place, (_, _, kind) in self._live.items() if kind == old]:
            self._move(place, new)

    def _move(self, place: int, kind: str) -> None:
        storage, size, old = self._live[place]
        self._live[place] = storage, size, kind
        self.now[old] -= size
        self.now[kind] += size

    def _remove(self, place: int) -> None:
        _, size, kind = self._live.pop(place)
        self.now[kind] -= size
