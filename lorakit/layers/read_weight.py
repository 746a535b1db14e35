"""What model code gets that reads a layer's `weight` instead of calling the layer.

Most of it asks for a dtype or a shape, and should get that of what is stored. Some computes: torch's encoder layer in
eval mode, Mamba with its `dt_proj`. It must get the weight that counts, adapter included, or hear that there is none.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# what may be asked of a stored weight: its description, as methods and as attributes
METHODS: tuple[str, ...] = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "storage_offset",
    "data_ptr",
)
METHODS += ("is_floating_point", "is_complex", "is_contiguous", "get_device", "is_inference", "__len__", "__hash__")
ATTRIBUTES: tuple[str, ...] = (
    "dtype",
    "device",
    "shape",
    "ndim",
    "layout",
    "itemsize",
    "nbytes",
    "is_cuda",
    "is_cpu",
    "is_meta",
)
ATTRIBUTES += ("is_sparse", "is_quantized", "is_leaf", "requires_grad", "grad_fn", "names", "is_mps", "is_xpu")


SIZES = ("num_embeddings", "embedding_dim", "padding_idx", "in_features", "out_features")


class HasSizes(nn.Module):
    """A module around a `base`, whose sizes it has as well, for code that asks an embedding or a head for them."""

    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name) if name in SIZES else super().__getattr__(name)


class ReadWeight(Tensor):
    """A stored weight's description; whatever computes with it gets `value()` instead."""

    stored: Tensor
    value: Callable[[], Tensor]

    @classmethod
    def of(cls, stored: Tensor, value: Callable[[], Tensor]) -> Tensor:
        """A description of `stored` that stands for `value()`."""
        stored = stored.stored if isinstance(stored, cls) else stored.detach()
        where = {"dtype": stored.dtype, "device": stored.device, "layout": stored.layout}
        read: Any = Tensor._make_wrapper_subclass(cls, stored.shape, strides=stored.stride(), **where)  # type: ignore
        read.stored, read.value = stored, value
        return read

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        getter = getattr(func, "__self__", None) if func.__name__ == "__get__" else None
        if getter.__name__ in ATTRIBUTES if getter is not None else func.__name__ in METHODS:
            args, kwargs = tree_map_only(cls, lambda read: read.stored, (args, kwargs or {}))
            return func(*args, **kwargs)
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):
            raise ValueError("expected a frozen weight to be left alone, got it changed in place: change the base's")
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        args, kwargs = tree_map_only(cls, lambda read: read.value(), (args, kwargs or {}))
        return func(*args, **kwargs)
