"""Whatever refuses leaves the model as it was, wherever it refuses."""

import copy

import pytest
import torch
from helpers.architectures import build, logits_of
from torch import nn

from lorakit import (
    DoRALinear,
    PiSSALinear,
    adapters,
    dequantize_model,
    folded,
    inject,
    merge,
    quantize_model,
    remove,
)

LAST = "model.layers.1.mlp.down_proj"


def picture(model):
    """All that an operation could change: the tree, tensors, what trains, modes, ties, answers."""
    return {
        "tree": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "places": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "tied": model.config.tie_word_embeddings,
        "answers": logits_of(model, "llama"),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool(a.isnan().any() and torch.equal(a.isnan(), b.isnan()))
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) if isinstance(a, dict) else a == b


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def last_base(model):
    layer = model.get_submodule(LAST)
    return layer, (lambda new: setattr(layer, "base", new)) if hasattr(layer, "base") else lambda new: put(
        model, LAST, new
    )


def quantised(model):
    """The last layer in four bits, the others not."""
    layer, place = last_base(model)
    place(quantize_model(nn.Sequential(getattr(layer, "base", layer)))[0])


def derived(model):
    layer, place = last_base(model)
    place(nn.utils.parametrizations.weight_norm(getattr(layer, "base", layer)))


def valueless(model):
    _, place = last_base(model)
    place(nn.Linear(24, 0, bias=False))


def infinite(model):
    layer, _ = last_base(model)
    getattr(layer, "base", layer).weight.data[0, 0] = float("inf")


def plain(model):
    pass


CASES = {
    "merge, plain": (merge, None, plain),
    "merge, half quantised": (merge, {}, quantised),
    "merge, DoRA half quantised": (merge, {"layer": DoRALinear}, quantised),
    "merge, the last derived": (merge, {}, derived),
    "remove, the last residual quantised": (remove, {"layer": PiSSALinear}, quantised),
    "folded, plain": (lambda m: folded(m).__enter__(), None, plain),
    "folded, half quantised": (lambda m: folded(m).__enter__(), {}, quantised),
    "folded, the last derived": (lambda m: folded(m).__enter__(), {}, derived),
    "quantize, the last infinite": (quantize_model, None, infinite),
    "quantize, the last without values": (quantize_model, None, valueless),
    "quantize, the last base infinite": (quantize_model, {}, infinite),
    "quantize, the last base derived": (quantize_model, {}, derived),
    "quantize, a setting": (lambda m: quantize_model(m, block_size=3), None, quantised),
    "quantize, no such setting": (lambda m: quantize_model(m, bits=3), None, quantised),
    "quantize, some under adapters": (lambda m: quantize_model(m, ["q_proj"]), {}, plain),
    "dequantize, plain": (dequantize_model, None, plain),
    "dequantize, a dtype": (lambda m: dequantize_model(m, torch.int8), {}, quantised),
    "inject, adapted": (lambda m: inject(m, 2, 4), {}, quantised),
    "inject, PiSSA over four bits": (lambda m: inject(m, 2, 4, layer=PiSSALinear), None, quantised),
    "inject, DoRA over a derived one's last": (lambda m: inject(m, 99, 4, layer=PiSSALinear), None, derived),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_changes_nothing(case):
    act, adapter, prepare = CASES[case]
    model = build("llama")
    model.model.layers[0].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    if adapter is not None:
        inject(model, 2, 4, **adapter)
        for layer in adapters(model).values():
            nn.init.normal_(layer.B, std=0.1)
    prepare(model)
    if prepare is valueless:
        model.forward = lambda **_: type("Answer", (), {"logits": torch.zeros(1)})  # it cannot answer
    before = picture(model)
    with pytest.raises(ValueError, match=r"^expected"):
        act(model)
    after = picture(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert copy.deepcopy(model) is not model
