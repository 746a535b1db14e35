"""PiSSA and OLoRA by hand are PEFT's: starts, residuals, gradients, merged weights, and the files that fit the base."""

import copy
import functools

import pytest
import torch
from helpers.architectures import DIVERSE, build, logits_of
from helpers.parity import gradients, peft_model, relative
from torch import nn

import lorakit
from lorakit._optional import quiet
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.layers.pissa import PiSSALinear, olora_start, pissa_start

with quiet():
    import peft

STARTS = {"pissa": pissa_start, "olora": olora_start}


def adapted(base, rank=4, alpha=8, **settings):
    model = copy.deepcopy(base)
    lorakit.inject(model, rank, alpha, layer=PiSSALinear, **settings)
    return model


def in_peft(base, start, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    return peft_model(base, init_lora_weights=start, **settings)


def moved(ours, theirs=None):
    """As after training: the same random change of A and B in both models."""
    generator = torch.Generator().manual_seed(3)
    for name, layer in lorakit.adapters(ours).items():
        for part in ("A", "B"):
            step = 0.1 * torch.randn(getattr(layer, part).shape, generator=generator)
            getattr(layer, part).data.add_(step)
            if theirs is not None:
                theirs.get_parameter(f"base_model.model.{name}.lora_{part}.default.weight").data.add_(step)


# PEFT 0.21 takes GPT-2's Conv1D for a Linear in OLoRA: factors of the transposed weight, which do not fit.
CASES = [(name, start) for name in DIVERSE for start in STARTS if (name, start) != ("gpt2", "olora")]


@pytest.mark.parametrize(("name", "start"), CASES)
@pytest.mark.parametrize("scale_rule", ["lora", "rslora"])
def test_starts_gradients_and_merged_weights_are_those_of_peft(name, start, scale_rule):
    base = build(name)
    ours = adapted(base, scale_rule=scale_rule, start=STARTS[start])
    theirs = in_peft(base, start, use_rslora=scale_rule == "rslora")
    for key, layer in lorakit.adapters(ours).items():
        other = theirs.get_submodule(f"base_model.model.{key}")
        pairs = [(layer.A, other.lora_A["default"]), (layer.B, other.lora_B["default"])]
        for mine, yours in [*((p, q.weight) for p, q in pairs), (layer.base.weight, other.base_layer.weight)]:
            assert relative(mine.detach(), yours.detach()) < 1e-5
    torch.testing.assert_close(logits_of(ours, name), logits_of(base, name), rtol=1e-4, atol=1e-5)
    moved(ours, theirs)
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=1e-5, atol=5e-6)
    mine, yours = gradients(ours, name), gradients(theirs, name)
    assert set(mine) == set(yours)
    assert max(relative(mine[key], yours[key]) for key in mine) < 5e-5
    theirs = theirs.merge_and_unload().state_dict()
    for key, value in lorakit.merge(ours).state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-biased-tied", "gpt2", "t5"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale_rule", ["lora", "rslora"])
def test_a_saved_adapter_fits_the_original_base_here_and_in_peft(name, start, scale_rule, tmp_path):
    base = build(name)
    ours = adapted(base, scale_rule=scale_rule, start=STARTS[start])
    moved(ours)
    expected = logits_of(ours, name)
    lorakit.save_adapter(ours, tmp_path)
    read = copy.deepcopy(base)
    lorakit.load_adapter(read, tmp_path)
    torch.testing.assert_close(logits_of(read, name), expected, rtol=1e-4, atol=1e-5)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(theirs, name), expected, rtol=1e-4, atol=1e-5)


def test_the_file_is_the_one_that_peft_converts_to(tmp_path):
    base = build("llama")
    ours, theirs = adapted(base), in_peft(base, "pissa")
    theirs.peft_config["default"].init_lora_weights = True  # else it is computed anew when the start is read
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    moved(ours, theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    lorakit.save_adapter(ours, tmp_path / "ours")
    mine, yours = (lorakit.models.peft_files.read_adapter(tmp_path / who) for who in ("ours", "theirs"))
    assert mine[1]["r"] == yours[1]["r"] == 8
    assert mine[1]["lora_alpha"] == yours[1]["lora_alpha"] == 16
    assert set(mine[0]) == set(yours[0])
    assert max(relative(mine[0][key], yours[0][key]) for key in mine[0]) < 1e-5


def test_pefts_plain_pissa_file_is_refused(tmp_path):
    base = build("llama")
    in_peft(base, "pissa").save_pretrained(tmp_path)
    with pytest.raises(lorakit.AdapterError, match="init_lora_weights = 'pissa'"):
        lorakit.load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_removing_gives_the_pretrained_weights_back(name):
    base = build(name)
    model = adapted(base)
    moved(model)
    before = base.state_dict()
    for key, value in lorakit.remove(model).state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-7)


def test_weights_that_others_share_stay_as_they_are():
    base = build("llama-biased-tied")
    model, before = copy.deepcopy(base), base.get_input_embeddings().weight.clone()
    lorakit.inject(model, 2, 4, ["lm_head", "q_proj"], layer=PiSSALinear)
    assert torch.equal(model.get_input_embeddings().weight, before)
    torch.testing.assert_close(logits_of(model, "llama"), logits_of(base, "llama"), rtol=1e-4, atol=1e-5)


def test_an_error_leaves_the_model_as_it_was():
    base = build("llama")
    model = copy.deepcopy(base)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        lorakit.inject(model, 2, 4, layer=PiSSALinear)
    assert not lorakit.adapters(model)
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())


def test_folded_and_fitted_as_any_adapter():
    model = adapted(build("llama"))
    moved(model)
    logits = logits_of(model, "llama")
    with lorakit.folded(model):
        torch.testing.assert_close(logits_of(model, "llama"), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(model, "llama"), logits, rtol=1e-4, atol=1e-5)


def test_the_start_is_the_best_approximation_and_learned_weight_its_change():
    base = nn.Linear(24, 16)
    mine = PiSSALinear(base, 4, 8)
    spectrum = torch.linalg.svdvals(base.weight.detach())
    assert torch.linalg.svdvals(mine.base.weight)[0] == pytest.approx(spectrum[4].item(), rel=1e-4)
    torch.testing.assert_close(mine.base.weight + mine.delta_weight(), base.weight, rtol=0, atol=1e-6)
    assert not mine.learned_weight().any()
    mine.B.data.add_(0.1)
    A, B = mine.as_lora()
    torch.testing.assert_close(mine.scale * B @ A, mine.learned_weight(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.merged().weight, base.weight + mine.learned_weight(), rtol=0, atol=1e-5)


def test_a_randomised_svd_comes_near():
    torch.manual_seed(0)
    base = nn.Linear(200, 160)
    exact = PiSSALinear(base, 8, 8)
    quick = PiSSALinear(base, 8, 8, start=functools.partial(pissa_start, niter=16))
    assert quick.base.weight.norm() < 1.01 * exact.base.weight.norm()


def test_a_quantised_residual_loses_less_than_a_quantised_weight():
    torch.manual_seed(0)
    spread = torch.logspace(0, -2, 64).diag() @ torch.linalg.qr(torch.randn(64, 64)).Q
    base = nn.Linear(64, 64, bias=False)
    base.weight.data.copy_(torch.linalg.qr(torch.randn(64, 64)).Q @ spread)
    mine = nn.Sequential(PiSSALinear(base, 8, 8))
    lorakit.quantize_model(mine)
    assert isinstance(mine[0].base, NF4Linear)
    error = mine[0].base.frozen_weight(torch.float32) + mine[0].delta_weight() - base.weight
    plain = NF4Linear(copy.deepcopy(base)).frozen_weight(torch.float32) - base.weight
    assert error.norm() < 0.8 * plain.norm()
    with pytest.raises(ValueError, match="cannot be had back"):
        lorakit.remove(mine)
    with pytest.raises(ValueError, match="dequantize_model first"):
        lorakit.merge(mine)
    torch.testing.assert_close(
        lorakit.merge(lorakit.dequantize_model(mine))[0].weight, base.weight + error, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(24, 16).to(dtype), torch.randn(5, 24, dtype=dtype)
    mine = PiSSALinear(base, 4, 8)
    assert mine.base.weight.dtype == dtype
    assert mine.A.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(mine(x), base(x), rtol=tolerance, atol=tolerance)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"rank <= min\(d_out, d_in\)"):
        PiSSALinear(nn.Linear(24, 16), 17, 4)
    with pytest.raises(ValueError, match="scale > 0"):
        PiSSALinear(nn.Linear(4, 4), 2, -1)
    with pytest.raises(ValueError, match="then quantise"):
        PiSSALinear(NF4Linear(nn.Linear(64, 32)), 2, 4)


def test_a_file_goes_back_into_layers_with_the_same_start_only(tmp_path):
    base = build("llama")
    model = adapted(base)
    moved(model)
    logits = logits_of(model, "llama")
    lorakit.save_adapter(model, tmp_path)
    again = adapted(base)
    torch.testing.assert_close(logits_of(lorakit.load_adapter(again, tmp_path), "llama"), logits, rtol=1e-4, atol=1e-5)
    other = adapted(base, start=lorakit.olora_start)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(lorakit.AdapterError, match="with this start"):
        lorakit.load_adapter(other, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
