"""What is left out is named and counted, and nothing is said where only the usual is."""

import pytest
import torch
import transformers as tf
from helpers.architectures import CONFIGS, build
from helpers.hybrids import HYBRIDS
from helpers.texts import examples

from lorakit import DoRALinear, LoRAConfig, Spec, count, fit_many, inject, quantize_model

BEYOND = {  # what "all-linear" leaves out beside embeddings, head, norms and biases
    "mixtral": {"routers": 2 * 4 * 16},
    "llama4": {"routers": 4 * 16},
    "gpt-oss": {"other weights": 2 * 4, "routers": 2 * (4 * 16 + 4)},
    "deepseek-v3": {"routers": 4 * 16},
}


@pytest.mark.parametrize("name", BEYOND)
def test_all_linear_names_and_counts_what_it_leaves_out(name, capsys):
    model = inject(build(name), 2, 4)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" parameters in ")[0] for line in said] == [
        f"lorakit: without an adapter: {kind}, {number}" for kind, number in BEYOND[name].items()
    ]
    counted = count(model)
    assert BEYOND[name].items() <= counted.left_out.items()
    assert counted.left_out["embeddings"] == counted.left_out["output head"] == 61 * 16
    frozen = sum(p.numel() for key, p in model.named_parameters() if ".base." not in key and not p.requires_grad)
    biases = sum(p.numel() for key, p in model.named_parameters() if key.endswith("_bias"))  # of experts
    assert sum(counted.left_out.values()) == frozen + biases
    assert str(counted).endswith(", ".join(f"{kind} {number}" for kind, number in BEYOND[name].items()))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_said_of_a_dense_model(name, capsys):
    counted = count(inject(build(name), 2, 4))
    assert capsys.readouterr().err == ""
    assert counted.left_out.keys() <= {"embeddings", "output head", "norms", "biases"}
    assert str(counted).endswith("%)")


def test_other_kinds_have_their_names(capsys):
    counted = count(inject(tf.AutoModelForCausalLM.from_config(HYBRIDS["mamba"]()), 2, 4))
    assert counted.left_out["convolutions"] == 2 * 64 * (4 + 1)
    assert counted.left_out["other weights"] == 2 * 64 * (4 + 1)  # A_log and D
    patches = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    assert count(inject(tf.ViTModel(patches), 2, 4)).left_out["convolutions"] == 16 * (3 * 4 * 4 + 1)
    assert capsys.readouterr().err.count("convolutions, ") == 2


def test_who_chooses_hears_nothing_and_can_ask(capsys):
    chosen = inject(build("mixtral"), 2, 4, targets=["q_proj"])
    assert capsys.readouterr().err == ""
    assert "without an adapter: routers 128, experts 9,216" in str(count(chosen))
    fit_many(build("mixtral"), examples(2), [Spec(LoRAConfig(1, 2, target_parameters=[]), 1e-3)], steps=1, show=False)
    assert capsys.readouterr().err == ""
    assert count(build("mixtral")).left_out == {}
    inject(build("mixtral"), 2, 4, layer=DoRALinear, target_parameters=[])
    assert "experts, 9,216 parameters in model.layers.0.mlp.experts.gate_up_proj and 3 more" in capsys.readouterr().err


def test_exclusions_and_blocks_hold_for_experts():
    model = inject(build("mixtral"), 2, 4, exclude_modules=["down_proj"], layers_to_transform=[1])
    assert count(model).left_out["experts"] == 4 * 16 * (2 * 24 + 24 + 24)
    with pytest.raises(ValueError, match=r"layers_to_transform in \[0, 1\], got 2"):
        inject(build("mixtral"), 2, 4, layers_to_transform=[2])
    kept = inject(build("mixtral"), 2, 4, exclude_modules=["experts"])
    assert count(kept).left_out["experts"] == 2 * 4 * 3 * 16 * 24


def test_quantize_model_says_what_stays_wide(capsys):
    quantize_model(build("mixtral"))
    total = sum(p.numel() for p in build("mixtral").parameters())
    rest = total - 2 * (16 * 16 * 2 + 16 * 8 * 2)
    expected = f"not in four bits: routers 128, experts 9,216; in all {rest:,} of {total:,} parameters"
    assert expected in capsys.readouterr().err
    quantize_model(build("llama"))
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        assert quantize_model(build("mixtral"))(torch.tensor([[3, 4]])).logits.isfinite().all()
