"""Experts that are parameters: reached, equal to PEFT's in values, gradients and files, or refused in one line."""

import copy
import json
import re

import peft
import pytest
import torch
from helpers.architectures import MIXTURES, build, logits_of
from helpers.parity import peft_model, randomise, relative, snapshot, unchanged
from helpers.texts import examples
from torch import nn

from lorakit import (
    AdapterError,
    DoRALinear,
    LoRAConfig,
    LoRAExperts,
    LoRALinear,
    Spec,
    adapters,
    find_targets,
    fit,
    fit_many,
    folded,
    inject,
    load_adapter,
    loraplus_groups,
    merge,
    quantize_model,
    remove,
    save_adapter,
)
from lorakit.layers import shortcuts
from lorakit.layers.adapter import own_parameters

each_mixture = pytest.mark.parametrize("name", MIXTURES)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def adapted(name, rank=3, alpha=6, dtype=torch.float32, **settings):
    model = inject(build(name, dtype), rank, alpha, **settings)
    randomise(model)
    return model


def from_folder(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)


def loss_gradients(model):
    model.zero_grad()
    logits_of(model, "", grad=True).float().log_softmax(-1)[..., 5].mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    """As PEFT's files name and shape what they are the gradients of."""
    loss_gradients(model)
    found = {}
    for name, layer in adapters(model).items():
        of_gradients = copy.deepcopy(layer)
        for own, p in zip(own_parameters(of_gradients).values(), own_parameters(layer).values(), strict=True):
            own.data = p.grad
        found |= {f"{name}.{part}": tensor for part, tensor in of_gradients.peft_tensors().items()}
    return found


@each_mixture
def test_our_file_in_peft_gives_equal_logits_gradients_and_merged_weights(name, tmp_path):
    base = build(name)
    ours = adapted(name)
    theirs = from_folder(base, save_adapter(ours, tmp_path))
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), **CLOSE)
    assert relative(logits_of(ours, name), logits_of(base, name)) > 1e-2  # the adapter does act
    yours = {
        key.removeprefix("base_model.model.").replace(".default", ""): grad
        for key, grad in loss_gradients(theirs).items()
    }
    mine = gradients(ours)
    assert mine.keys() == yours.keys()
    assert any("experts.base_layer.lora_A" in key for key in mine)
    assert max(relative(mine[key], yours[key]) for key in mine) < 5e-5
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits_of(again, name), logits_of(ours, name), rtol=0, atol=0)
    assert unchanged(remove(again), snapshot(base))
    expected, merged = theirs.merge_and_unload().state_dict(), merge(ours).state_dict()
    assert merged.keys() == expected.keys()
    for key in merged:
        torch.testing.assert_close(merged[key], expected[key], **CLOSE)


PEFT_CONFIGS = {
    "both": ("mixtral", {"target_parameters": EXPERTS}),
    "all-linear, which PEFT spells out": ("qwen3-moe", {"target_modules": "all-linear"}),
    "with a router that is asked for something": (
        "deepseek-v3",
        {"target_modules": ["o_proj"], "target_parameters": ["gate.weight"]},
    ),
    "the outer one": ("gpt-oss", {"target_parameters": ["down_proj"]}),
    "the inner one": ("llama4", {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]}),
    "patterns": (
        "olmoe",
        {
            "target_parameters": EXPERTS,
            "target_modules": ["q_proj"],
            "use_rslora": True,
            "rank_pattern": {"gate_up_proj": 5, r"layers\.1\.mlp\.experts\.down_proj": 1},
            "alpha_pattern": {"experts.down_proj": 3},
        },
    ),
    "a layer by its weight": (
        "mixtral",
        {"target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 2}},
    ),
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_pefts_files_and_settings_survive_the_way_here_and_back(case, tmp_path):
    name, settings = PEFT_CONFIGS[case]
    base, settings = build(name), {"r": 4, "lora_alpha": 6, "target_modules": [], **settings}
    theirs = peft_model(base, **settings)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(logits_of(ours, name), logits_of(theirs, name), **CLOSE)
    again = from_folder(base, save_adapter(ours, tmp_path / "ours"))
    torch.testing.assert_close(logits_of(again, name), logits_of(theirs, name), **CLOSE)
    config = LoRAConfig.from_peft(theirs.peft_config["default"])
    shapes = {key: p.shape for layer in adapters(ours).values() for key, p in layer.peft_tensors().items()}
    made = inject(copy.deepcopy(base), LoRAConfig.from_peft(peft.LoraConfig(**config.to_peft())))
    assert shapes == {key: p.shape for layer in adapters(made).values() for key, p in layer.peft_tensors().items()}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_the_experts_computes_the_formula(name, way):
    model = adapted(name, rank=2)
    model.set_experts_implementation(way)
    fast, ours = logits_of(model, name), loss_gradients(model)
    with shortcuts.forbidden():
        plain, formula = logits_of(model, name), loss_gradients(model)
    torch.testing.assert_close(fast, plain, **CLOSE)
    assert max(relative(ours[key], formula[key]) for key in ours) < 1e-5


def test_nothing_of_all_experts_size_is_kept_for_the_backward_pass():
    model = adapted("mixtral")
    shapes = {tuple(sorted(p.shape)) for name, p in model.named_parameters() if "experts.base" in name}
    stored, kept = {p.data_ptr() for p in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        logits_of(model, "mixtral", grad=True)
    assert not [x.shape for x in kept if tuple(sorted(x.shape)) in shapes and x.data_ptr() not in stored]


def test_all_linear_reaches_experts_and_leaves_routers_out():
    found = adapters(inject(build("deepseek-v3"), 2, 4))
    experts = {name: layer for name, layer in found.items() if isinstance(layer, LoRAExperts)}
    assert {name: list(layer.settings) for name, layer in experts.items()} == {
        "model.layers.1.mlp.experts": ["gate_up_proj", "down_proj"]
    }
    assert not [name for name in found if name.endswith("gate")]
    without = inject(build("deepseek-v3"), 2, 4, target_parameters=[])
    assert adapters(without).keys() == found.keys() - experts.keys()


def test_a_router_that_is_a_linear_layer_is_left_out_unless_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(8, 3), nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

    model = nn.ModuleDict({"block": Block(), "out": nn.Linear(8, 3)})
    assert find_targets(model) == ["block.up", *(f"block.experts.{i}" for i in range(3)), "out"]
    assert find_targets(model, ["gate"]) == ["block.gate"]


def test_one_module_may_be_named_by_parameter_and_matrices_count_as_one_expert():
    model = inject(
        build("mixtral"),
        2,
        4,
        targets=["q_proj"],
        target_parameters=["gate.weight", "layers.1.self_attn.k_proj.weight"],
    )
    found = {name: type(layer) for name, layer in adapters(model).items()}
    gates = {f"model.layers.{i}.mlp.gate": LoRAExperts for i in (0, 1)}
    queries = {f"model.layers.{i}.self_attn.q_proj": LoRALinear for i in (0, 1)}
    assert found == gates | queries | {"model.layers.1.self_attn.k_proj": LoRALinear}
    assert found.keys() == adapters(model).keys()
    gate = model.get_submodule("model.layers.0.mlp.gate")
    assert gate.A["weight"].shape == (1, 2, 16)
    assert gate.delta_weight().shape == gate.base.weight.shape
    assert gate.weight.shape == gate.base.weight.shape


REFUSED = {
    "dropout": ({"dropout": 0.1}, r"without dropout .*'dropout': 0.1.*target_parameters=\[\] leaves them out"),
    "DoRA": ({"layer": DoRALinear}, "expected plain LoRA .*DoRALinear.*for layer 'model.layers.0.mlp.experts'"),
    "a near name": (
        {"target_parameters": ["experts.gate_up_prj"]},
        "'experts.gate_up_prj'; near: experts.gate_up_proj",
    ),
    "a vector": ({"target_parameters": ["input_layernorm.weight"]}, "matrix or a stack .*'weight', got \\(16,\\)"),
    "no list": ({"target_parameters": "experts.down_proj"}, "expected a valid target_parameters"),
    "a weight twice": (
        {"targets": ["q_proj"], "target_parameters": ["q_proj.weight"]},
        "each weight once, .*self_attn.q_proj', target_parameters",
    ),
    "a router as a layer": ({"targets": ["gate"]}, "'gate', which is a MixtralTopKRouter"),
    "nothing": ({"targets": [], "target_parameters": []}, "at least one target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_loses_nothing(case):
    settings, expected = REFUSED[case]
    model = build("mixtral")
    before = snapshot(model)
    with pytest.raises(ValueError, match=expected):
        inject(model, 2, 4, **settings)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_folded_answer_alike(dtype):
    model = adapted("mixtral", dtype=dtype)
    before, expected = snapshot(model), logits_of(model, "")
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with folded(model):
        torch.testing.assert_close(logits_of(model, ""), expected, **close)
    experts = [key for key in before if "experts" in key]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in experts)
    torch.testing.assert_close(logits_of(merge(model), ""), expected, **close)
    broken = adapted("mixtral")
    adapters(broken)["model.layers.0.mlp.experts"].B["down_proj"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite update of 'down_proj'.*layers\.0\.mlp\.experts"):
        merge(broken)


def test_over_four_bits_and_back(tmp_path):
    base = quantize_model(build("deepseek-v3"))
    ours = inject(base, 2, 4)
    randomise(ours)
    expected = logits_of(ours, "")
    save_adapter(ours, tmp_path)
    other = quantize_model(build("deepseek-v3"))
    torch.testing.assert_close(logits_of(load_adapter(other, tmp_path), ""), expected, rtol=0, atol=0)


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_adapter(adapted("mixtral"), tmp_path)
    for name, why in (("qwen3-moe", "expected floats of shape"), ("llama", "'experts.gate_up_proj'")):
        model = build(name)
        before = snapshot(model)
        with pytest.raises(AdapterError, match=why):
            load_adapter(model, tmp_path)
        assert unchanged(model, before)
    model = inject(build("mixtral"), 3, 6, target_parameters=["down_proj"])
    with pytest.raises(AdapterError, match=re.escape("experts")):
        load_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == EXPERTS


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_it_trains_alike_with_and_without_shortcuts_and_goes_on_after_an_end(name, tmp_path):
    def trained(steps=4, accelerate=True, **more):
        torch.manual_seed(0)
        model = inject(build(name), 2, 4)
        settings = {"batch_size": 4, "lr": 1e-2, "show": False, "accelerate": accelerate}
        return fit(model, examples(8), steps=steps, **settings, **more), snapshot(model)

    def stop(step):
        if step.number == 2:
            raise KeyboardInterrupt

    history, weights = trained()
    plain, other = trained(accelerate=False)
    assert sum(history.loss[2:]) < sum(history.loss[:2])  # the same texts, once more
    torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(plain.loss), rtol=1e-4, atol=1e-4)
    assert max(relative(weights[key], other[key]) for key in weights) < 1e-3
    checkpoints = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(**checkpoints, after_step=stop)
    again, resumed = trained(**checkpoints)
    assert again.loss == history.loss
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)


def test_loraplus_knows_the_experts_factors():
    model = inject(build("mixtral"), 2, 4)
    slow, fast = loraplus_groups(model, lr=1e-3)
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)].split(".")[-2] for p in fast["params"] if "experts" in named[id(p)]} == {"B"}
    assert not [p for p in slow["params"] if ".B." in named[id(p)]]


def test_fit_many_says_how_to_go_on_without_them():
    model = build("mixtral")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target_parameters=\[\]"):
        fit_many(model, examples(4), [Spec(LoRAConfig(2, 4), 1e-2)], steps=2, show=False)
    assert unchanged(model, before)
    (fitted,) = fit_many(model, examples(4), [Spec(LoRAConfig(2, 4, target_parameters=[]), 1e-2)], steps=2, show=False)
    assert not fitted.error
