"""Several adapters over one frozen layer, chosen by name: one for a whole call, or one for each row of a batch.

    y[i] = W x[i] + s_k B_k A_k x[i]        where row i has adapter k; without one, y[i] = W x[i]

The base's product is done once for all rows, the thin ones adapter by adapter, as in Punica and S-LoRA (Chen et al.
2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285). `LoRAStack` is for training: equal shares of a batch.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.bases import is_watched, weight_of
from lorakit.layers.lora import LoRALinear
from lorakit.layers.read_weight import ReadWeight

_lock = threading.Lock()


@dataclass(eq=False)
class Rows:
    """An adapter's name for each row of a batch, None for the base."""

    names: tuple[str | None, ...]
    tokens: int | None = None  # of each row of the call that runs, if known

    @cached_property
    def groups(self) -> list[tuple[str, slice | Tensor]]:
        """Each adapter that is named and where its rows are."""
        found = []
        for name in dict.fromkeys(name for name in self.names if name is not None):
            at = [row for row, each in enumerate(self.names) if each == name]
            together = at[-1] - at[0] == len(at) - 1
            found.append((name, slice(at[0], at[-1] + 1) if together else torch.tensor(at, dtype=torch.long)))
        return found


Chosen = str | None | Rows
_chosen: ContextVar[Mapping["Choice", Chosen] | None] = ContextVar("chosen", default=None)  # of each thread


class Choice:
    """The adapters of a model, and with which its layers answer: one object for all of them."""

    def __init__(self) -> None:
        self.names: list[str] = []  # of all, in the order in which they came
        self.name: str | None = None  # outside of any block
        self.uses: Counter[str | None] = Counter()  # in blocks that are open, of any thread

    def now(self) -> Chosen:
        """A name, None for the base, or one for each row."""
        return (_chosen.get() or {}).get(self, self.name)

    @contextmanager
    def of(self, chosen: Chosen) -> Iterator[None]:
        """While it is open, this is chosen in this thread."""
        names = set(chosen.names if isinstance(chosen, Rows) else [chosen])
        token = _chosen.set({**(_chosen.get() or {}), self: chosen})
        with _lock:
            self.uses.update(names)
        try:
            yield
        finally:
            _chosen.reset(token)
            with _lock:
                self.uses.subtract(names)


class NamedAdapters(nn.Module):
    """Adapters by name over one base; some names of the model may have none here, and get the base's answer.

    To the rest of lorakit it is an adapter: merged, it is the one that is chosen; removed, the base.

    Args:
        base: the frozen layer.
        choice: the model's.
        name: the layer's, for errors.
        is_expert: whether it may be one of several experts, which see some of the tokens in an order of their own.
    """

    def __init__(self, base: nn.Module, choice: Choice, name: str = "this layer", is_expert: bool = False):
        super().__init__()
        self.base, self.choice, self.name, self.is_expert = base, choice, name, is_expert
        self.names: list[str] = []
        self.layers: Any = nn.ModuleList()  # in the order of the names

    def get(self, name: str | None) -> Any:
        """The adapter of that name, None if there is none here."""
        return self.layers[self.names.index(name)] if name in self.names else None

    def put(self, name: str, layer: nn.Module) -> None:
        """Takes an adapter in, which wraps this base."""
        self.names.append(name)
        self.layers.append(layer)

    def drop(self, name: str) -> None:
        """Lets an adapter go, if there is one of that name."""
        if name in self.names:
            del self.layers[self.names.index(name)]
            self.names.remove(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = self.choice.now()
        if not isinstance(chosen, Rows):
            return self._answering(chosen)(x, *args, **kwargs)
        size = self._row_size(chosen, x, len(args) + len(kwargs))
        y = self.base(x)  # (*batch, d_out)
        if is_watched(self.base):  # whoever watches keeps the base's answer
            y = y.clone()
        xs, ys = x.unflatten(0, size), y.unflatten(0, size)  # (rows, ..., d)
        for name, at in chosen.groups:
            layer = self.get(name)
            if type(layer) is LoRALinear:
                ys[at] += layer.update(xs[at])
            elif layer is not None:
                ys[at] = layer(xs[at])
        return y

    def _row_size(self, chosen: Rows, x: Tensor, others: int) -> tuple[int, ...]:
        """How the first dimension of an input divides into rows, and their tokens if both are one there."""
        rows, tokens = len(chosen.names), chosen.tokens
        if not others and not (self.is_expert and x.ndim == 2):
            if len(x) == rows:
                return (rows,)
            if x.ndim == 2 and tokens is not None and len(x) == rows * tokens:
                return rows, tokens
        raise ValueError(
            f"expected a row for each of {rows} names, got an input of shape {tuple(x.shape)} at layer {self.name}"
            + (": an expert's tokens are in no order of rows; choose one adapter for all" if self.is_expert else "")
        )

    def _answering(self, name: str | None) -> Any:
        layer = self.get(name)
        return self.base if layer is None else layer

    def _one(self) -> Any:
        """The layer that answers all rows."""
        chosen = self.choice.now()
        if isinstance(chosen, Rows):
            raise ValueError(f"expected one adapter for all rows, got one for each at layer {self.name}")
        return self._answering(chosen)

    def merged(self) -> nn.Module:
        """A plain layer that answers as the chosen adapter; the base stays as it is.

        Raises:
            ValueError: none is chosen, or the adapter refuses it.
        """
        if self.choice.now() is None:
            raise ValueError("expected an adapter to merge, got none chosen: call set_adapter() first")
        layer = self._one()
        return layer if layer is self.base else layer.merged()

    def removed(self) -> nn.Module:
        """The base, as it was before."""
        return self.base

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight; code that computes with it, instead of calling the layer, gets the chosen one's."""
        return ReadWeight.of(weight_of(self.base), self._effective_weight)

    def _effective_weight(self) -> Tensor:
        weight = self._one().weight
        return weight.value() if isinstance(weight, ReadWeight) else weight

    @property
    def bias(self) -> Tensor | None:
        """The base's frozen bias."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        return f"names={self.names}"


def check_one_choice(model: nn.Module) -> None:
    """Refuses adapters that are chosen row by row, for code that puts the rows of its batches together itself.

    Raises:
        ValueError: they are.
    """
    layer = next((module for module in model.modules() if isinstance(module, NamedAdapters)), None)
    if layer is not None and isinstance(layer.choice.now(), Rows):
        raise ValueError("expected one adapter for all texts, got one for each row: they are sorted by length here")
