"""Folding an adapter into the weights gives a plain model for a while, and then everything back."""

import pytest
import torch
from helpers.architectures import adapted, build, logits_of
from helpers.layers import Rounded

from lorakit import DoRALinear, adapters, folded, inject


def weights(model):
    return {name: layer.base.weight.detach().clone() for name, layer in adapters(model).items()}


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "gpt2", "phi3", "bert", "t5"])
def test_inside_it_is_merged_and_afterwards_as_before(name):
    model = adapted(name)
    before, layers, logits = weights(model), adapters(model), logits_of(model, name)
    with folded(model) as plain:
        assert plain is model
        assert not adapters(model)
        torch.testing.assert_close(logits_of(model, name), logits, rtol=1e-4, atol=1e-4)
    assert list(adapters(model).values()) == list(layers.values())
    for key, weight in weights(model).items():
        assert (weight - before[key]).norm() < 1e-6 * before[key].norm()
    torch.testing.assert_close(logits_of(model, name), logits, rtol=1e-4, atol=1e-5)


def test_half_precision_comes_back_bit_for_bit():
    model = adapted("llama", torch.bfloat16)
    before = weights(model)
    for _ in range(3):
        with folded(model):
            pass
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_doras_magnitudes_are_folded_in_too():
    model = build("llama")
    inject(model, 4, 8, layer=DoRALinear)
    for layer in adapters(model).values():
        layer.B.data.normal_(0, 0.1)
        layer.magnitude.data.mul_(1.2)
    before, logits = weights(model), logits_of(model, "llama")
    with folded(model):
        torch.testing.assert_close(logits_of(model, "llama"), logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_an_error_inside_gives_everything_back_too():
    model = adapted("llama")
    before = weights(model)
    with pytest.raises(KeyError), folded(model):
        raise KeyError
    assert all((w - before[name]).norm() < 1e-6 * before[name].norm() for name, w in weights(model).items())


def test_what_cannot_be_folded_is_refused_and_nothing_changes():
    with pytest.raises(ValueError, match="got a plain one"), folded(build("llama")):
        pass
    tied = adapted("llama-biased-tied", targets=["q_proj", "lm_head"])
    before = weights(tied)
    with pytest.raises(ValueError, match="shared"), folded(tied):
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tied).items())
    quantised = torch.nn.Sequential(torch.nn.Linear(4, 6), Rounded(6, 4))
    inject(quantised, 2, 4)
    with pytest.raises(ValueError, match=r"floating-point weight.* at 1"), folded(quantised):
        pass
    assert len(adapters(quantised)) == 2
