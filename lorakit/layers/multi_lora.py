"""Many adapters over one frozen layer, trained at once: adapter k sees the k-th part of the batch.

Small matrices are stacked, `A: (K, R, d_in)` and `B': (K, R, d_out)`, so that the base's product is done once for all
and the adapters' in one batched product each. A rank below the largest, R, leaves rows of zeros, which stay zero: where
A and B are both zero, so are both gradients. Each adapter's own parameters are views into the stacks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.bases import frozen_weight, weight_of
from lorakit.layers.lora import LoRALinear
from lorakit.layers.read_weight import ReadWeight


class LoRAStack(nn.Module):
    """K LoRALinears over their common base: row i of a batch of K b rows goes through adapter i // b.

    Args:
        layers: the K adapters, None where one leaves this layer alone; without dropout, over one base.
        name: the layer's, for errors.

    Raises:
        ValueError: no adapter, different bases, or dropout.
    """

    A: Tensor  # (K, R, d_in)
    Bt: Tensor  # (K, R, d_out)
    scales: Tensor  # (K, 1, 1)
    tokens: int | None  # that a forward pass must have, if known

    def __init__(self, layers: Sequence[Any], name: str = "this layer"):
        super().__init__()
        present = [layer for layer in layers if layer is not None]
        if len({layer.base for layer in present}) != 1 or any(type(layer) is not LoRALinear for layer in present):
            raise ValueError(f"expected LoRALinears over one base, for layer {name}")
        if any(not isinstance(layer.dropout, nn.Identity) for layer in present):
            raise ValueError(f"expected adapters without dropout, for layer {name}: train those one by one")
        self.base, self.name, self.tokens = present[0].base, name, None
        like, K, R = present[0].A, len(layers), max(layer.rank for layer in present)
        self.register_buffer("A", like.new_zeros(K, R, like.shape[1]), persistent=False)
        self.register_buffer("Bt", like.new_zeros(K, R, len(present[0].B)), persistent=False)
        self.register_buffer("scales", like.new_zeros(K, 1, 1), persistent=False)
        self.layers: Any = nn.ModuleList(present)  # of LoRALinears, which torch's type does not say
        self.places = [k for k, layer in enumerate(layers) if layer is not None]
        for k, layer in zip(self.places, present, strict=True):
            self.scales[k] = layer.scale
            for stacked, parameter in ((self.A[k, : layer.rank], layer.A), (self.Bt[k, : layer.rank].T, layer.B)):
                stacked.copy_(parameter.detach())
                parameter.data = stacked  # what an optimiser does to the parameter, it does to the stack

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if self.tokens is not None and x.shape[:-1].numel() != self.tokens:
            raise ValueError(
                f"expected layer {self.name} to see all {self.tokens} tokens of the batch in order, got "
                f"{x.shape[:-1].numel()}: it may be one of several experts; train its adapters one by one"
            )
        W = frozen_weight(self.base, x)
        if W is None:
            parts, at = list(x.chunk(len(self.A))), dict(zip(self.places, self.layers, strict=True))
            return torch.cat([at[k].formula(part) if k in at else self.base(part) for k, part in enumerate(parts)])
        parameters = [p for layer in self.layers for p in (layer.A, layer.B)]
        y = _LoRAStack.apply(x, self.A, self.Bt, self.scales, W, self.bias, self.places, *parameters)
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight, for model code that asks a layer for its dtype or device."""
        return ReadWeight.of(weight_of(self.base), self._read)

    @property
    def bias(self) -> Tensor | None:
        """The base's frozen bias."""
        return getattr(self.base, "bias", None)

    def _read(self) -> Tensor:
        raise ValueError(f"expected layer {self.name} to be called, got its weight read: train its adapters one by one")

    def release(self) -> None:
        """Gives the adapters matrices of their own again."""
        for layer in self.layers:
            layer.A.data, layer.B.data = layer.A.detach().clone(), layer.B.detach().contiguous().clone()


class _LoRAStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, Bt, scales, weight, bias, places, *parameters):
        W, parts = weight() if callable(weight) else weight, x.reshape(len(A), -1, x.shape[-1])  # (K, n, d_in)
        s = scales.to(x.dtype)
        xa = torch.bmm(parts, A.to(x.dtype).mT) * s  # (K, n, R)
        y = F.linear(parts, W, bias).baddbmm_(xa, Bt.to(x.dtype))  # (K, n, d_out)
        ctx.save_for_backward(parts, xa, A, Bt, s, *([] if callable(weight) else [W]))
        ctx.weight, ctx.places = weight if callable(weight) else None, places
        ctx.ranks, ctx.shape = [len(p) for p in parameters[::2]], x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        parts, xa, A, Bt, s, *W = ctx.saved_tensors
        dy = dy.reshape(len(A), -1, dy.shape[-1])  # (K, n, d_out)
        dxa = torch.bmm(dy, Bt.to(dy.dtype).mT) * s  # (K, n, R)
        dA = torch.bmm(dxa.mT, parts).to(A.dtype)  # (K, R, d_in)
        dBt = torch.bmm(xa.mT, dy).to(A.dtype)  # (K, R, d_out)
        dx = None
        if ctx.needs_input_grad[0]:
            flat = dy.reshape(-1, dy.shape[-1]) @ (W[0] if W else ctx.weight())
            dx = flat.view(parts.shape).baddbmm_(dxa, A.to(dy.dtype)).view(ctx.shape)
        own = [g for k, r in zip(ctx.places, ctx.ranks, strict=True) for g in (dA[k, :r], dBt[k, :r].T)]
        return dx, None, None, None, None, None, None, *own
