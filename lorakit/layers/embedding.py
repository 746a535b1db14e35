"""LoRA on an embedding: a table of rows, which is a linear layer of one-hot inputs, gets a low-rank update."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.bases import factors_like, weight_of
from lorakit.layers.lora import LoRALinear, ScaleRule
from lorakit.layers.read_weight import HasSizes
from lorakit.layers.trial import check_embedding, row_scale


class LoRAEmbedding(LoRALinear, HasSizes):
    """Adds a low-rank update to a frozen embedding: row i of its table becomes `w_i + s B a_i`, a_i column i of A.

    As in loralib and PEFT, A (rank, tokens) starts at zero and B (width, rank) with normal numbers: the other way round
    than in LoRALinear, so that a token that training never sees keeps its row. A padding token's column never trains.

    Args:
        base: the embedding, with plain numbers; it is frozen, not copied.
        rank, alpha, scale_rule: as for LoRALinear.
        dropout: is noted and not used: there is no input to drop.

    Raises:
        ValueError: a setting is out of range, or the base does not answer with rows of its weight.
    """

    peft_type: ClassVar = "LORA"
    peft_names: ClassVar = {"A": "lora_embedding_A", "B": "lora_embedding_B"}

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, scale_rule: ScaleRule = "lora"):
        super().__init__(base, rank, alpha, dropout, scale_rule)
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    @staticmethod
    def fitting(base: nn.Module) -> tuple[int, int, torch.dtype, torch.device]:
        """As LoRALinear's, of an embedding: its width and how many rows it has."""
        check_embedding(base)
        tokens, width = weight_of(base).shape
        return width, tokens, *factors_like(base)

    @property
    def drops(self) -> bool:
        """False: dropout has no part here."""
        return False

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        return self.lookup(self.base, ids)

    def formula(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """The definition, which is what `forward` does."""
        return self.lookup(self.base, ids)

    def lookup(self, base: nn.Module, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """What `base`, an embedding with the same weight, answers with this update."""
        y = base(ids)
        a = F.embedding(ids, self.A.T, self.padding_idx)  # (*batch, rank)
        return (y + self.scale * row_scale(base) * F.linear(a, self.B)).to(y.dtype)

    def head(self, base: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch tokens"]:
        """What `base`, an output layer with the same weight, answers with this update."""
        y = base(x)
        b = F.linear(x.to(self.B.dtype), self.B.T)  # (*batch, rank)
        return (y + self.scale * F.linear(b, self.A.T)).to(y.dtype)

    def table(self) -> Float[Tensor, "tokens width"]:
        """The rows that count, in the adapter's dtype."""
        return weight_of(self.base).detach().to(self.A.dtype) + self.delta_weight().T

    def tied_tensors(self) -> dict[str, Tensor]:
        """What PEFT's file has of an output layer that follows this embedding."""
        return {"lora_A.weight": self.B.T, "lora_B.weight": self.A.T}
