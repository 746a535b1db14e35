"""A layer of the reader's own goes through everything, by the protocol alone: lorakit knows nothing of it."""

import inspect
import json
import textwrap

import peft
import pytest
import torch
from helpers.architectures import build, logits_of
from helpers.layers import Gated
from helpers.parity import snapshot, unchanged
from helpers.texts import examples
from torch import nn

import lorakit
from lorakit import AdapterError, DoRALinear, LoRALinear, adapters, folded, inject, load_adapter, merge, remove
from lorakit.layers.adapter import Adapter
from lorakit.merging.updates import read_updates
from lorakit.models.peft_files import CONFIG


class Apart(nn.Module):
    """The same without a LoRALinear in it, and a head of its own within."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, alpha
        self.down = nn.Linear(base.weight.shape[1], rank, bias=False)
        self.B = nn.Parameter(torch.zeros(base.weight.shape[0], rank))

    def forward(self, x):
        return self.base(x) + self.alpha * self.down(x) @ self.B.T

    def delta_weight(self):
        return self.alpha * self.B @ self.down.weight

    def merged(self):
        plain = nn.Linear(*reversed(self.base.weight.shape), bias=self.base.bias is not None)
        plain.load_state_dict(self.base.state_dict())
        plain.weight.data += self.delta_weight()
        return plain

    def removed(self):
        return self.base

    def peft_tensors(self):
        return {"down": self.down.weight, "up": self.B}

    def peft_settings(self):
        return {
            **{"peft_type": "APART", "r": self.rank, "lora_alpha": self.alpha, "use_rslora": False},
            **{"lora_dropout": 0.0, "use_dora": False},
        }

    @torch.no_grad()
    def load_peft(self, tensors):
        for name, tensor in self.peft_tensors().items():
            tensor.copy_(tensors[name])


KINDS = {
    "gated": (Gated, {"steep": 0.5}),
    "gated, rslora": (Gated, {"scale_rule": "rslora", "dropout": 0.1, "steep": 2.0}),
    "apart": (Apart, {}),
}


def trained(case):
    """A tiny Llama with that layer after one real step, and its state before; the first of the two has a rate of 0."""
    layer, settings = KINDS[case]
    model = build("llama")
    torch.manual_seed(0)
    inject(model, 3, 6, layer=layer, **settings)
    for adapter in adapters(model).values():
        adapter.B.data.normal_(0, 0.1)
    before = snapshot(model)
    lorakit.fit(model, examples(4), steps=2, batch_size=4, lr=1e-2, show=False)
    return model.eval(), before


@pytest.mark.parametrize("case", KINDS)
def test_it_goes_through_everything(case, tmp_path):
    model, before = trained(case)
    plain, base = logits_of(build("llama"), "llama"), snapshot(build("llama"))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), (
            name
        )  # each of its parameters learns
    assert isinstance(next(iter(adapters(model).values())), Adapter)
    logits = logits_of(model, "llama")
    assert (logits - plain).abs().max() > 1e-3

    lorakit.save_adapter(model, tmp_path)
    fresh = load_adapter(build("llama"), tmp_path, layer=KINDS[case][0]).eval()
    torch.testing.assert_close(logits_of(fresh, "llama"), logits)
    other = inject(build("llama"), 3, 6, layer=KINDS[case][0], **KINDS[case][1]).eval()
    held = [id(p) for p in other.parameters()]
    torch.testing.assert_close(logits_of(load_adapter(other, tmp_path), "llama"), logits)
    assert [id(p) for p in other.parameters()] == held  # in place

    state = snapshot(model)
    with folded(model):
        assert not adapters(model)
        torch.testing.assert_close(logits_of(model, "llama"), logits, rtol=1e-4, atol=1e-5)
    assert unchanged(model, state)
    torch.testing.assert_close(logits_of(merge(model), "llama"), logits, rtol=1e-4, atol=1e-5)
    assert not adapters(model)
    assert unchanged(remove(other), base)
    groups = lorakit.loraplus_groups(fresh, 1e-3, 4.0)
    assert {id(p) for p in groups[1]["params"]} == {id(layer.B) for layer in adapters(fresh).values()}


@pytest.mark.parametrize("case", KINDS)
def test_peft_refuses_its_file_by_name(case, tmp_path):
    model, _ = trained(case)
    lorakit.save_adapter(model, tmp_path)
    kind = "APART" if case == "apart" else "Gated"
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == kind
    with pytest.raises(KeyError, match=kind):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


def refused(model, folder, word, **settings):
    before = snapshot(model)
    with pytest.raises(AdapterError, match=word):
        load_adapter(model, folder, **settings)
    assert unchanged(model, before)


def test_files_and_layers_are_not_mixed_up(tmp_path):
    model, _ = trained("gated")
    gated = lorakit.save_adapter(model, tmp_path / "gated")
    plain = lorakit.save_adapter(inject(build("llama"), 3, 6), tmp_path / "plain")
    refused(build("llama"), gated, "got 'Gated'; for a layer of your own, give load_adapter its class")
    refused(build("llama"), gated, "expected a setting of Apart, got 'steep'", layer=Apart)
    refused(inject(build("llama"), 3, 6), gated, "got 'Gated'")
    refused(build("llama"), plain, "a file for Gated layers, got one for LoRALinear", layer=Gated)
    refused(inject(build("llama"), 3, 6, layer=Gated), gated, "expected steep = 1.0, got 0.5")
    refused(inject(build("llama"), 4, 6, layer=Gated, steep=0.5), gated, "shape|rank")
    with pytest.raises(AdapterError, match="got 'Gated'"):
        read_updates(gated)
    with pytest.raises(ValueError, match="expected LoRA, got Gated for layer"):
        read_updates(model)


def test_a_part_too_many_or_of_another_shape_is_refused(tmp_path):
    class More(Gated):
        peft_type = "Gated"  # claims to read the same files

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.second = nn.Parameter(torch.zeros(2))

    class Wide(Gated):
        peft_type = "Gated"

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.gate = nn.Parameter(torch.ones(2, len(self.B)))

    model, _ = trained("gated")
    lorakit.save_adapter(model, tmp_path)
    refused(build("llama"), tmp_path, "lora_B.weight, gate, second of layer", layer=More)
    refused(build("llama"), tmp_path, r"floats of shape \(2, 16\) for gate", layer=Wide)


def test_a_layer_that_fails_to_load_leaves_all_as_they_were(tmp_path):
    class Picky(Gated):
        peft_type = "Gated"

        def load_peft(self, tensors):
            super().load_peft(tensors)
            if len(self.B) != 16:
                raise ValueError("not this one")

    model, _ = trained("gated")
    lorakit.save_adapter(model, tmp_path)
    refused(build("llama"), tmp_path, "not this one", layer=Picky)
    refused(inject(build("llama"), 3, 6, layer=Picky, steep=0.5), tmp_path, "not this one")


def test_kinds_are_not_mixed_in_one_file(tmp_path):
    model, _ = trained("gated")
    layer = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = LoRALinear(layer.base, 3, 6)
    with pytest.raises(ValueError, match=r"expected Gated layers, got LoRALinear for layer 'model\.layers\.1\.mlp\.up"):
        lorakit.save_adapter(model, tmp_path)
    model.model.layers[1].mlp.up_proj = Gated(layer.base, 3, 6, steep=3.0)
    with pytest.raises(ValueError, match="expected Gated layers, got Gated"):
        lorakit.save_adapter(model, tmp_path)


def test_a_class_that_derives_from_dora_names_itself_too(tmp_path):
    class Mine(DoRALinear):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.shift = nn.Parameter(torch.full((len(self.B),), 0.1))

        def forward(self, x):
            return super().forward(x) + self.shift

    model = inject(build("llama"), 3, 6, layer=Mine)
    lorakit.save_adapter(model, tmp_path)
    for layer in adapters(model).values():
        layer.magnitude.data.mul_(1.1), layer.shift.data.mul_(2)
    again = load_adapter(build("llama"), lorakit.save_adapter(model, tmp_path), layer=Mine)
    torch.testing.assert_close(logits_of(again, "llama"), logits_of(model, "llama"))
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "Mine"


def test_the_example_in_the_protocol_runs(tmp_path, monkeypatch):
    lines = inspect.getdoc(Adapter).splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    monkeypatch.chdir(tmp_path)
    model, other = build("llama"), build("llama")
    scope = {"lorakit": lorakit, "nn": nn, "torch": torch, "model": model, "other": other}
    exec(code, scope)
    assert all(type(layer) is scope["Gated"] for layer in adapters(other).values())
    for layer in adapters(model).values():
        layer.gate.data.fill_(2.0), layer.B.data.normal_(0, 0.1)
    logits = logits_of(model, "llama")
    load_adapter(other, lorakit.save_adapter(model, "gated"))
    torch.testing.assert_close(logits_of(other, "llama"), logits)
    torch.testing.assert_close(logits_of(merge(model), "llama"), logits, rtol=1e-4, atol=1e-5)
