"""LoRA that starts inside the weight: `W = R + s B A`, R frozen (PiSSA, Meng et al. 2024, arXiv:2404.02948).

Plain LoRA starts at `B = 0`, in random directions. Here A and B start as a part of W, and what is left of W, the
residual R, becomes the frozen base: the output is at first the same to rounding, and that part is what trains.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit._numbers import check_integer, check_positive
from lorakit.layers.bases import dense_weight, has_float_weight
from lorakit.layers.bnb import is_linear4bit
from lorakit.layers.lora import LoRALinear, ScaleRule
from lorakit.layers.lowrank import truncated_svd
from lorakit.layers.trial import plus

Factors = tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]


def pissa_start(W: Float[Tensor, "d_out d_in"], rank: int, scale: float, niter: int | None = None) -> Factors:
    """B and A with `s B A` the best approximation of W of this rank, its singular values shared between them evenly.

    Args:
        W: the pretrained weight.
        rank: from 1 to min(d_out, d_in).
        scale: s > 0.
        niter: None for the exact SVD; else that many power iterations of a randomised one (Halko et al. 2011,
            arXiv:0909.4061), which draws random numbers and is many times faster on large matrices.
    """
    _check_start(W, rank)
    if niter is not None:
        check_integer("niter", niter, 0)
    check_positive("scale", scale)
    if niter is None:
        U, S, Vh = truncated_svd(W, rank)
    else:
        U, S, V = torch.svd_lowrank(W, rank, niter)
        Vh = V.T
    root = (S / scale).sqrt()
    return U * root, root[:, None] * Vh


def olora_start(W: Float[Tensor, "d_out d_in"], rank: int, scale: float) -> Factors:
    """The first columns of Q and rows of R in `W = Q R`: B orthonormal (OLoRA, Büyükakyüz 2024, arXiv:2406.01775)."""
    _check_start(W, rank)
    Q, R = torch.linalg.qr(W)
    return Q[:, :rank], R[:rank]


class PiSSALinear(LoRALinear):
    """A LoRALinear that starts with a part of the base's weight in A and B, over the residual.

    The layer that it is given stays as it is; `base` is a copy that holds the residual. `delta_weight` is what is added
    to that one, and `learned_weight` what training has changed. An adapter file holds plain LoRA of twice the rank,
    which fits the original weight.

    Args:
        base: the layer to adapt, with a floating-point weight. For 4 bits, `quantize_model` the model afterwards.
        rank: inner dimension r, from 1 to min(d_out, d_in).
        alpha: numerator of the scale s.
        dropout: as for LoRALinear; in training it drops parts of W, too.
        scale_rule: as for LoRALinear.
        start: called as `start(W, rank, scale)`, returns B and A; `olora_start` makes it OLoRA.

    Raises:
        ValueError: a setting is out of range, or the base is quantised.
    """

    peft_type: ClassVar = "LORA"
    A0: Tensor  # A and B as they started
    B0: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        scale_rule: ScaleRule = "lora",
        start: Callable[..., Factors] = pissa_start,
    ):
        super().__init__(base, rank, alpha, dropout, scale_rule)
        if hasattr(base, "frozen_weight") or is_linear4bit(base) or not has_float_weight(base):
            raise ValueError(f"expected a floating-point base, got {type(base).__name__}: inject first, then quantise")
        if rank > min(self.A.shape[1], self.B.shape[0]) or self.scale <= 0:
            raise ValueError(f"expected rank <= min(d_out, d_in) and scale > 0, got {rank} and {self.scale:g}")
        with torch.no_grad():
            if not callable(start):
                raise ValueError(f"expected start as a function, got {start!r}")
            B, A = start(dense_weight(base, self.A.dtype), rank, self.scale)
            if B.shape != self.B.shape or A.shape != self.A.shape:
                shapes = tuple(self.B.shape), tuple(self.A.shape)
                raise ValueError(f"expected a start of shapes {shapes}, got {tuple(B.shape)}, {tuple(A.shape)}")
            self.A.copy_(A)
            self.B.copy_(B)
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
            self.base = plus(base, -self.scale * self.B @ self.A)

    @torch.no_grad()
    def learned_weight(self) -> Float[Tensor, "d_out d_in"]:
        """What training has changed of the pretrained weight: `s (B A - B0 A0)`, B0 and A0 as they started."""
        return self.scale * (self.B @ self.A - self.B0 @ self.A0)

    @torch.no_grad()
    def removed(self) -> nn.Module:
        """The layer without what it has learned: a copy of the base with `R + s B0 A0`, which is W to rounding.

        Raises:
            ValueError: the residual has been quantised, so that W is lost.
        """
        if not has_float_weight(self.base) or is_linear4bit(self.base):
            raise ValueError(
                f"expected a floating-point residual, got {type(self.base).__name__}: W cannot be had back"
            )
        return plus(self.base, self.scale * self.B0 @ self.A0)

    @torch.no_grad()
    def as_lora(self) -> tuple[Float[Tensor, "double d_in"], Float[Tensor, "d_out double"]]:
        """A and B, of twice the rank, of the plain LoRA with the same scale s that has learned the same over W."""
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Those of the plain LoRA of twice the rank, `as_lora`, which fits the weight as it was before."""
        A, B = self.as_lora()
        return {"lora_A.weight": A, "lora_B.weight": B}

    def peft_settings(self) -> dict[str, Any]:
        """Those of the plain LoRA of twice the rank with the same scale."""
        rank = 2 * self.rank
        alpha = self.scale * (rank**0.5 if self.scale_rule == "rslora" else rank)
        return super().peft_settings() | {"r": rank, "lora_alpha": alpha}

    @torch.no_grad()
    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes A and B over from a file of an adapter that started from the same A0 and B0.

        Raises:
            ValueError: it started elsewhere: its file fits the weight, but not this residual.
        """
        (A, A0), (B, B0) = tensors["lora_A.weight"].chunk(2), tensors["lora_B.weight"].chunk(2, dim=1)
        for ours, theirs in ((self.A0, A0), (self.B0, -B0)):
            if not torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-5 * float(ours.abs().max())):
                raise ValueError("expected a file of PiSSALinear layers with this start, got one with another")
        self.A.copy_(A)
        self.B.copy_(B)


def _check_start(W: Tensor, rank: int) -> None:
    if W.ndim != 2 or not W.is_floating_point() or not W.isfinite().all():
        raise ValueError(f"expected a matrix of finite numbers, got {W.dtype} of shape {tuple(W.shape)}")
    check_integer("rank", rank, 1, min(W.shape))
