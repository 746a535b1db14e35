"""Some rows of an embedding, or of an output layer, train: those of new tokens, say, and all others stay.

PEFT calls it `trainable_token_indices`. What trains are the rows themselves, not a change of them, so that a base whose
vocabulary is extended anew, with other random rows for the new tokens, is the same model with them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.bases import (
    check_float_weight,
    dense_weight,
    factors_like,
    is_conv1d,
    linear_shape,
    weight_of,
)
from lorakit.layers.read_weight import HasSizes, ReadWeight
from lorakit.layers.trial import check_embedding, check_linear, row_scale, with_weight

ROWS = "token_adapter.trainable_tokens_delta"  # the rows, by PEFT's name, which says "delta"


class Table(HasSizes):
    """A layer around an embedding or an output layer with another table; a subclass says which in `table()`."""

    def table(self) -> Float[Tensor, "tokens width"]:
        """The rows that count."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base with the rows that count.

        Raises:
            ValueError: the base's weight is quantised, or a row is not finite.
        """
        check_float_weight(self.base)
        table = self.table()
        if not (table.is_meta or table.isfinite().all()):
            raise ValueError("expected finite rows, got NaN or infinity")
        return with_weight(self.base, table).train(self.training)

    def removed(self) -> nn.Module:
        """The base, as it was before."""
        return self.base

    @property
    def weight(self) -> Tensor:
        """The stored table's description, for code that reads it; what computes with it gets the one that counts."""
        stored = weight_of(self.base)
        return ReadWeight.of(stored, lambda: self.table().to(stored.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The base's frozen bias."""
        return getattr(self.base, "bias", None)


class TrainedRows(Table):
    """Replaces rows of a frozen table by trained ones, which start as they are.

    Args:
        base: an embedding, (tokens, width), or an output layer, (width) -> (tokens), quantised or not; it is frozen.
        ids: whose rows; different numbers from 0 to tokens - 1.

    Raises:
        ValueError: another base, or ids that it does not have.
    """

    index: Tensor  # the ids, (rows)
    place: Tensor  # of every token among the rows, -1 for those that stay; (tokens)

    def __init__(self, base: nn.Module, ids: Iterable[int]):
        super().__init__()
        self.ids = tuple(ids)
        dtype, device = factors_like(base)
        if isinstance(base, nn.Embedding):
            check_embedding(base)
        elif is_conv1d(base):
            raise ValueError("expected an embedding or an output layer, got a Conv1D")
        else:
            check_linear(base, *linear_shape(base))
        W = _table(base, dtype)
        odd = [i for i in self.ids if type(i) is not int or not 0 <= i < len(W)]
        if odd or len(set(self.ids)) < len(self.ids) or not self.ids:
            what = f"{odd[0]}: model.resize_token_embeddings first" if odd else f"{list(self.ids)}"
            raise ValueError(f"expected different token ids from 0 to {len(W) - 1}, got {what}")
        self.base = base.requires_grad_(False)
        index = torch.tensor(self.ids, dtype=torch.long, device=device)
        place = torch.full((len(W),), -1, dtype=torch.long, device=device)
        place[index] = torch.arange(len(self.ids), dtype=torch.long, device=device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.rows = nn.Parameter(W[index].clone())
        self.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        return self.lookup(self.base, x) if isinstance(self.base, nn.Embedding) else self.head(self.base, x)

    def lookup(self, base: nn.Module, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """What `base`, an embedding with the same weight, answers with these rows."""
        y, place = base(ids), self.place[ids]
        padding = self.ids.index(base.padding_idx) if base.padding_idx in self.ids else None  # it never trains
        new = row_scale(base) * F.embedding(place.clamp(min=0), self.rows, padding)
        return torch.where((place >= 0)[..., None], new.to(y.dtype), y)

    def head(self, base: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch tokens"]:
        """What `base`, an output layer with the same weight, answers with these rows."""
        y, bias = base(x), getattr(base, "bias", None)
        new = F.linear(x.to(self.rows.dtype), self.rows, None if bias is None else bias[self.index].to(self.rows.dtype))
        return y.index_copy(-1, self.index, new.to(y.dtype))

    def table(self) -> Float[Tensor, "tokens width"]:
        """All rows, those that train and those that stay, in the trained ones' dtype."""
        return _table(self.base, self.rows.dtype).index_copy(0, self.index, self.rows)

    def delta_weight(self) -> Tensor:
        """What training has changed, (width, tokens) of an embedding, (tokens, width) of an output layer."""
        change = self.table() - _table(self.base, self.rows.dtype)
        return change.T if isinstance(self.base, nn.Embedding) else change

    def peft_tensors(self) -> dict[str, Tensor]:
        """The rows, by PEFT's name."""
        return {ROWS: self.rows}

    def tied_tensors(self) -> dict[str, Tensor]:
        """What PEFT's file has of a layer that follows this one: nothing."""
        return {}

    def peft_settings(self) -> dict[str, Any]:
        """Whose rows they are."""
        return {"trainable_token_indices": list(self.ids)}

    @torch.no_grad()
    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the rows over from a file."""
        self.rows.copy_(tensors[ROWS])

    def extra_repr(self) -> str:
        return f"ids={list(self.ids)}"


def _table(base: nn.Module, dtype: torch.dtype) -> Float[Tensor, "tokens width"]:
    """The weight of an embedding or an output layer, a row for each token."""
    W = dense_weight(base, dtype)
    return W.T if isinstance(base, nn.Embedding) else W
