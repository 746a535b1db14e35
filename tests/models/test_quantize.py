"""Models in four bits: QLoRA by hand is PEFT on bitsandbytes, and nobody rearranges the codes."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from helpers.architectures import build, logits_of
from helpers.four_bits import by_bitsandbytes, plain
from helpers.parity import gradients, randomise, relative
from helpers.texts import examples
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit._optional import quiet
from lorakit.layers import bnb as repacking
from lorakit.layers.bases import frozen_weight
from lorakit.layers.bnb import is_linear4bit, prevent_repacking
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.models.quantize import dequantize_model, quantize_model
from lorakit.training.batch import collate
from lorakit.training.loss import completion_loss

with quiet():
    import peft


def has_trap():
    return bool(bnb.functional.has_avx512bf16())


# ---- whole models ----


def test_adapters_are_the_same_whether_the_seed_is_set_before_or_after_rounding():
    found = []
    for early in (True, False):
        model = build("llama")
        if early:
            torch.manual_seed(5)
        quantize_model(model)
        if not early:
            torch.manual_seed(5)
        lorakit.inject(model, 2, 4)
        found.append([layer.A for layer in lorakit.adapters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "gpt2", "qwen2", "phi", "opt", "bert", "t5"])
def test_every_linear_layer_but_the_head_is_quantised(name):
    model = build(name)
    names, before = lorakit.find_targets(model), logits_of(model, name)
    assert quantize_model(model) is model
    assert all(isinstance(model.get_submodule(each), NF4Linear) for each in names)
    after = logits_of(model, name)
    assert 0 < relative(after, before) < 1
    assert lorakit.find_targets(model) == names
    quantize_model(model)  # once more changes nothing
    torch.testing.assert_close(logits_of(model, name), after)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_dequantised_it_is_the_same_model_and_can_be_merged(name, tmp_path):
    model = build(name)
    kinds = {each: type(model.get_submodule(each)) for each in lorakit.find_targets(model)}
    quantize_model(model)
    lorakit.inject(model, 4, 8)
    randomise(model)
    before = logits_of(model, name)
    with pytest.raises(ValueError, match="floating-point base"):
        lorakit.merge(model)
    lorakit.merge(dequantize_model(model))
    torch.testing.assert_close(logits_of(model, name), before, rtol=1e-4, atol=1e-5)
    assert {each: type(model.get_submodule(each)) for each in kinds} == kinds
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again, name), before, rtol=1e-4, atol=1e-5)


def test_refusals_leave_the_model_as_it_was():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())

    def refuse(match, *args, **settings):
        with pytest.raises(ValueError, match=match):
            quantize_model(model, *args, **settings)
        assert not any(isinstance(m, NF4Linear) for m in model.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    refuse("near", ["q_prj"])
    refuse("even block size", block_size=7)
    refuse("codebook", codebook=(1.0,))
    with pytest.raises(ValueError, match="4-bit layers"):
        dequantize_model(model)
    tied = build("llama-biased-tied")
    with pytest.raises(ValueError, match="shared"):
        quantize_model(tied, ["lm_head"])
    broken = build("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*layers\.1\.mlp\.up_proj"):
        quantize_model(broken)
    assert not any(isinstance(m, NF4Linear) for m in broken.modules())
    adapted = build("llama")
    lorakit.inject(adapted, 2, 4)
    with pytest.raises(ValueError, match="plain model"):
        quantize_model(adapted, ["q_proj"])


def test_adapters_of_a_quantised_base_are_saved_and_loaded(tmp_path):
    one, other = (quantize_model(build("llama")) for _ in range(2))
    lorakit.inject(one, 4, 8)
    randomise(one)
    lorakit.load_adapter(other, lorakit.save_adapter(one, tmp_path))
    assert torch.equal(logits_of(one, "llama"), logits_of(other, "llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_trains_on_four_bits(dtype):
    from helpers.texts import examples

    model = quantize_model(build("llama", dtype))
    codes = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    lorakit.inject(model, 4, 8)
    losses = lorakit.fit(model, examples(8), steps=12, batch_size=4, lr=1e-2, show=False).loss
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(m.weight, codes[n.removesuffix(".base")]) for n, m in model.named_modules() if n.endswith("base")
    )


# ---- against PEFT on bitsandbytes ----


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("arm", ["NF4Linear", "Linear4bit"])
def test_qlora_by_hand_has_the_gradients_of_peft_on_bitsandbytes(llama_folder, arm, double, tmp_path):
    prevent_repacking()
    base = by_bitsandbytes(llama_folder, bnb_4bit_use_double_quant=double)
    ours = quantize_model(plain(llama_folder), double_quant=double) if arm == "NF4Linear" else copy.deepcopy(base)
    lorakit.inject(ours, 4, 8)
    randomise(ours)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base, str(lorakit.save_adapter(ours, tmp_path)), is_trainable=True)
    assert type(theirs.base_model.model.model.layers[0].mlp.up_proj).__module__.startswith("peft.tuners.lora.bnb")
    torch.testing.assert_close(logits_of(ours, "llama"), logits_of(theirs, "llama"), rtol=1e-5, atol=1e-6)
    mine, yours = gradients(ours, "llama"), gradients(theirs, "llama")
    assert set(mine) == set(yours)
    assert max(relative(mine[key], yours[key]) for key in mine) < 1e-5
    for layer in lorakit.adapters(ours).values():
        assert callable(frozen_weight(layer.base, torch.zeros(1, layer.base.in_features)))  # the fast path


def test_another_compute_dtype_takes_the_usual_path(llama_folder):
    prevent_repacking()
    model = by_bitsandbytes(llama_folder, bnb_4bit_compute_dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert frozen_weight(layer, torch.zeros(1, 64)) is None
    lorakit.inject(model, 2, 4)
    logits_of(model, "llama", grad=True).sum().backward()


def test_bitsandbytes_models_are_dequantised_and_merged(llama_folder):
    prevent_repacking()
    model, reference = by_bitsandbytes(llama_folder), quantize_model(plain(llama_folder))
    expected = reference.model.layers[1].mlp.down_proj.frozen_weight()
    assert torch.equal(dequantize_model(model).model.layers[1].mlp.down_proj.weight, expected)


# ---- the trap ----


@pytest.fixture
def unguarded(monkeypatch):
    """bitsandbytes as it comes."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", bnb.functional.has_avx512bf16)


def layer4bit():
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    return layer.to("cpu")


def answered(layer):
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 128))
    return layer


@pytest.mark.usefixtures("unguarded")
@pytest.mark.skipif(not has_trap(), reason="this processor does not repack")
def test_without_the_helper_the_trap_is_there():
    layer = layer4bit()
    before = repacking.dequantized(layer, torch.float32)
    answered(layer)
    assert relative(repacking.dequantized(layer, torch.float32), before) > 0.1
    with pytest.raises(ValueError, match="repacked"):
        lorakit.LoRALinear(layer, 2, 4)
    with pytest.raises(ValueError, match=r"repacked.*'0'"):
        prevent_repacking(nn.Sequential(layer))
    with pytest.raises(ValueError, match="repacked"):
        dequantize_model(nn.Sequential(layer))


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("way", ["before", "after", "by LoRALinear"])
def test_with_the_helper_the_weight_stays(way):
    if way == "before":
        assert prevent_repacking() == has_trap()
    layer = layer4bit()
    before = repacking.dequantized(layer, torch.float32)
    if way == "after":
        prevent_repacking(nn.Sequential(layer))
    if way == "by LoRALinear":
        lorakit.LoRALinear(layer, 2, 4)
    answered(layer)
    assert torch.equal(repacking.dequantized(layer, torch.float32), before)
    x = torch.randn(3, 128, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(0).expand(3, -1))


def test_other_modules_are_no_4bit_layers():
    assert not is_linear4bit(nn.Linear(2, 2))
    assert not is_linear4bit(NF4Linear(nn.Linear(2, 2)))
    assert is_linear4bit(layer4bit())


@pytest.mark.usefixtures("unguarded")
def test_the_guard_can_be_taken_back(monkeypatch):
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)  # as on a processor that repacks
    prevent_repacking()
    assert not layer4bit().support_avx512bf16_for_cpu
    repacking.allow_repacking()
    assert layer4bit().support_avx512bf16_for_cpu


@pytest.mark.usefixtures("unguarded")
def test_a_block_guards_new_layers_and_a_models_and_then_all_is_as_before(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    layer = layer4bit()
    with pytest.raises(KeyError), repacking.repacking_prevented(nn.Sequential(layer)):  # noqa: PT012
        answered(layer)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        inside = layer4bit()
        raise KeyError
    assert not inside.support_avx512bf16_for_cpu
    assert layer.support_avx512bf16_for_cpu
    assert layer4bit().support_avx512bf16_for_cpu


@pytest.mark.usefixtures("unguarded")
def test_fit_does_not_repack_a_model_of_pefts(llama_folder):
    """Whether texts may be packed is tried in eval mode, in which a bare layer of bitsandbytes would be repacked."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    with quiet():
        model = peft.get_peft_model(by_bitsandbytes(llama_folder), config)
    layers = [module for module in model.modules() if is_linear4bit(module)]
    long = lorakit.Example([3, *range(4, 20)], [-100, *range(4, 20)])  # short texts then share its row
    history = lorakit.fit(model, [long, *examples(7)], steps=2, show=False)
    assert history.speed["packing"].startswith("used")
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


# ---- the fast path in whole ----


def test_the_loss_under_fits_settings_is_the_plain_one(llama_folder):
    from lorakit.speed.activations import lean

    model = quantize_model(plain(llama_folder))
    lorakit.inject(model, 4, 8)
    randomise(model)
    batch = collate(examples(6))
    with lean(model) as count:
        assert count == 7
        ours = completion_loss(model.train(), batch)
    torch.testing.assert_close(ours, model(**batch).loss)


def test_conv1d_keeps_its_class():
    model = nn.Sequential(Conv1D(8, 4), nn.Linear(8, 4))
    before = [m.weight.shape for m in model]
    dequantize_model(quantize_model(model))
    assert [type(m) for m in model] == [Conv1D, nn.Linear]
    assert [m.weight.shape for m in model] == before
