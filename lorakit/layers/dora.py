"""DoRA: the magnitude of each row of a weight trains apart from its direction (Liu et al. 2024, arXiv:2402.09353).

    y = m * (W + s B A) x / ||W + s B A|| + b

The paper's text calls the norm column-wise. Its authors' code and PEFT have one magnitude for each output: in torch's
layout, (d_out, d_in), the norm is that of each row.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.layers.bases import dense_weight, frozen_weight
from lorakit.layers.fused import lora_linear
from lorakit.layers.lora import LoRALinear, ScaleRule
from lorakit.layers.trial import check_weight


class DoRALinear(LoRALinear):
    """Adds DoRA's update to a frozen linear layer. The output is at first the base's: m starts as the rows' norms.

    Args:
        base: the layer to adapt, (d_in) -> (d_out), with or without bias, quantised or not; it is frozen, not copied.
        rank: inner dimension r >= 1.
        alpha: numerator of the scale s.
        dropout: probability of zeroing an input of A during training; m / ||.|| then acts on the dropped input too, as
            in PEFT.
        scale_rule: as for LoRALinear.
        detach_norm: whether the norm counts as a constant in the gradient, as in the paper's section 4.3 and in PEFT.

    Raises:
        ValueError: a setting is out of range, or the base's weight cannot be read.
    """

    peft_type: ClassVar = "LORA"
    peft_names: ClassVar = LoRALinear.peft_names | {"magnitude": "lora_magnitude_vector"}

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        scale_rule: ScaleRule = "lora",
        detach_norm: bool = True,
    ):
        super().__init__(base, rank, alpha, dropout, scale_rule)
        self.detach_norm = detach_norm
        with torch.no_grad():
            W = dense_weight(base, self.A.dtype)
            check_weight(base, W)
            if not (W.is_meta or W.isfinite().all()):
                raise ValueError("expected a finite weight, got NaN or infinity")
            self.magnitude = nn.Parameter(self.row_norms(W))

    def row_norms(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " d_out"]:
        """||W + s B A|| of each row, from |w|^2 + 2 s b (A w) + s^2 b (A A') b' with w, b rows: B A is never formed."""
        A, B = (self.A.detach(), self.B.detach()) if self.detach_norm else (self.A, self.B)
        s = self.scale
        W = W.to(A.dtype)
        mixed = (W @ A.T).addmm(B, A @ A.T, beta=2 * s, alpha=s * s)  # (d_out, rank)
        square = torch.linalg.vector_norm(W, dim=1).square() + (B * mixed).sum(1)
        return square.clamp(min=torch.finfo(A.dtype).tiny).sqrt()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        W = None if self.drops else frozen_weight(self.base, x)
        if W is None:
            return self.formula(x)
        made = [W()] if callable(W) else [W]
        g = (self.magnitude / self.row_norms(made[0])).to(x.dtype)  # (d_out)
        again = (lambda: made.pop() if made else W()) if callable(W) else W  # made once for the forward pass
        z = lora_linear(x, again, None, self.A, self.B, self.scale)  # (*batch, d_out), all that is kept of this size
        return z * g if self.bias is None else torch.addcmul(self.bias, z, g)

    def formula(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The definition of the layer, in plain operations: the base's answer and what is to be added to it."""
        y, x = self.base(x), self.dropout(x.to(self.A.dtype))
        W = dense_weight(self.base, self.A.dtype)
        norms = torch.linalg.vector_norm(W + super().delta_weight(), dim=1)
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        g = self.magnitude / (norms.detach() if self.detach_norm else norms)  # (d_out)
        wx, lora = F.linear(x, W), self.scale * F.linear(F.linear(x, self.A), self.B)
        return (y + (g - 1) * wx + g * lora).to(y.dtype)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """What training has added to W: `m (W + s B A) / ||W + s B A|| - W`, in the adapter's dtype."""
        W = dense_weight(self.base, self.A.dtype)
        V = W + super().delta_weight()
        return V * (self.magnitude / self.row_norms(W))[:, None] - W

    def peft_settings(self) -> dict[str, Any]:
        """As LoRALinear's, and that it is DoRA."""
        return super().peft_settings() | {"use_dora": True}


@torch.no_grad()
def magnitude_direction(before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"]) -> tuple[float, float]:
    """How much training has changed the rows' lengths, and their directions: means of |‖w'‖ - ‖w‖| and 1 - cos(w', w).

    Source: Liu et al. 2024, section 3.2, where the columns of a (d, k) weight are what rows are in torch's layout.

    Args:
        before: the pretrained weight; a `Conv1D` has it transposed.
        after: the trained one.

    Returns:
        the mean change of magnitude, in the weight's unit, and of direction, in [0, 2]; rows of zeros count as 0.
    """
    before, after = before.double(), after.double()
    lengths = torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(after, dim=1)
    cosines = (before * after).sum(1) / (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float64).tiny)
    turned = torch.where(lengths[0] * lengths[1] > 0, 1 - cosines, 0.0)
    return (lengths[1] - lengths[0]).abs().mean().item(), turned.clamp(min=0).mean().item()
