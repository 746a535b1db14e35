"""One configuration: checked when it is made, the same adapters as PEFT's, and the same again out of PEFT's."""

import dataclasses
import functools
import json
import pickle
import warnings

import peft
import pytest
import torch
from helpers.architectures import build
from helpers.parity import peft_model
from torch import nn

from lorakit import (
    DoRALinear,
    LoRAConfig,
    LoRALinear,
    PiSSALinear,
    adapters,
    find_targets,
    inject,
    olora_start,
    pissa_start,
)
from lorakit.layers.config import PLAIN


def made(model, *args, **settings):
    """What an injection has made of a model: the layers, their ranks, scales and starts."""
    torch.manual_seed(0)
    inject(model, *args, **settings)
    return {name: (type(x), x.rank, x.scale, x.drops, x.A.detach().clone()) for name, x in adapters(model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        a[:-1] == b[:-1] and torch.equal(a[-1], b[-1]) for a, b in zip(one.values(), other.values(), strict=True)
    )


SHORT = {
    "plain": {},
    "rslora": {"scale_rule": "rslora", "dropout": 0.1},
    "own rule": {"scale_rule": lambda alpha, rank: alpha / rank**2},
    "names": {"targets": ["q_proj", "v_proj"]},
    "expression": {"targets": r"layers\.1\..*_proj"},
    "dora": {"layer": DoRALinear, "detach_norm": False},
    "olora": {"layer": PiSSALinear, "start": olora_start},
    "patterns": {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"q_proj": 5.0}},
}


@pytest.mark.parametrize("case", SHORT)
def test_the_short_way_and_the_config_make_the_same(case):
    fields = {f.name for f in dataclasses.fields(LoRAConfig)}
    own = {key: value for key, value in SHORT[case].items() if key not in fields}
    rest = {key: value for key, value in SHORT[case].items() if key in fields}
    config = LoRAConfig(4, 8, **rest, settings=own)
    assert same(made(build("llama"), 4, 8, **SHORT[case]), made(build("llama"), config))


def test_ranks_and_alphas_by_layer():
    found = made(build("llama"), LoRAConfig(4, 8, rank_pattern={r"layers\.0\..*": 2}, alpha_pattern={"q_proj": 5.0}))
    q, k = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj")
    assert [found[name.format(i)][1] for name in (q, k) for i in (0, 1)] == [2, 4, 2, 4]
    assert [found[name.format(i)][2] for name in (q, k) for i in (0, 1)] == [2.5, 1.25, 4, 2]


class Further(LoRALinear):
    """A reader's class that knows one setting more."""

    def __init__(self, base, rank, alpha, bonus=1.0):
        super().__init__(base, rank, alpha)


BAD = {
    "rank 0": ({"rank": 0}, "rank as an integer >= 1, got 0"),
    "rank true": ({"rank": True}, "rank as an integer >= 1"),
    "no alpha": ({"alpha": float("nan")}, "finite scale"),
    "dropout 1": ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    "rule": ({"scale_rule": "alpha/r"}, r"scale_rule in \['lora', 'rslora'\] or a function"),
    "infinite": ({"scale_rule": lambda alpha, rank: float("inf")}, "finite scale"),
    "rank by layer": ({"rank_pattern": {"q_proj": 0}}, "rank as an integer >= 1"),
    "alpha by layer": ({"alpha_pattern": {"q_proj": float("inf")}}, "finite scale"),
    "a broken pattern": ({"rank_pattern": {"q_proj(": 2}}, "regular expression"),
    "a broken exclusion": ({"exclude_modules": "q_proj("}, "valid exclude_modules"),
    "a truth for a block": ({"layers_to_transform": [True]}, "valid layers_to_transform"),
    "a near name": ({"settings": {"exclude": ["q_proj"]}}, "near: .*exclude_modules"),
    "the rule's old name": ({"settings": {"scaling": "rslora"}}, "setting of LoRALinear, got 'scaling'; .*scale_rule"),
    "a setting of another": ({"settings": {"start": olora_start}, "layer": DoRALinear}, "DoRALinear, got 'start'"),
    "of a reader's own": ({"layer": Further, "settings": {"bonos": 2.0}}, "Further, got 'bonos'; near: bonus"),
    "what a class lacks": ({"layer": Further, "dropout": 0.1}, "Further, got 'dropout'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_when_it_is_made(case):
    settings, word = BAD[case]
    with pytest.raises(ValueError, match=word) as caught:
        LoRAConfig(**{"rank": 4, "alpha": 8} | settings)
    assert "\n" not in str(caught.value)


def test_it_is_a_value():
    one, other = (LoRAConfig(4, 8, targets=targets) for targets in (["q_proj"], ("q_proj",)))
    assert one == other
    assert len({one, other, LoRAConfig(4, 8)}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rank = 5
    assert dataclasses.replace(one, rank=5) == LoRAConfig(5, 8, targets=["q_proj"])


def test_a_config_and_further_settings_are_one_too_many():
    model = build("llama")
    for more in ({"alpha": 8}, {"targets": ["q_proj"]}, {"layer": DoRALinear}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="LoRAConfig alone"):
            inject(model, LoRAConfig(4, 8), **more)
    assert not adapters(model)


PEFTS = {
    "plain": LoRAConfig(4, 8),
    "rslora": LoRAConfig(4, 8, 0.1, "rslora", ["q_proj", "v_proj"]),
    "expression": LoRAConfig(4, 8, targets=r"layers\.1\..*(up|down)_proj"),
    "alternatives": LoRAConfig(4, 8, targets=r"q_proj|layers\.0\.mlp\.up_proj"),
    "dora": LoRAConfig(4, 8, layer=DoRALinear),
    "pissa": LoRAConfig(4, 8, layer=PiSSALinear),
    "olora": LoRAConfig(4, 8, layer=PiSSALinear, settings={"start": olora_start}),
    "patterns": LoRAConfig(4, 8, rank_pattern={r"layers\.0\..*": 2}, alpha_pattern={"q_proj": 5.0}),
    "excluded": LoRAConfig(4, 8, exclude_modules=["down_proj", "layers.0.self_attn.q_proj"]),
    "excluded expression": LoRAConfig(4, 8, exclude_modules=r"layers\.0\..*|up_proj", targets=".*_proj"),
    "layers": LoRAConfig(4, 8, targets=["q_proj", "up_proj"], layers_to_transform=[1]),
    "layers by pattern": LoRAConfig(4, 8, targets=["q_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
}


@pytest.mark.parametrize("case", PEFTS)
def test_pefts_config_makes_the_same_layers_and_comes_back(case):
    config = PEFTS[case]
    theirs = peft_model(build("llama"), **config.to_peft())
    ours = adapters(inject(build("llama"), config))
    for name, layer in ours.items():
        other = theirs.base_model.model.get_submodule(name)
        assert (layer.rank, layer.scale) == (other.r["default"], other.scaling["default"])
        assert bool(other.use_dora["default"]) == isinstance(layer, DoRALinear)
        if config.layer is PiSSALinear:
            W = other.lora_B["default"].weight @ other.lora_A["default"].weight
            torch.testing.assert_close(layer.B @ layer.A, W, rtol=1e-3, atol=1e-5)
    assert set(theirs.targeted_module_names) == set(ours)
    assert LoRAConfig.from_peft(config.to_peft()) == config
    back = LoRAConfig.from_peft(peft.LoraConfig(**config.to_peft()))
    assert dataclasses.replace(back, targets=config.targets) == config
    assert json.loads(json.dumps(config.to_peft())) == config.to_peft()


def test_a_quick_start_and_a_rule_of_ones_own():
    quick = LoRAConfig(4, 8, layer=PiSSALinear, settings={"start": functools.partial(pissa_start, niter=16)})
    assert quick.to_peft()["init_lora_weights"] == "pissa_niter_16"
    back = LoRAConfig.from_peft(quick.to_peft()).settings["start"]
    assert (back.func, back.keywords) == (pissa_start, {"niter": 16})
    own = LoRAConfig(4, 8, scale_rule=lambda alpha, rank: alpha / rank**2).to_peft()
    assert peft.LoraConfig(**own).lora_alpha / own["r"] == 8 / 4**2


CHOICES = {
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "a pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "excluded expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    "both": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    "two patterns": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    "whole names alone": {"target_modules": r"model\.layers\.0\..*q_proj"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "excluded from an expression": {"target_modules": r".*(q|v)_proj", "exclude_modules": ["v_proj"]},
}


@pytest.mark.parametrize("case", CHOICES)
def test_layers_by_index_and_exclusions_choose_what_peft_chooses(case):
    theirs = peft_model(build("llama"), r=4, lora_alpha=8, **CHOICES[case])
    config = LoRAConfig.from_peft(theirs.peft_config["default"])
    assert set(adapters(inject(build("llama"), config))) == set(theirs.targeted_module_names)


@pytest.mark.parametrize("targets", ["all-linear", r".*(q|v)_proj"])
def test_layers_by_index_go_with_any_targets(targets):
    chosen = find_targets(build("llama"), targets)
    found = adapters(inject(build("llama"), 4, 8, targets, layers_to_transform=[1], exclude_modules=["v_proj"]))
    assert list(found) == [name for name in chosen if ".1." in name and "v_proj" not in name]
    with pytest.raises(ValueError, match="targets by name with layers_to_transform"):
        LoRAConfig(4, 8, targets=targets, layers_to_transform=[1]).to_peft()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exclude_modules": ["down_prj"]}, "exclude_modules that match a layer, got 'down_prj'; near: down_proj"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform in \[0, 1\], got 2"),
        ({"exclude_modules": ".*"}, "layers that are not excluded, got none of model.layers.0"),
        ({"exclude": ["q_proj"]}, "a setting of LoRALinear, got 'exclude'; near: exclude_modules"),
    ],
)
def test_what_would_choose_otherwise_than_meant_is_refused(settings, words):
    model = build("llama")
    with pytest.raises(ValueError, match=words):
        inject(model, 4, 8, **settings)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_expression_that_takes_the_output_head_by_the_way_says_so():
    with (
        pytest.warns(UserWarning, match=r"chooses the output head, too: exclude_modules=\['lm_head'\]"),
        pytest.warns(UserWarning, match=r"chooses an embedding, too: exclude_modules=\['model.embed_tokens'\]"),
    ):
        inject(build("llama"), 4, 8, r"(?!.*down_proj).*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(build("llama"), 4, 8, r"(?!.*down_proj).*", exclude_modules=["lm_head", "embed_tokens"])
        inject(build("llama"), 4, 8, r"lm_head|q_proj")
        inject(build("llama"), 4, 8, ["lm_head"])


def test_the_first_number_in_a_name_is_the_layers():
    def block():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w": nn.Linear(4, 4)}) for _ in range(2))})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2))})})
    settings = {"target_modules": ["w"], "layers_to_transform": [0]}
    theirs = peft_model(model, r=2, **settings)
    ours = inject(model, LoRAConfig.from_peft({"r": 2, "lora_alpha": 8, **settings}))
    assert set(adapters(ours)) == set(theirs.targeted_module_names)
    assert set(adapters(ours)) == {f"model.layers.0.experts.{i}.w" for i in (0, 1)}


REFUSED = {
    "lora_bias": ({"lora_bias": True}, "got lora_bias = True"),
    "modules_to_save as text": ({"modules_to_save": "lm_head"}, "valid modules_to_save"),
    "token ids as text": ({"trainable_token_indices": ["a"]}, "valid trainable_token_indices"),
    "another start": ({"init_lora_weights": "gaussian"}, "init_lora_weights = 'gaussian'"),
    "a random B": ({"init_lora_weights": False}, "init_lora_weights = False"),
    "no targets": ({"target_modules": None}, "valid target_modules"),
    "a rank as text": ({"r": "4"}, "valid r, got '4'"),
    "a broken expression": ({"target_modules": "q_proj("}, "target_modules"),
    "layers as text": ({"layers_to_transform": ["1"]}, "layers_to_transform"),
    "another method": ({"peft_type": "LOHA"}, r"plain LoRA \(peft_type 'LORA'\), got 'LOHA'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_is_refused_in_one_line(case):
    settings, word = REFUSED[case]
    with pytest.raises(ValueError, match=word) as caught:
        LoRAConfig.from_peft({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="IA3"):
        LoRAConfig.from_peft(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(4, 8, layer=Further),
        LoRAConfig(4, 8, layer=DoRALinear, settings={"detach_norm": False}),
        LoRAConfig(4, 8, layer=PiSSALinear, settings={"start": lambda W, rank, scale: olora_start(W, rank, scale)}),
        LoRAConfig(4, 8, scale_rule=lambda alpha, rank: alpha, rank_pattern={"q_proj": 2}),
    ],
)
def test_what_peft_does_not_have_is_refused(config):
    with pytest.raises(ValueError, match="PEFT has"):
        config.to_peft()


def test_the_settings_that_are_read_are_pefts():
    gone = {name for name in PLAIN if name not in peft.LoraConfig(target_modules=["q_proj"]).to_dict()}
    assert gone <= {"peft_version", "eva_config", "runtime_config"}
