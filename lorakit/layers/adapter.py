"""What an adapter is: the protocol by which the rest of lorakit asks a layer, whatever its class."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Adapter(Protocol):
    """A layer around a frozen `base`. `inject`, `merge` and `remove` need `base` and `merged`; the others ask for more.

    LoRALinear has all of it, so a layer that derives from it says only what it does otherwise. Parameters of its own
    are saved and loaded with the rest, as long as it is called with `base, rank, alpha` and the keywords that it wants:

        class Gated(lorakit.LoRALinear):
            def __init__(self, base, rank, alpha, **settings):
                super().__init__(base, rank, alpha, **settings)
                self.gate = nn.Parameter(torch.ones(()))

            def forward(self, x):
                return self.base(x) + self.gate * self.scale * (x @ self.A.T) @ self.B.T

            def delta_weight(self):
                return self.gate * super().delta_weight()

        lorakit.inject(model, 8, 16, layer=Gated)
        lorakit.load_adapter(other, lorakit.save_adapter(model, "gated"), layer=Gated)

    Its file names the method "Gated", which PEFT does not know and refuses.
    """

    base: nn.Module

    def merged(self) -> nn.Module:
        """A plain layer that answers as this one; the base stays as it is. Refuses what it cannot do."""
        ...

    def removed(self) -> nn.Module:
        """The plain layer without what has been learned."""
        ...

    def delta_weight(self) -> Tensor:
        """What has been learned, as a change (d_out, d_in) of the base's weight."""
        ...

    def peft_tensors(self) -> dict[str, Tensor]:
        """What a file holds of this layer, by the names that follow the layer's there, such as `lora_A.weight`."""
        ...

    def peft_settings(self) -> dict[str, Any]:
        """What adapter_config.json has to say of it: `peft_type`, `r`, `lora_alpha`, `use_rslora`, `lora_dropout` ...

        `peft_type` is "LORA" if PEFT understands the tensors, else a name of its own. Under such a name there may be
        further settings, which must be JSON; loading hands them to the class as keywords.
        """
        ...

    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the values of `peft_tensors()`; names and shapes have been compared."""
        ...


def is_adapter(module: nn.Module) -> bool:
    """True for a module that wraps a `base` and can return it `merged()`: LoRALinear, or a reader's own layer."""
    return isinstance(getattr(module, "base", None), nn.Module) and callable(getattr(module, "merged", None))


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that are not its base's."""
    return {name: p for name, p in layer.named_parameters() if not name.startswith("base.")}
