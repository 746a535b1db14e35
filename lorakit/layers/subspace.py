"""Training in a random subspace of a model's parameters."""

import torch
from torch import Tensor, nn

from lorakit.layers.lowrank import _check_k


class RandomSubspace(nn.Module):
    """A model whose trainable parameters move in a random subspace alone: `theta = theta_0 + P z`, z of d numbers.

    P: (D, d) is a count sketch (Charikar et al. 2002) with buckets of equal size, as in Uni-LoRA (arXiv:2506.00799):
    each of the D parameters follows one random coordinate of z, with a random sign. P's columns are orthonormal, so
    `||P z|| = ||z||`; it takes 5 bytes a parameter, a dense P 4 d. At d = D this is full training. Method: Li et al.
    2018 (arXiv:1804.08838), with Fastfood; Aghajanyan et al. 2020 (arXiv:2012.13255), on pretrained models.
    The model is wrapped, not copied, and frozen. `fit` and `exact_match` take the wrapper; `write_back` to generate.

    Args:
        model: the parameters that require a gradient are theta.
        dimension: d, from 1 to their number D.
        seed: of P; the global random state is left as it was.

    Raises:
        ValueError: nothing requires a gradient, or d is out of range.
    """

    buckets: Tensor
    signs: Tensor
    lengths: Tensor

    def __init__(self, model: nn.Module, dimension: int, seed: int = 0):
        super().__init__()
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError("expected a model with parameters that require a gradient, got none")
        size = sum(p.numel() for p in params.values())
        _check_k(dimension, size, "the number of trainable parameters")
        like, generator = next(iter(params.values())), torch.Generator().manual_seed(seed)
        buckets = (torch.randperm(size, generator=generator) % dimension).int()  # (D): which coordinate each follows
        signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1  # (D)
        counts = size // dimension + (torch.arange(dimension, dtype=torch.long) < size % dimension)  # (d)
        self.model, self.config, self.names = model, getattr(model, "config", None), list(params)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.z = nn.Parameter(torch.zeros(dimension, dtype=dtype, device=like.device))
        self.register_buffer("buckets", buckets.to(like.device), persistent=False)
        self.register_buffer("signs", signs.to(like.device), persistent=False)
        self.register_buffer("lengths", counts.to(self.z).rsqrt(), persistent=False)  # P's entries: ± these
        model.requires_grad_(False)
        self.train(model.training)

    def theta(self) -> dict[str, Tensor]:
        """The parameters `theta_0 + P z` by name."""
        origin = {name: self.model.get_parameter(name) for name in self.names}
        moves = (self.z * self.lengths).index_select(0, self.buckets) * self.signs  # (D)
        parts = moves.split([p.numel() for p in origin.values()])
        return {name: p + part.view_as(p).to(p) for (name, p), part in zip(origin.items(), parts, strict=True)}

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.model, self.theta(), args, kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """The model's output head, None if it names none."""
        return getattr(self.model, "get_output_embeddings", lambda: None)()

    @torch.no_grad()
    def write_back(self) -> nn.Module:
        """Writes `theta_0 + P z` into the model and returns it, trainable as before; then sets z to zero."""
        for name, value in self.theta().items():
            self.model.get_parameter(name).copy_(value)
        self.z.zero_()
        return self.remove()

    def remove(self) -> nn.Module:
        """Returns the model as it was, at theta_0 and trainable."""
        for name in self.names:
            self.model.get_parameter(name).requires_grad_(True)
        return self.model
