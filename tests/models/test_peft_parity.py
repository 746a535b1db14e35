"""lorakit against PEFT over many architectures: names, counts, outputs, gradients, files both ways."""

import copy

import peft
import pytest
import torch
from helpers.architectures import CONFIGS, build, logits_of
from helpers.parity import gradients, peft_model, randomise, relative

from lorakit import adapters, count, find_targets, inject, load_adapter, merge, save_adapter

ARCHITECTURES = sorted(CONFIGS)


def from_folder(base: torch.nn.Module, folder) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_chooses_what_peft_chooses(name):
    base = build(name)
    theirs = peft_model(base, r=4, target_modules="all-linear")
    assert set(find_targets(base)) == set(theirs.targeted_module_names)
    ours = count(inject(base, 4, 8))
    trainable, total = theirs.get_nb_trainable_parameters()
    assert (ours.trainable, ours.total) == (trainable, total)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rank", "scale_rule"), [(1, "lora"), (4, "rslora")])
def test_our_file_in_peft_gives_equal_logits_and_gradients(name, rank, scale_rule, tmp_path):
    base = build(name)
    ours = copy.deepcopy(base)
    inject(ours, rank, 8, scale_rule=scale_rule)
    randomise(ours)
    theirs = from_folder(base, save_adapter(ours, tmp_path))
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=1e-6, atol=5e-6)
    assert relative(logits_of(ours, name), logits_of(base, name)) > 1e-3  # the adapter does act
    mine, yours = gradients(ours, name), gradients(theirs, name)
    assert set(mine) == set(yours)
    worst = max(relative(mine[key], yours[key]) for key in mine)
    assert worst < 5e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pefts_file_in_ours_gives_equal_logits_and_merged_weights(name, tmp_path):
    base = build(name)
    theirs = peft_model(base, r=4, lora_alpha=6, target_modules="all-linear")
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    loaded = count(load_adapter(ours, tmp_path))
    assert loaded.trainable == theirs.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=1e-6, atol=5e-6)
    expected = theirs.merge_and_unload().state_dict()
    merged = merge(ours).state_dict()
    assert list(merged) == list(expected)
    for key in merged:
        torch.testing.assert_close(merged[key], expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_agree_with_peft(name, dtype, tmp_path):
    base = build(name, dtype)
    ours = copy.deepcopy(base)
    inject(ours, 4, 8)
    randomise(ours)
    theirs = from_folder(base, save_adapter(ours, tmp_path))
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-6}[
        dtype
    ]  # PEFT keeps float64 adapters in float32 when loading
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), rtol=tolerance, atol=tolerance)
    assert all(layer.A.dtype == torch.promote_types(dtype, torch.float32) for layer in adapters(ours).values())


PEFT_CONFIGS = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers by pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "rank pattern": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 3},
    },
    "rslora with patterns": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 9}},
    "gaussian start": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "the head of a tied model": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_pefts_settings_survive_the_way_here_and_back(case, tmp_path):
    base = build("llama-biased-tied")
    theirs = peft_model(base, r=4, lora_alpha=8, **PEFT_CONFIGS[case])
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "peft")
    torch.testing.assert_close(logits_of(ours, "llama"), logits_of(theirs, "llama"), rtol=1e-6, atol=1e-6)
    again = from_folder(base, save_adapter(ours, tmp_path / "ours"))
    torch.testing.assert_close(logits_of(again, "llama"), logits_of(theirs, "llama"), rtol=1e-6, atol=1e-6)


REFUSED = {
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_other_methods_are_refused_by_name(case, tmp_path):
    settings, word = REFUSED[case]
    base = build("llama")
    peft_model(base, r=4, target_modules=["q_proj"], **settings).save_pretrained(tmp_path)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=word):
        load_adapter(base, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_other_peft_types_are_refused_by_name(tmp_path):
    base = build("llama")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="IA3"):
        load_adapter(base, tmp_path)
