"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685)."""

import copy
import math
from collections.abc import Callable
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.bases import frozen_weight, is_conv1d, linear_shape
from lorakit.layers.bnb import is_linear4bit, keep_order
from lorakit.layers.fused import lora_linear

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, section 4.1
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023, arXiv:2312.03732
}


class LoRALinear(nn.Module):
    """Adds a low-rank update to a frozen linear layer: `y = base(x) + s B A dropout(x)`.

    `A` starts uniform in ±1/sqrt(d_in) (as in PEFT and loralib) and `B` at zero, so the output is at first the base's.
    Both are float32, or float64 on a float64 base: small updates are lost in bfloat16.

    Args:
        base: the layer to adapt, (d_in) -> (d_out), with or without bias; it is frozen, not copied.
        rank: inner dimension r >= 1.
        alpha: numerator of the scale s.
        dropout: probability in [0, 1) of zeroing an input of A during training (never of the base).
        scaling: `"lora"` for s = alpha / r, `"rslora"` for s = alpha / sqrt(r), or a function (alpha, rank) -> s.

    Raises:
        ValueError: rank, alpha, dropout or scaling out of range, or a base that is not linear-like.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, scaling="lora"):
        super().__init__()
        if isinstance(base, LoRALinear):
            raise ValueError("expected a plain linear layer, got a LoRALinear: it is adapted already")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"expected an integer rank >= 1, got {rank!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"expected dropout in [0, 1), got {dropout!r}")
        if isinstance(scaling, str) and scaling not in SCALINGS:
            raise ValueError(f"expected scaling in {sorted(SCALINGS)} or a function (alpha, rank), got {scaling!r}")
        d_out, d_in = linear_shape(base)
        self.rank, self.alpha, self.scaling = rank, alpha, scaling
        self.scale = float((SCALINGS[scaling] if isinstance(scaling, str) else scaling)(alpha, rank))
        if not math.isfinite(self.scale):
            raise ValueError(f"expected a finite scale, got {self.scale} from alpha {alpha!r}")
        if is_linear4bit(base):
            keep_order(base)
        self.base = base.requires_grad_(False)
        like = next(chain(base.parameters(), base.buffers()))
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=like.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=dtype, device=like.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.training = self.dropout.training = base.training

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if self.drops or (W := frozen_weight(self.base, x)) is None:
            return self.formula(x)
        return lora_linear(x, W, self.bias, self.A, self.B, self.scale)  # the same, faster

    def formula(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The definition of the layer, in plain operations."""
        y = self.base(x)  # (*batch, d_out)
        xa = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (*batch, rank)
        return (y + self.scale * F.linear(xa, self.B)).to(y.dtype)  # (*batch, d_out)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The update `s B A` that training has learned, in the adapter's dtype."""
        return self.scale * (self.B @ self.A)  # (d_out, d_in)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base with weight `W + s B A`, summed in the adapter's dtype and rounded once to the base's.

        Raises:
            ValueError: the base's weight is quantised; dequantise it first.
        """
        if not self.base.weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point base, got {type(self.base).__name__} ({self.base.weight.dtype}): "
                "lorakit.models.quantize.dequantize_model first"
            )
        delta = self.delta_weight().T if is_conv1d(self.base) else self.delta_weight()  # as the base stores its weight
        plain = copy.deepcopy(self.base)
        plain.weight.copy_(plain.weight.to(delta.dtype) + delta)
        return plain.train(self.training)

    def removed(self) -> nn.Module:
        """The base, as it was before."""
        return self.base

    @property
    def drops(self) -> bool:
        """True while dropout is at work."""
        return self.training and not isinstance(self.dropout, nn.Identity)

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight, for model code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's frozen bias."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}"
