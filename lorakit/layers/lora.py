"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit._numbers import check_integer, is_number
from lorakit.layers.adapter import own_parameters
from lorakit.layers.bases import (
    check_float_weight,
    dense_weight,
    factors_like,
    frozen_weight,
    linear_shape,
    stores_transposed,
    weight_of,
)
from lorakit.layers.bnb import is_linear4bit, keep_order
from lorakit.layers.fused import lora_linear
from lorakit.layers.read_weight import ReadWeight
from lorakit.layers.trial import check_linear, plus

ScaleRule = str | Callable[[float, int], float]  # a name of SCALE_RULES, or a function (alpha, rank) -> s
SCALE_RULES: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, section 4.1
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # Kalajdzievski 2023, arXiv:2312.03732
}


def scale_of(settings: Mapping[str, Any]) -> float:
    """The scale that settings in PEFT's words mean: `r`, `lora_alpha`, `use_rslora`."""
    return SCALE_RULES["rslora" if settings.get("use_rslora") else "lora"](settings["lora_alpha"], settings["r"])


def checked_scale(rank: int, alpha: float, dropout: float = 0.0, scale_rule: ScaleRule = "lora") -> float:
    """The scale s of an adapter, once its settings are seen to be in range.

    Raises:
        ValueError: they are not.
    """
    check_integer("rank", rank)
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"expected dropout in [0, 1), got {dropout!r}")
    if scale_rule not in SCALE_RULES if isinstance(scale_rule, str) else not callable(scale_rule):
        raise ValueError(
            f"expected scale_rule in {sorted(SCALE_RULES)} or a function (alpha, rank), got {scale_rule!r}"
        )
    if not is_number(alpha):
        raise ValueError(f"expected a finite scale, got alpha {alpha!r}")
    try:
        scale = (SCALE_RULES[scale_rule] if isinstance(scale_rule, str) else scale_rule)(alpha, rank)
        finite = is_number(scale) and all(map(math.isfinite, (rank, alpha, scale)))
    except OverflowError:  # integers that no float holds
        scale, finite = math.inf, False
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"expected a scale of alpha {alpha!r} and rank {rank}, got an error: {error}") from error
    if not finite:
        raise ValueError(f"expected a finite scale, got {scale} from alpha {alpha!r}")
    return float(scale)


class LoRALinear(nn.Module):
    """Adds a low-rank update to a frozen linear layer: `y = base(x) + s B A dropout(x)`.

    `A` starts uniform in ±1/sqrt(d_in) (as in PEFT and loralib) and `B` at zero, so the output is at first the base's.
    Both are float32, or float64 on a float64 base: small updates are lost in bfloat16.

    Args:
        base: the layer to adapt, (d_in) -> (d_out), with or without bias; it is frozen, not copied.
        rank: inner dimension r >= 1.
        alpha: numerator of the scale s.
        dropout: probability in [0, 1) of zeroing an input of A during training (never of the base).
        scale_rule: `"lora"` for s = alpha / r, `"rslora"` for s = alpha / sqrt(r), or a function (alpha, rank) -> s.

    Raises:
        ValueError: rank, alpha, dropout or scale_rule out of range, or a base that is not linear-like, or whose
            weight torch does not compute with.
    """

    peft_type: ClassVar = "LORA"  # what PEFT takes its files for; a class that does not say has its own name there
    peft_names: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight"}  # parameters that PEFT calls otherwise

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, scale_rule: ScaleRule = "lora"):
        super().__init__()
        if isinstance(base, LoRALinear):
            raise ValueError("expected a plain linear layer, got a LoRALinear: it is adapted already")
        self.scale = checked_scale(rank, alpha, dropout, scale_rule)
        self.rank, self.alpha, self.scale_rule = rank, alpha, scale_rule
        d_out, d_in, dtype, device = self.fitting(base)
        if is_linear4bit(base):
            keep_order(base)
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.training = self.dropout.training = base.training

    @staticmethod
    def fitting(base: nn.Module) -> tuple[int, int, torch.dtype, torch.device]:
        """The d_out and d_in of a layer that can be adapted, and the dtype and device of A and B; refuses others."""
        d_out, d_in = linear_shape(base)
        dtype, device = factors_like(base)
        check_linear(base, d_out, d_in)
        return d_out, d_in, dtype, device

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if self.drops or (W := frozen_weight(self.base, x)) is None:
            return self.formula(x)
        return lora_linear(x, W, self.bias, self.A, self.B, self.scale)  # the same, faster

    def formula(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The definition of the layer, in plain operations."""
        y = self.base(x)  # (*batch, d_out)
        return (y + self.update(x)).to(y.dtype)

    def update(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What is added to the base's answer: `s B A dropout(x)`, in the adapter's dtype."""
        xa = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (*batch, rank)
        return self.scale * F.linear(xa, self.B)  # (*batch, d_out)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The update `s B A` that training has learned, in the adapter's dtype."""
        return self.scale * (self.B @ self.A)  # (d_out, d_in)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base with weight `W + s B A`, summed in the adapter's dtype and rounded once to the base's.

        Raises:
            ValueError: the base's weight is quantised (dequantise it first), or derived from others.
        """
        check_float_weight(self.base)
        delta = self.delta_weight()
        if not (delta.is_meta or delta.isfinite().all()):
            raise ValueError("expected a finite update, got NaN or infinity")
        return plus(self.base, delta).train(self.training)

    def removed(self) -> nn.Module:
        """The base, as it was before."""
        return self.base

    def peft_tensors(self) -> dict[str, Tensor]:
        """The parameters, by the names that PEFT's files have for them."""
        return {self.peft_names.get(name, name): p for name, p in own_parameters(self).items()}

    def peft_settings(self) -> dict[str, Any]:
        """What adapter_config.json says of this layer; a rule of one's own becomes an alpha of the same scale."""
        return {
            "peft_type": vars(type(self)).get("peft_type", type(self).__name__),
            "r": self.rank,
            "lora_alpha": self.alpha if self.scale_rule in ("lora", "rslora") else self.scale * self.rank,
            "use_rslora": self.scale_rule == "rslora",
            "lora_dropout": getattr(self.dropout, "p", 0.0),
            "use_dora": False,
        }

    @torch.no_grad()
    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values of `peft_tensors()` over from a file."""
        for name, parameter in self.peft_tensors().items():
            parameter.copy_(tensors[name])

    @property
    def drops(self) -> bool:
        """True while dropout is at work."""
        return self.training and not isinstance(self.dropout, nn.Identity)

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight, for model code that asks a layer for its dtype or device.

        Code that computes with it, instead of calling the layer, gets `W + s B A`.
        """
        return ReadWeight.of(weight_of(self.base), self._effective_weight)

    def _effective_weight(self) -> Tensor:
        """`W + s B A`, as the base stores its weight."""
        if self.drops:
            raise ValueError(f"expected a layer that is called, got its weight read: {self.base} cannot have dropout")
        stored, W = weight_of(self.base), dense_weight(self.base, self.A.dtype) + self.delta_weight()
        W = W.to(stored.dtype) if stored.is_floating_point() else W.to(getattr(self.base, "dtype", W.dtype))
        return W.T if stores_transposed(self.base) else W

    @property
    def bias(self) -> Tensor | None:
        """The base's frozen bias."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}"
