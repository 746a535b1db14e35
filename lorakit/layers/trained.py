"""A whole module trains beside the adapters: a classifier, a norm. PEFT calls it `modules_to_save`."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lorakit.layers.bases import FLOATS, storage_of, stores_transposed, weight_of


class TrainedModule(nn.Module):
    """Trains a copy of a module, in float32 or wider, and keeps the module itself, frozen.

    Code that asks the module for something, such as its `weight`, gets the copy's.

    Args:
        base: any module that is called, with floating-point numbers alone; it is frozen.

    Raises:
        ValueError: a list of modules, which is not called; nothing to train; or numbers that do not train, such as
            those of a quantised layer.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        if type(base).forward is nn.Module.forward:
            raise ValueError(f"expected a module that is called, got a {type(base).__name__}")
        dtypes = {tensor.dtype for tensor in base.state_dict().values()}
        if not dtypes <= set(FLOATS) or not [*base.parameters()]:
            odd = next((each for each in base.modules() if not _all_floats(each)), base)
            raise ValueError(f"expected a module of floating-point numbers, got {storage_of(odd)}")
        self.base = base.requires_grad_(False)
        self.dtype = next(base.parameters()).dtype  # of what it answers
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.trained = copy.deepcopy(base).to(self.wide).requires_grad_(True)
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "trained":
                raise
            return getattr(self.trained, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast((args, kwargs), self.wide)
        return _cast(self.trained(*args, **kwargs), self.dtype)

    def lookup(self, base: nn.Module, x: Tensor) -> Tensor:
        """What `base`, a layer with the same weight, answers with the trained one."""
        return functional_call(base, {"weight": self.table().to(weight_of(base).dtype)}, (x,))

    head = lookup

    def table(self) -> Tensor:
        """The trained weight."""
        return weight_of(self.trained)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the module with the trained values, rounded once to its own dtypes.

        Raises:
            ValueError: a value is not finite.
        """
        if not all(p.is_meta or p.isfinite().all() for p in self.trained.parameters()):
            raise ValueError("expected finite values, got NaN or infinity")
        plain = copy.deepcopy(self.base)
        plain.load_state_dict(self.trained.state_dict())
        return plain.train(self.training)

    def removed(self) -> nn.Module:
        """The module, as it was before."""
        return self.base

    def delta_weight(self) -> Tensor:
        """What training has changed of the weight (d_out, d_in), of a module that has one."""
        change = self.table() - weight_of(self.base)
        return change.T if stores_transposed(self.base) else change

    def peft_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, by the module's own names, as in PEFT's files."""
        return self.trained.state_dict(keep_vars=True)

    def tied_tensors(self) -> dict[str, Tensor]:
        """What PEFT's file has of a layer that follows this one."""
        return {"weight": self.table()}

    def peft_settings(self) -> dict[str, Any]:
        """Nothing: `modules_to_save` has its name alone."""
        return {}

    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values over from a file."""
        self.trained.load_state_dict(dict(tensors))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another dtype, wherever they are in what a module is called with or answers."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def _all_floats(module: nn.Module) -> bool:
    return all(p.dtype in FLOATS for p in module.parameters(recurse=False))
