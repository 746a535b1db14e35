"""LoRA for weights that are parameters of a module instead of layers: the experts of a mixture, a router.

transformers keeps all experts of a block in one parameter, (E, d_out, d_in), or (E, d_in, d_out) where the module says
that it `is_transposed`. Every expert e gets factors of its own:

    W_e' = W_e + s B_e A_e

That is PEFT's `target_parameters` (its `ParamWrapper`, PEFT 0.21), with the same files. PEFT makes W' in every forward
pass, in W's dtype; here the products go through the factors (`LowRankSum`), so that a bfloat16 weight swallows no small
update and no gradient has the size of all experts.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.layers import shortcuts
from lorakit.layers.bases import FLOATS
from lorakit.layers.lora import ScaleRule, checked_scale
from lorakit.layers.low_rank_sum import LowRankSum

INNER = "base_layer."  # PEFT wraps once for each parameter, the module's first one innermost


def stack_shape(base: nn.Module, name: str) -> tuple[int, int, int]:
    """The number of experts in a parameter, d_out and d_in."""
    W = base.get_parameter(name)
    if W.ndim == 2:
        return 1, *W.shape
    d_out, d_in = W.shape[:0:-1] if is_transposed(base) else W.shape[1:]
    return len(W), d_out, d_in


def is_transposed(base: nn.Module) -> bool:
    """True if a module stores stacks as (E, d_in, d_out), as it says of itself; PEFT goes by that, too."""
    return bool(getattr(base, "is_transposed", False))


def peft_shapes(base: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What `LoRAExperts.peft_tensors` holds, for these ranks of parameters in the module's order."""
    found: dict[str, tuple[int, int]] = {}
    for depth, (name, rank) in enumerate(reversed([*ranks.items()])):
        E, d_out, d_in = stack_shape(base, name)
        found |= {f"{INNER * depth}lora_A.weight": (E * rank, d_in), f"{INNER * depth}lora_B.weight": (d_out, E * rank)}
    return found


def as_stacks(
    A: Float[Tensor, "rows d_in"], B: Float[Tensor, "d_out rows"], experts: int
) -> tuple[Float[Tensor, "experts rank d_in"], Float[Tensor, "experts d_out rank"]]:
    """Factors in PEFT's shapes, in which A goes expert by expert and B rank by rank, as those of each expert."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


class LoRAExperts(nn.Module):
    """Adds low-rank updates to some parameters of a module, which is called as ever and finds `W + s B A` in them.

    `A[name]` is (E, rank, d_in) and `B[name]` (E, d_out, rank), float32 or wider; a matrix counts as one expert. A
    starts uniform in ±1/sqrt(d_in), B at zero.

    Args:
        base: the module; it is frozen, not copied.
        settings: parameter -> its rank and alpha. The parameter is a matrix (d_out, d_in) or a stack of them.
        scale_rule: as for LoRALinear.

    Raises:
        ValueError: a parameter is not there, has other dimensions or numbers that torch does not compute with, or a
            setting is out of range.
    """

    def __init__(self, base: nn.Module, settings: Mapping[str, tuple[int, float]], scale_rule: ScaleRule = "lora"):
        super().__init__()
        there = dict(base.named_parameters(recurse=False))
        for name in settings:
            if name not in there or there[name].ndim not in (2, 3) or there[name].dtype not in FLOATS:
                found = f"{tuple(there[name].shape)} of {there[name].dtype}" if name in there else "none"
                raise ValueError(f"expected a matrix or a stack of them, of floats, as {name!r}, got {found}")
        self.base = base.requires_grad_(False)
        self.settings = {name: settings[name] for name in there if name in settings}  # in the module's order
        self.scales = {name: checked_scale(*pair, scale_rule=scale_rule) for name, pair in self.settings.items()}
        self.scale_rule = scale_rule
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, (rank, _) in self.settings.items():
            W, (E, d_out, d_in) = there[name], stack_shape(base, name)
            dtype = torch.promote_types(W.dtype, torch.float32)
            self.A[name] = nn.Parameter(W.new_empty(E, rank, d_in, dtype=dtype).uniform_(-(d_in**-0.5), d_in**-0.5))
            self.B[name] = nn.Parameter(W.new_zeros(E, d_out, rank, dtype=dtype))
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not shortcuts.allowed():
            return self.formula(*args, **kwargs)
        return functional_call(self.base, {name: self._sum(name) for name in self.settings}, args, kwargs)

    def formula(self, *args: Any, **kwargs: Any) -> Any:
        """The definition of the layer: the module with `W + s B A` in the place of each W."""
        return functional_call(self.base, {name: self._sum(name).value() for name in self.settings}, args, kwargs)

    def delta_weight(self, name: str | None = None) -> Tensor:
        """The update `s B A` of a parameter, as the module stores it, in the adapter's dtype.

        Args:
            name: the parameter's; None for the only one.
        """
        (name,) = [name] if name else self.settings
        L, R = self._factors(name)
        return L @ R

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the module with `W + s B A`, summed in the adapter's dtype and rounded once to W's."""
        adapted = map(self.base.get_parameter, self.settings)
        new = copy.deepcopy(self.base, {id(W): W for W in adapted})  # a copy of all but these
        for name in self.settings:
            W = self._sum(name).value()
            if not (W.is_meta or W.isfinite().all()):
                raise ValueError(f"expected a finite update of {name!r}, got NaN or infinity")
            setattr(new, name, nn.Parameter(W, requires_grad=False))
        return new.train(self.training)

    def removed(self) -> nn.Module:
        """The module, as it was before."""
        return self.base

    def peft_tensors(self) -> dict[str, Tensor]:
        """The factors in PEFT's shapes: A (E rank, d_in), expert by expert, and B (d_out, rank E), rank by rank."""
        found = {}
        for depth, name in enumerate(reversed(self.settings)):
            found[f"{INNER * depth}lora_A.weight"] = self.A[name].flatten(0, 1)
            found[f"{INNER * depth}lora_B.weight"] = self.B[name].permute(1, 2, 0).flatten(1)
        return found

    def peft_settings(self) -> dict[str, Any]:
        """As LoRALinear's, with rank and alpha of each parameter under `parameters`."""
        known = self.scale_rule in ("lora", "rslora")
        return {
            "peft_type": "LORA",
            "use_rslora": self.scale_rule == "rslora",
            "lora_dropout": 0.0,
            "use_dora": False,
            "parameters": {
                name: {"r": rank, "lora_alpha": alpha if known else self.scales[name] * rank}
                for name, (rank, alpha) in self.settings.items()
            },
        }

    @torch.no_grad()
    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values of `peft_tensors()` over from a file."""
        for depth, name in enumerate(reversed(self.settings)):
            A, B = self.A[name], self.B[name]
            a, b = (tensors[f"{INNER * depth}lora_{x}.weight"] for x in "AB")
            a, b = as_stacks(a, b, len(A))
            A.copy_(a)
            B.copy_(b)

    def __getattr__(self, name: str) -> Any:
        """What code asks the module for, such as a router's bias; adapted parameters with their update."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = super().__getattr__("base")
            return self._sum(name) if name in vars(self).get("settings", {}) else getattr(base, name)

    def _sum(self, name: str) -> LowRankSum:
        return LowRankSum.make(self.base.get_parameter(name).detach(), *self._factors(name))

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """L and R of `s B A = L R`, as the module stores the parameter."""
        A, B = self.A[name], self.scales[name] * self.B[name]
        if self.base.get_parameter(name).ndim == 2:
            return B[0], A[0]
        return (A.mT, B.mT) if is_transposed(self.base) else (B, A)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={rank}, alpha={alpha}" for name, (rank, alpha) in self.settings.items())
