"""Laws of LoRALinear, for any shape, rank, dtype, bias and scale."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import DoRALinear, LoRALinear, inject, merge, quantize_model
from lorakit.layers.lora import checked_scale

SIZES = st.integers(1, 12)
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64)):
    """A LoRALinear with a trained-looking B, and an input for it."""
    d_in, d_out, rank = draw(SIZES), draw(SIZES), draw(st.integers(1, 16))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    base = Conv1D(d_out, d_in) if draw(st.booleans()) else nn.Linear(d_in, d_out, bias=draw(st.booleans()))
    if isinstance(base, Conv1D):
        nn.init.normal_(base.bias)
    alpha, scale_rule = draw(st.floats(0.1, 64)), draw(st.sampled_from(["lora", "rslora", lambda a, r: a / r**2]))
    layer = LoRALinear(base.to(dtype), rank, alpha, scale_rule=scale_rule)
    nn.init.normal_(layer.B, std=0.1)
    leading = draw(st.sampled_from([(), (3,), (2, 3), (0,)]))
    return layer, torch.randn(*leading, d_in, dtype=dtype)


def close(a, b, dtype):
    torch.testing.assert_close(a, b, rtol=EPS[dtype], atol=EPS[dtype] * 10)


@given(layers())
def test_zero_b_changes_nothing_at_all(case):
    layer, x = case
    nn.init.zeros_(layer.B)
    assert torch.equal(layer(x), layer.base(x))


@given(layers(tuple(EPS)))
def test_the_output_is_the_formula(case):
    layer, x = case
    delta = layer.scale * (layer.B.double() @ layer.A.double())
    expected = layer.base.double()(x.double()) + x.double() @ delta.T
    layer.base.to(x.dtype)
    y = layer(x)
    assert y.dtype == x.dtype
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1.0)
    assert x.numel() == 0 or error < 10 * EPS[x.dtype]


@given(layers())
def test_merged_equals_unmerged_and_is_plain(case):
    layer, x = case
    before = layer.base.weight.clone()
    plain = layer.merged()
    assert type(plain) is type(layer.base)
    close(plain(x), layer(x), x.dtype)
    assert torch.equal(layer.base.weight, before)


@given(layers())
def test_merge_then_subtract_returns(case):
    layer, x = case
    delta = layer.delta_weight().T if isinstance(layer.base, Conv1D) else layer.delta_weight()
    close(layer.merged().weight - delta, layer.base.weight, x.dtype)


@given(layers())
def test_only_a_and_b_get_gradients(case):
    layer, x = case
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"A", "B"}


@given(layers())
def test_the_first_gradient_of_a_is_zero_and_that_of_b_is_not(case):
    layer, x = case
    nn.init.zeros_(layer.B)
    layer(x).sum().backward()
    assert not layer.A.grad.any()
    assert x.numel() == 0 or layer.B.grad.any()


@given(layers())
def test_the_update_has_at_most_the_rank(case):
    layer, _ = case
    delta = layer.delta_weight().double()
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) <= min(layer.rank, *delta.shape)


@settings(max_examples=20)
@given(layers((torch.float64,)))
def test_gradients_are_the_derivatives(case):
    layer, x = case
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(layer, {"A": a, "B": b}, (x,)), (x, layer.A, layer.B)
    )


def test_scales():
    base = nn.Linear(8, 8)
    assert LoRALinear(base, 4, 8).scale == 2
    assert LoRALinear(base, 4, 8, scale_rule="rslora").scale == 4
    assert LoRALinear(base, 4, 8, scale_rule=lambda alpha, rank: alpha + rank).scale == 12


def test_the_start_is_uniform_up_to_one_over_root_d_in():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 7), 64, 1)
    bound = 1 / math.sqrt(400)
    assert layer.A.abs().max() <= bound
    assert layer.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.B.any()


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 8), 4, 8, dropout=0.5)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), layer.base(x))  # B = 0: a dropout on the base's path would show
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    mean = torch.stack([layer.train()(x) for _ in range(4000)]).mean(0)
    assert (mean - layer.eval()(x)).norm() / (layer(x) - layer.base(x)).norm() < 0.1  # unbiased


def test_works_under_autocast():
    layer = LoRALinear(nn.Linear(8, 8), 2, 4)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_a_linear_layer_of_another_class_works():
    class Doubled(nn.Module):
        in_features, out_features = 3, 5

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.ones(5, 3, dtype=torch.int8))

        def forward(self, x):
            return x @ (2.0 * self.codes.float()).T

    layer = LoRALinear(Doubled(), 2, 4)
    assert layer.A.dtype == torch.float32
    assert layer(torch.ones(1, 3)).tolist() == [[6.0] * 5]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -2}, "rank"),
        ({"rank": True}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"alpha": float("nan")}, "scale"),
        ({"alpha": float("inf")}, "scale"),
        ({"scale_rule": "alpha/r"}, "scale_rule"),
        ({"base": nn.Conv2d(3, 3, 3)}, "Conv2d"),
        ({"base": nn.Embedding(3, 3)}, "Embedding"),
        ({"base": LoRALinear(nn.Linear(2, 2), 1, 1)}, "already"),
        ({"base": nn.MultiheadAttention(4, 2).out_proj}, "out_proj"),
    ],
)
def test_bad_arguments_are_refused(settings, word):
    arguments = {"base": nn.Linear(8, 8), "rank": 4, "alpha": 8} | settings
    with pytest.raises(ValueError, match=word):
        LoRALinear(**arguments)


def eight_bits(dtype):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})[0]


UNKNOWN_STORAGE = {
    "float8": lambda: eight_bits(torch.float8_e4m3fn),
    "the other float8": lambda: eight_bits(torch.float8_e5m2),
    "int8": lambda: eight_bits(torch.int8),
    "complex": lambda: eight_bits(torch.complex64),
    "torch.ao's int8": dynamic,
    "a shape that is not known yet": lambda: nn.LazyLinear(8),
}


@pytest.mark.parametrize("name", UNKNOWN_STORAGE)
def test_layers_that_torch_cannot_compute_with_are_refused(name):
    model = nn.Sequential(nn.Linear(8, 8), UNKNOWN_STORAGE[name]())
    grads = [p.requires_grad for p in model.parameters()]
    for act in (
        lambda: inject(model, 2, 4),
        lambda: inject(model, 2, 4, layer=DoRALinear),
        lambda: quantize_model(model),
    ):
        with pytest.raises(ValueError, match="expected"):
            act()
        assert [p.requires_grad for p in model.parameters()] == grads
        assert type(model[0]) is nn.Linear


class Scaled(nn.Linear):
    """A layer that is stored in float8 and knows how to use it."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_a_layer_that_computes_with_its_own_storage_is_adapted_but_not_merged():
    base = Scaled(8, 8)
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model, x = nn.Sequential(base), torch.randn(3, 8)
    before = model(x)
    inject(model, 2, 4)
    assert model[0].A.dtype == torch.float32
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="floating-point base"):
        merge(model)
    with pytest.raises(ValueError, match="weight that can be read"):
        DoRALinear(base, 2, 4)


@pytest.mark.parametrize(
    ("rank", "alpha", "dropout"), [(2, True, 0.0), (2, 10**400, 0.0), (10**400, 1, 0.0), (2, 4, False)]
)
def test_bools_and_numbers_that_no_float_holds_are_refused(rank, alpha, dropout):
    with pytest.raises(ValueError, match="expected"):
        checked_scale(rank, alpha, dropout)
