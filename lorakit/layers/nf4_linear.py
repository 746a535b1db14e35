"""A linear layer that is stored in four bits a value."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.layers.bases import is_conv1d, is_plain, storage_of, weight_of
from lorakit.layers.fused import frozen_linear
from lorakit.layers.nf4 import (
    BLOCK_SIZE,
    NF4,
    ByteAbsmax,
    dequantize,
    dequantize_absmax,
    quantize,
    quantize_absmax,
)
from lorakit.layers.read_weight import ReadWeight


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is stored in four bits a value; it is dequantised whenever it is used.

    It takes LoRA as any other layer does: `LoRALinear(NF4Linear(linear), rank, alpha)` is QLoRA. Gradients pass through
    to the input; nothing of the weight's size is kept for the backward pass.

    Args:
        linear: an `nn.Linear` or a `Conv1D`; it is left as it is.
        block_size: values that share an absmax, even.
        double_quant: whether absmax is stored in bytes too.
        codebook: the numbers that values are rounded to.

    Attributes:
        codes: of W (d_out, d_in), two to a byte.
        dtype: of the weight that was quantised.
        source_cls: the class of the layer that was quantised.
    """

    out_features: int
    in_features: int
    codes: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        block_size: int = BLOCK_SIZE,
        double_quant: bool = True,
        codebook: tuple[float, ...] = NF4,
    ):
        super().__init__()
        if not is_plain(linear):
            raise ValueError(f"expected an nn.Linear or a Conv1D, got {storage_of(linear)}")
        W = weight_of(linear).detach()
        W = W.T if is_conv1d(linear) else W
        self.out_features, self.in_features = W.shape
        self.dtype, self.block_size, self.codebook, self.source_cls = W.dtype, block_size, codebook, type(linear)
        codes, absmax = quantize(W, codebook, block_size)
        self.register_buffer("codes", codes)
        names, values = (ByteAbsmax._fields, quantize_absmax(absmax)) if double_quant else (["values"], [absmax])
        self.absmax_names = [f"absmax_{name}" for name in names]
        for name, value in zip(self.absmax_names, values, strict=True):
            self.register_buffer(name, value)
        bias = getattr(linear, "bias", None)
        bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.train(linear.training)

    def frozen_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "d_out d_in"]:
        """W as the codes have it, in `dtype`, that of the original if None."""
        parts = [getattr(self, name) for name in self.absmax_names]
        absmax = dequantize_absmax(ByteAbsmax(*parts)) if len(parts) > 1 else parts[0]
        shape = (self.out_features, self.in_features)
        return dequantize(self.codes, absmax, shape, dtype or self.dtype, self.codebook, self.block_size)

    @property
    def weight(self) -> Tensor:
        """The codes as int8, by which model code that looks at a layer's dtype knows quantised weights.

        Code that computes with it, instead of calling the layer, gets W.
        """
        return ReadWeight.of(self.codes.view(torch.int8), self._stored_weight)

    def _stored_weight(self) -> Tensor:
        """W as the quantised layer stored it."""
        return self.frozen_weight().T if self.source_cls is not nn.Linear else self.frozen_weight()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return frozen_linear(x, partial(self.frozen_weight, x.dtype), bias)

    def _apply(self, fn, recurse=True):
        """Moves to a device as every module does; absmax stays float32, whatever dtype is asked for."""
        kept = {name: getattr(self, name) for name in self.absmax_names}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            self._buffers[name] = value.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
