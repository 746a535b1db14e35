"""What looks like a linear layer is tried; what reads a weight, and calls no layer, gets the one that counts."""

import copy

import pytest
import torch
from helpers.layers import Rounded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lorakit import DoRALinear, LoRALinear, NF4Linear, PiSSALinear, adapters, find_targets, folded, inject, merge
from lorakit.layers.multi_lora import LoRAStack
from lorakit.layers.trial import check_linear


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1), None


class Softened(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Cut(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Wrong(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, :2]


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight, self.bias)


class Harmless(nn.Linear):
    pass


NOT_LINEAR = {
    "a tuple": (lambda: Router(4, 6), "returns a tuple"),
    "not a sum of outputs": (lambda: Softened(4, 6), "gradient|answer to a sum|sum of"),
    "no gradient": (lambda: Cut(4, 6), "no gradient"),
    "another width": (lambda: Wrong(4, 6), "shape"),
}


@pytest.mark.parametrize("case", NOT_LINEAR)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_linear_is_left_out_and_refused_by_name(case):
    make, words = NOT_LINEAR[case]
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": make(), "proj": nn.Linear(4, 4)})
    layer = model["router"]
    assert find_targets(model) == ["proj"]
    with pytest.raises(ValueError, match=rf"'router'.*({words})"):
        inject(model, 2, 4, targets=["router"])
    with pytest.raises(ValueError, match=f"expected a linear layer.*({words})"):
        LoRALinear(layer, 2, 4)
    assert model["router"] is layer


@pytest.mark.filterwarnings("ignore")
def test_a_trial_leaves_no_trace():
    layer = nn.Sequential(Harmless(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    layer[0].eval()
    layer[0].bias.requires_grad_(False)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        check_linear(layer, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert [m.training for m in layer] == [False, True, True]
    assert [p.requires_grad for p in layer[0].parameters()] == [True, False]
    assert torch.equal(torch.get_rng_state(), state)


DERIVED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "the old weight_norm": lambda: torch.nn.utils.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "the old spectral_norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "scaled": lambda: Scaled(4, 4),
}


@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear, PiSSALinear])
@pytest.mark.parametrize("case", DERIVED)
@pytest.mark.filterwarnings("ignore")
def test_an_update_never_goes_into_a_derived_weight(case, layer):
    model, x = nn.Sequential(DERIVED[case]()).eval(), torch.randn(3, 4)
    base, y = model[0], model(x).detach()
    if layer is PiSSALinear or (layer is DoRALinear and case == "scaled"):  # they read the weight when they are made
        with pytest.raises(ValueError, match=r"computes with its weight.*'0'"):
            inject(model, 2, 4, layer=layer)
        assert model[0] is base
        return
    inject(model, 2, 4, layer=layer)
    torch.testing.assert_close(model(x), y)
    nn.init.normal_(model[0].B)
    y = model(x).detach()
    for act in (merge, lambda model: folded(model).__enter__()):
        with pytest.raises(ValueError, match=r"computes with its weight.*'0'"):
            act(model)
    assert list(adapters(model)) == ["0"]
    torch.testing.assert_close(model(x), y)


def test_a_subclass_that_is_linear_is_adapted_and_merged():
    model, x = nn.Sequential(Harmless(4, 6)), torch.randn(3, 4)
    inject(model, 2, 4)
    nn.init.normal_(model[0].B)
    y = model(x)
    torch.testing.assert_close(merge(model)(x), y)
    assert type(model[0]) is Harmless


# ---- weights that are read ----


class Reads(nn.Module):
    """A block that computes with its layer's weight and does not call it, as Mamba does with dt_proj."""

    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        assert self.proj.weight.device.type == "cpu"
        return F.linear(x, self.proj.weight, self.proj.bias)


@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear, PiSSALinear])
def test_a_weight_that_is_read_has_the_update_and_its_gradients(layer):
    base, x = nn.Linear(4, 6), torch.randn(3, 4)
    read = Reads(layer(base, 2, 4))
    nn.init.normal_(read.proj.B)
    for module in (read, read.proj):
        module(x).square().sum().backward()
    both = [2 * p for p in torch.autograd.grad(read.proj(x).square().sum(), [read.proj.A, read.proj.B])]
    for got, expected in zip([read.proj.A.grad, read.proj.B.grad], both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read(x), read.proj(x))


def test_a_quantised_weight_that_is_read_is_dequantised():
    linear, x = nn.Linear(64, 6), torch.randn(3, 64)
    quantised = NF4Linear(linear)
    assert quantised.weight.dtype == torch.int8
    torch.testing.assert_close(Reads(quantised)(x), quantised(x))
    adapted = LoRALinear(quantised, 2, 4)
    nn.init.normal_(adapted.B)
    assert adapted.weight.dtype == torch.int8
    torch.testing.assert_close(Reads(adapted)(x), adapted(x))
    assert LoRALinear(Rounded(4, 6), 2, 4)(torch.ones(2, 4)).shape == (2, 6)


def test_what_has_no_such_weight_says_so():
    x = torch.randn(3, 4)
    dropping = LoRALinear(nn.Linear(4, 6), 2, 4, dropout=0.5).train()
    with pytest.raises(ValueError, match="dropout"):
        Reads(dropping)(x)
    assert Reads(dropping.eval())(x).shape == (3, 6)
    stack = LoRAStack([LoRALinear(nn.Linear(4, 6), 2, 4)], "some.proj")
    assert stack.weight.shape == (6, 4)
    with pytest.raises(ValueError, match=r"some\.proj"):
        Reads(stack)(x)
    with pytest.raises(ValueError, match="in place"):
        dropping.weight.mul_(2)


def test_torchs_encoder_layer_answers_alike_in_both_modes():
    net, x = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval(), torch.randn(2, 5, 16)
    inject(net, 4, 8)
    for layer in adapters(net).values():
        nn.init.normal_(layer.B)
    expected = net.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_what_an_adapter_returns_may_be_changed_in_place():
    layer, x = LoRALinear(nn.Linear(4, 6), 2, 4), torch.randn(2, 3, 4)
    y = layer(x)
    y.add_(1).sum().backward()
    assert layer.B.grad is not None
