"""The fast LoRA step is the plain formula: values, both derivatives, dtypes; and it steps aside where it must."""

import pytest
import torch
from helpers.layers import Rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorakit import LoRALinear
from lorakit.layers.bases import frozen_weight
from lorakit.layers.fused import lora_linear


def relative(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def trained(base, rank=3, alpha=5.0, **settings):
    layer = LoRALinear(base, rank, alpha, **settings)
    nn.init.normal_(layer.B)
    return layer


def outcome(function, layer, x):
    """Output, and gradients for x, A and B, of a scalar that weighs every output differently."""
    x = x.clone().requires_grad_(True)
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, layer.A, layer.B])]


BASES = {
    "bias": lambda: nn.Linear(7, 5),
    "no bias": lambda: nn.Linear(7, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, 7),
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 4), max_size=3), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_is_the_formula(make, shape, rank, seed):
    torch.manual_seed(seed)
    layer, x = trained(make().double(), rank), torch.randn(*shape, 7, dtype=torch.float64)
    assert frozen_weight(layer.base, x) is not None
    for fast, plain in zip(outcome(layer, layer, x), outcome(layer.formula, layer, x), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_it_gives_the_same_bits_and_records_nothing(make, dtype):
    layer, x = trained(make().to(dtype)), torch.randn(2, 4, 7, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None
    assert torch.equal(y, layer(x).detach())
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_it_can_be_differentiated_twice():
    layer = trained(nn.Linear(4, 3).double(), 2)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        return lora_linear(x, layer.base.weight.detach(), layer.base.bias.detach(), A, B, 0.7)

    inputs = (x, layer.A, layer.B)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_stays_near_the_formula_and_gradients_keep_the_adapters_dtype(dtype, tolerance):
    torch.manual_seed(0)
    layer, x = trained(nn.Linear(64, 48).to(dtype), 8), torch.randn(5, 3, 64).to(dtype)
    assert layer.A.dtype == torch.float32
    fast, plain = outcome(layer, layer, x), outcome(layer.formula, layer, x)
    assert [t.dtype for t in fast] == [t.dtype for t in plain] == [dtype, dtype, torch.float32, torch.float32]
    assert all(relative(a.float(), b.float()) < tolerance for a, b in zip(fast, plain, strict=True))


def test_only_what_is_asked_for_is_computed():
    layer, x = trained(nn.Linear(6, 4)), torch.randn(3, 6)
    step = layer(x).grad_fn.next_functions[0][0]  # below the view that gives the output its shape
    assert step.next_functions[0][0] is None  # nothing goes on below an input without gradient
    layer.A.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.A.grad is None
    assert layer.B.grad is not None
    with torch.no_grad():
        assert layer(x).grad_fn is None


def test_a_weight_that_is_made_when_needed_is_not_kept():
    calls, W = [], torch.randn(4, 6)

    def make():
        calls.append(1)
        return W.clone()

    A, B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
    x = torch.randn(3, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = lora_linear(x, make, None, A, B, 1.0)
    assert (4, 6) not in kept
    y.sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, (W + B @ A).sum(0).expand(3, 6))


def test_less_is_kept_for_the_backward_pass_than_by_the_formula():
    torch.manual_seed(0)
    layer, x = trained(nn.Linear(64, 256), 4), torch.randn(100, 64, requires_grad=True)

    def kept(function):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.numel()) and t, lambda t: t
        ):
            y = function(x)
        del y
        return sum(sizes.values())

    assert kept(layer) <= kept(layer.formula)


class Masked(nn.Linear):
    """A reader's own layer, whose forward does something else."""

    def forward(self, x):
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


def hooked(base, kind):
    getattr(base, f"register_{kind}_hook")(lambda *args: None)
    return base


def offloaded(base):
    base.forward = lambda x: F.linear(x, 2 * base.weight, base.bias)
    return base


def normed(base):
    return nn.utils.parametrizations.weight_norm(base)


ODD = {
    "another class": lambda: Masked(6, 4),
    "a replaced forward": lambda: offloaded(nn.Linear(6, 4)),
    "a parametrisation": lambda: normed(nn.Linear(6, 4)),
    **{
        f"a {kind} hook": lambda kind=kind: hooked(nn.Linear(6, 4), kind)
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
    },
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_an_odd_base_is_called(make):
    layer, x = trained(make()), torch.randn(3, 6)
    assert frozen_weight(layer.base, x) is None
    torch.testing.assert_close(layer(x), layer.formula(x))


def test_a_base_that_trains_gets_its_gradient():
    layer, x = trained(nn.Linear(6, 4)), torch.randn(3, 6)
    layer.base.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base.weight.grad is not None


def test_dropout_falls_on_the_adapters_input_alone(monkeypatch):
    layer, x = trained(nn.Linear(6, 4), dropout=0.5), torch.randn(3, 6)
    monkeypatch.setattr("lorakit.layers.lora.lora_linear", lambda *args: pytest.fail("dropout was passed over"))
    layer.train()(x)
    monkeypatch.undo()
    torch.testing.assert_close(layer.eval()(x), layer.formula(x))


def test_autocast_is_left_to_torch():
    layer, x = trained(nn.Linear(6, 4)), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_weight(layer.base, x) is None
        assert layer(x).dtype == torch.bfloat16


def test_function_transforms_see_the_formula():
    layer, x = trained(nn.Linear(6, 4)), torch.randn(5, 6)
    params = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(params, row):
        return torch.func.functional_call(layer, params, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    torch.testing.assert_close(each["A"][2], torch.func.grad(loss)(params, x[2])["A"])


def test_a_quantised_base_rides_on_it():
    layer, x = trained(Rounded(6, 4)), torch.randn(3, 6)
    assert callable(frozen_weight(layer.base, x))
    for fast, plain in zip(outcome(layer, layer, x), outcome(layer.formula, layer, x), strict=True):
        torch.testing.assert_close(fast, plain)


def test_a_changed_weight_between_forward_and_backward_is_noticed():
    layer, x = trained(nn.Linear(6, 4)), torch.randn(3, 6, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
