"""Layers of a reader's own: a base, and an adapter."""

import torch
from torch import nn
from torch.nn import functional as F

from lorakit import LoRALinear


class Rounded(nn.Module):
    """A base that is stored otherwise, as a quantised one is, and offers its weight."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features, self.bias = d_in, d_out, None
        self.register_buffer("codes", torch.randint(-8, 8, (d_out, d_in), dtype=torch.int8))

    def frozen_weight(self, dtype):
        return self.codes.to(dtype) / 8

    def forward(self, x):
        return F.linear(x, self.frozen_weight(x.dtype))


class Gated(LoRALinear):
    """LoRA whose update passes a learned gate, one for each output; `steep` is a setting of its own."""

    def __init__(self, base, rank, alpha, steep=1.0, **settings):
        super().__init__(base, rank, alpha, **settings)
        self.steep, self.gate = steep, nn.Parameter(torch.ones(len(self.B)))

    def forward(self, x):
        return self.base(x) + torch.tanh(self.steep * self.gate) * self.scale * (self.dropout(x) @ self.A.T @ self.B.T)

    def delta_weight(self):
        return torch.tanh(self.steep * self.gate)[:, None] * super().delta_weight()

    def peft_settings(self):
        return super().peft_settings() | {"steep": self.steep}
