"""Folding an adapter into the weights gives a plain model for a while, and then everything back."""

import pytest
import torch
from helpers.architectures import adapted, build, logits_of
from helpers.layers import Rounded
from helpers.parity import snapshot, unchanged
from torch import nn
from torch.overrides import TorchFunctionMode

from lorakit import DoRALinear, PiSSALinear, adapters, folded, inject, merge, quantize_model, remove


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


def test_a_weight_that_another_layer_has_too_stays_bit_for_bit():
    tied = adapted("llama-biased-tied", targets=["q_proj", "lm_head"])
    before, logits = weights(tied), logits_of(tied, "llama")
    with folded(tied):
        torch.testing.assert_close(logits_of(tied, "llama"), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(tied.model.embed_tokens.weight, before["lm_head"])
    assert torch.equal(weights(tied)["lm_head"], before["lm_head"])


def test_an_error_inside_gives_everything_back_too():
    model = adapted("llama")
    before = weights(model)
    with pytest.raises(KeyError), folded(model):
        raise KeyError
    assert all((w - before[name]).norm() < 1e-6 * before[name].norm() for name, w in weights(model).items())


def test_what_cannot_be_folded_is_refused_and_nothing_changes():
    with pytest.raises(ValueError, match="got a plain one"), folded(build("llama")):
        pass
    quantised = torch.nn.Sequential(torch.nn.Linear(4, 6), Rounded(6, 4))
    inject(quantised, 2, 4)
    with pytest.raises(ValueError, match=r"floating-point weight.* at 1"), folded(quantised):
        pass
    assert len(adapters(quantised)) == 2


class StopAfter(TorchFunctionMode):
    """Interrupts the n-th sum: before it is made, as an error would, or just after, as Ctrl-C does."""

    def __init__(self, number, late):
        super().__init__()
        self.left, self.late = number, late

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.addmm_:
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0 and not self.late:
            raise RuntimeError("no")
        func(*args, **(kwargs or {}))
        if self.left == 0:
            raise KeyboardInterrupt
        return None


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("number", [1, 6, 14])
def test_stopped_while_it_folds_it_gives_everything_back(number, late):
    model = adapted("llama")
    before, layers = weights(model), list(adapters(model).values())
    with StopAfter(number, late), pytest.raises(KeyboardInterrupt if late else RuntimeError), folded(model):
        raise AssertionError("it should not have come so far")
    assert list(adapters(model).values()) == layers
    assert all((w - before[name]).norm() < 1e-6 * before[name].norm() for name, w in weights(model).items())


class Stubborn(DoRALinear):
    """Refuses to be merged or removed when it is told to."""

    refuses = False

    def merged(self):
        if self.refuses:
            raise ValueError("I stay")
        return super().merged()

    removed = merged


@pytest.mark.parametrize("act", [merge, remove, lambda model: folded(model).__enter__()])
def test_one_that_refuses_leaves_the_whole_model_as_it_was(act):
    model = build("llama")
    inject(model, 2, 4, layer=Stubborn)
    list(adapters(model).values())[-1].refuses = True
    before, layers, grads = snapshot(model), adapters(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="I stay"):
        act(model)
    assert adapters(model) == layers
    assert unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == grads


@pytest.mark.parametrize(("layer", "act"), [(DoRALinear, merge), (PiSSALinear, merge), (PiSSALinear, remove)])
def test_a_half_quantised_model_is_refused_whole(layer, act):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    inject(model, 2, 4, layer=layer)
    model[1].base = quantize_model(nn.Sequential(model[1].base))[0]
    before, layers = snapshot(model), adapters(model)
    with pytest.raises(ValueError, match="NF4Linear"):
        act(model)
    assert adapters(model) == layers
    assert unchanged(model, before)


def test_a_refused_merge_leaves_the_tie_alone():
    tied = adapted("llama-biased-tied", targets=["q_proj", "lm_head"])
    layer = tied.model.layers[0].self_attn.q_proj
    layer.base = quantize_model(nn.Sequential(layer.base))[0]
    with pytest.raises(ValueError, match="NF4Linear"):
        merge(tied)
    assert tied.config.tie_word_embeddings
