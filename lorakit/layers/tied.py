"""A layer that shares its weight with an embedding which trains, and follows it: a tied output head, say."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.token_rows import Table, TrainedRows
from lorakit.layers.trained import TrainedModule


class Tied(Table):
    """Answers as `base` would with the weight that `source` has learned; it has no parameters of its own.

    Args:
        base: an output layer, or another embedding, with the same weight as the source's base.
        source: what trains in the embedding's place.
    """

    def __init__(self, base: nn.Module, source: LoRAEmbedding | TrainedRows | TrainedModule):
        super().__init__()
        self.base = base.requires_grad_(False)
        self._source = (source,)  # not a part of this module: it is in the model already
        self.training = base.training

    @property
    def source(self) -> Any:
        """What trains."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        answer = self.source.lookup if isinstance(self.base, nn.Embedding) else self.source.head
        return answer(self.base, x)

    def table(self) -> Tensor:
        """The source's."""
        return self.source.table()

    def delta_weight(self) -> Tensor:
        """What the source has learned, as a change of this weight."""
        change = self.source.delta_weight()
        return change if isinstance(self.base, nn.Embedding) else change.T

    def peft_tensors(self) -> dict[str, Tensor]:
        """What PEFT's file has of it besides the source's tensors: copies, which safetensors asks for."""
        return {part: tensor.detach().clone() for part, tensor in self.source.tied_tensors().items()}

    def peft_settings(self) -> dict[str, Any]:
        """That the two are to stay tied, where PEFT would not do so by itself."""
        return {} if isinstance(self.source, TrainedRows) else {"ensure_weight_tying": True}

    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Does nothing: the source takes the values over."""
