"""DoRA by hand is PEFT's: outputs, gradients, merged weights, files, quantised bases."""

import copy

import pytest
import torch
from helpers.architectures import DIVERSE, build, logits_of
from helpers.four_bits import by_bitsandbytes, plain
from helpers.parity import gradients, peft_model, relative
from torch import nn

import lorakit
from lorakit import AdapterError, LoRALinear
from lorakit._optional import quiet
from lorakit.layers.bnb import prevent_repacking
from lorakit.layers.dora import DoRALinear, magnitude_direction
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.models.quantize import quantize_model

with quiet():
    import peft


def randomise(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for layer in lorakit.adapters(model).values():
        for p in (layer.A, layer.B):
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
        layer.magnitude.data.mul_(1 + 0.2 * torch.rand(layer.magnitude.shape, generator=generator))


def adapted(base, **settings):
    model = copy.deepcopy(base)
    lorakit.inject(model, 4, 8, layer=DoRALinear, **settings)
    return model


def in_peft(base, path):
    with quiet():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path), is_trainable=True).eval()


def worst(mine, yours):
    yours = {key.replace(".lora_magnitude_vector", ".magnitude"): value for key, value in yours.items()}
    assert set(mine) == set(yours)
    return max(relative(mine[key], yours[key]) for key in mine)


@pytest.mark.parametrize("name", DIVERSE)
def test_a_fresh_adapter_changes_nothing(name):
    base = build(name)
    assert torch.equal(logits_of(adapted(base), name), logits_of(base, name))


@pytest.mark.parametrize("name", DIVERSE)
@pytest.mark.parametrize("scale_rule", ["lora", "rslora"])
def test_logits_gradients_and_merged_weights_are_those_of_peft(name, scale_rule, tmp_path):
    base = build(name)
    ours = adapted(base, scale_rule=scale_rule)
    randomise(ours)
    theirs = in_peft(base, lorakit.save_adapter(ours, tmp_path))
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=1e-5, atol=2e-6)
    assert worst(gradients(ours, name), gradients(theirs, name)) < 5e-5
    theirs = theirs.merge_and_unload()
    for key, value in lorakit.merge(ours).state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_pefts_file_is_read(name, tmp_path):
    base = build(name)
    theirs = peft_model(base, r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    for key, p in theirs.named_parameters():
        if "magnitude" in key:
            p.data.mul_(1.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    lorakit.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=1e-5, atol=2e-6)
    again = adapted(base)
    lorakit.load_adapter(again, tmp_path)  # into adapters that are there
    assert torch.equal(logits_of(again, name), logits_of(ours, name))


def test_dropout_acts_as_in_peft(tmp_path):
    base = build("llama")
    ours = adapted(base, dropout=0.3).train()
    randomise(ours)
    theirs = in_peft(base, lorakit.save_adapter(ours, tmp_path)).train()

    def seeded(model):
        torch.manual_seed(0)
        return gradients(model, "llama")

    assert worst(seeded(ours), seeded(theirs)) < 5e-5


@pytest.mark.parametrize("arm", ["NF4Linear", "Linear4bit"])
def test_on_four_bits_it_is_peft_on_bitsandbytes(llama_folder, arm, tmp_path):
    prevent_repacking()
    base = by_bitsandbytes(llama_folder)
    ours = quantize_model(plain(llama_folder)) if arm == "NF4Linear" else copy.deepcopy(base)
    lorakit.inject(ours, 4, 8, layer=DoRALinear)
    randomise(ours)
    theirs = in_peft(base, lorakit.save_adapter(ours, tmp_path))
    torch.testing.assert_close(logits_of(ours, "llama"), logits_of(theirs, "llama"), rtol=1e-5, atol=2e-6)
    assert worst(gradients(ours, "llama"), gradients(theirs, "llama")) < 5e-5


# ---- the layer ----


def explicit(layer, x, A, B, m):
    """The paper's formula in float64 and plain autograd."""
    V = layer.base.weight.detach().double() + layer.scale * B @ A
    norms = V.norm(dim=1)
    W = V * (m / (norms.detach() if layer.detach_norm else norms))[:, None]
    return x.double() @ W.T + layer.base.bias.double()


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("way", ["forward", "formula"])
def test_gradients_with_and_without_the_norm(detach_norm, way):
    torch.manual_seed(0)
    layer, x = DoRALinear(nn.Linear(12, 7), 3, 6, detach_norm=detach_norm), torch.randn(5, 12, requires_grad=True)
    layer.B.data.normal_()
    inputs = [p.detach().double().requires_grad_() for p in (layer.A, layer.B, layer.magnitude)]
    expected = torch.autograd.grad(explicit(layer, x, *inputs).square().sum(), [x, *inputs])
    y = getattr(layer, way)(x)
    got = torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B, layer.magnitude])
    assert all(relative(a.double(), b.double()) < 1e-5 for a, b in zip(got, expected, strict=True))


def test_without_the_norms_gradient_b_gets_another_one():
    torch.manual_seed(0)
    base, x = nn.Linear(12, 7), torch.randn(5, 12)
    found = []
    for detach in (True, False):
        torch.manual_seed(1)
        layer = DoRALinear(base, 3, 6, detach_norm=detach)
        layer(x).square().sum().backward()
        found.append(layer.B.grad)
    assert relative(*found) > 0.01


def test_one_wide_tensor_is_kept_for_the_backward():
    layer, x = DoRALinear(nn.Linear(64, 512, bias=False), 2, 4), torch.randn(100, 64, requires_grad=True)
    own, kept = {p.data_ptr() for p in layer.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        y = layer(x)
    wide = [size for place, size in kept.items() if size >= 512 * 64 and place not in own]
    assert wide == [y.numel()]


def test_on_four_bits_the_weight_is_made_once_a_pass(monkeypatch):
    layer = DoRALinear(NF4Linear(nn.Linear(64, 32)), 2, 4)
    calls, made = [], layer.base.frozen_weight
    monkeypatch.setattr(layer.base, "frozen_weight", lambda *args: calls.append(1) or made(*args))
    y = layer(torch.randn(3, 64, requires_grad=True))
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    layer(torch.randn(3, 64)).sum().backward()
    assert len(calls) == 4 - 1  # the input needs no gradient: nothing is made in the backward pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer, x = DoRALinear(nn.Linear(16, 8).to(dtype), 2, 4), torch.randn(3, 16, dtype=dtype)
    assert layer.magnitude.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(layer(x), layer.base(x)) or dtype == torch.bfloat16
    layer.B.data.normal_()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer.formula(x), rtol=2e-2, atol=2e-2)


def test_a_row_of_zeros_stays_zero():
    base = nn.Linear(6, 4, bias=False)
    base.weight.data[2] = 0
    layer = DoRALinear(base, 2, 4)
    y = layer(torch.randn(3, 6))
    assert torch.equal(y[:, 2], torch.zeros(3))
    y.sum().backward()
    assert layer.magnitude.grad.isfinite().all()


def test_delta_weight_and_merged_agree():
    torch.manual_seed(0)
    layer, x = DoRALinear(nn.Linear(12, 7), 3, 6), torch.randn(5, 12)
    layer.B.data.normal_()
    layer.magnitude.data.mul_(1.5)
    torch.testing.assert_close(layer.merged().weight, layer.base.weight + layer.delta_weight())
    torch.testing.assert_close(layer.merged()(x), layer(x))


def test_changes_of_magnitude_and_direction():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    after = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, 1.0], [-2.0, 0.0]])
    magnitude, direction = magnitude_direction(before, after)
    assert magnitude == pytest.approx((5 + 0 + 1 + 0) / 4)
    assert direction == pytest.approx((0 + 1 + 0 + 2) / 4)
    assert magnitude_direction(before.bfloat16(), before.bfloat16()) == (0.0, 0.0)


def test_kinds_are_not_mixed_up(tmp_path):
    base = build("llama")
    ours = adapted(base)
    lorakit.save_adapter(ours, tmp_path)
    other = copy.deepcopy(base)
    lorakit.inject(other, 4, 8)
    with pytest.raises(AdapterError, match="expected a file for LoRALinear"):
        lorakit.load_adapter(other, tmp_path)
    layer = ours.model.layers[0].self_attn.q_proj
    ours.model.layers[0].self_attn.q_proj = LoRALinear(layer.base, 4, 8)
    with pytest.raises(ValueError, match=r"expected (LoRA|DoRA)Linear layers, got (DoRA|LoRA)Linear"):
        lorakit.save_adapter(ours, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
