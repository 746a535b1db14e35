"""Choosing, wrapping, counting, merging and removing, over whole models."""

import copy

import pytest
import torch
from helpers.architectures import CONFIGS, build, logits_of
from helpers.parity import randomise, snapshot, unchanged
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM

from lorakit import DoRALinear, LoRALinear, adapters, count, find_targets, inject, merge, remove, save_adapter


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_fresh_adapter_changes_no_bit_and_removing_it_gives_the_model_back(name):
    model = build(name)
    before, logits = snapshot(model), logits_of(model, name)
    inject(model, 3, 8)
    assert torch.equal(logits_of(model, name), logits)
    randomise(model)
    assert not torch.allclose(logits_of(model, name), logits, atol=1e-3)
    assert remove(model) is model
    assert unchanged(model, before)
    assert torch.equal(logits_of(model, name), logits)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_merge_returns_a_plain_model_that_saves_and_loads(name, tmp_path):
    model = build(name)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    inject(model, 3, 8)
    randomise(model)
    logits = logits_of(model, name)
    assert merge(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits_of(model, name), logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, name), logits, rtol=1e-5, atol=1e-5)
    inject(model, 2, 2)  # and it can be adapted again


@pytest.mark.parametrize("name", ["llama-biased-tied", "gpt2", "gemma"])
def test_adapting_a_tied_head_leaves_the_embedding_alone(name, tmp_path):
    model = build(name)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    before = embedding.clone()
    inject(model, 3, 8, targets=["lm_head"])
    randomise(model)
    logits = logits_of(model, name)
    merge(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    torch.testing.assert_close(logits_of(model, name), logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, name), logits, rtol=1e-5, atol=1e-5)


def test_a_tied_model_stays_tied_when_its_head_is_not_adapted(tmp_path):
    model = build("llama-biased-tied")
    inject(model, 3, 8)
    merge(model)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


TARGETS = {
    "names": (["q_proj", "v_proj"], 4),
    "a longer name": (["layers.1.self_attn.q_proj"], 1),
    "a full name": (["model.layers.0.mlp.up_proj"], 1),
    "a regex": (r"layers\.1\..*(up|down)_proj", 2),
    "a regex for the full name": (r"model\.layers\.\d\.self_attn\.[qkvo]_proj", 8),
    "one name as a regex": ("gate_proj", 2),
    "names twice": (["q_proj", "self_attn.q_proj"], 2),
    "all-linear": ("all-linear", 14),
    "the head by name": (["lm_head"], 1),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(case):
    targets, number = TARGETS[case]
    model = build("llama")
    found = find_targets(model, targets)
    assert len(found) == len(set(found)) == number
    inject(model, 2, 4, targets=targets)
    assert list(adapters(model)) == found
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_gqa_shapes_and_counts():
    model = build("llama")  # hidden 16, 4 heads, 2 key/value heads
    result = count(inject(model, 3, 6, targets=["q_proj", "k_proj"]))
    layers = adapters(model)
    assert layers["model.layers.0.self_attn.q_proj"].B.shape == (16, 3)
    assert layers["model.layers.0.self_attn.k_proj"].B.shape == (8, 3)
    assert result.trainable == 2 * 3 * (16 + 16 + 16 + 8)
    assert str(result) == f"trainable {result.trainable:,} of {result.total:,} parameters ({result.percent:.2f} %)"


BAD = {
    "a typing error": ({"targets": ["q_prj"]}, "q_proj"),
    "one of several matches nothing": ({"targets": ["q_proj", "vproj"]}, "v_proj"),
    "a regex without a match": ({"targets": r"layers\.9\..*"}, "near|known"),
    "a broken regex": ({"targets": "layers.(1"}, "regular expression"),
    "an empty list": ({"targets": []}, "empty"),
    "a container": ({"targets": ["mlp"]}, "LlamaMLP"),
    "a norm": ({"targets": ["norm"]}, "RMSNorm"),
    "DoRA on an embedding": ({"targets": ["embed_tokens"], "layer": DoRALinear}, "Embedding"),
    "a whole module's typing error": ({"modules_to_save": ["lm_haed"]}, "lm_head"),
    "no classifier there": ({"modules_to_save": ["classifier", "score"]}, "classifier"),
    "everything whole": ({"modules_to_save": ["model"]}, "targets beside"),
    "tokens that are not there": (
        {"trainable_token_indices": [60, 61]},
        "from 0 to 60, got 61.*resize_token_embeddings",
    ),
    "a token twice": ({"trainable_token_indices": [3, 3]}, "different"),
    "tokens of no table": ({"trainable_token_indices": {"norm": [3]}}, "norm"),
    "rows and LoRA": ({"targets": ["q_proj", "embed_tokens"], "trainable_token_indices": [3]}, "one way"),
    "rows and all": ({"modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]}, "one way"),
    "rank 0": ({"rank": 0}, "rank"),
    "dropout 1": ({"dropout": 1.0}, "dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_the_model_untouched(case):
    settings, word = BAD[case]
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    before, grads = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=word):
        inject(model, **({"rank": 4, "alpha": 8} | settings))
    assert unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == grads


def test_an_adapter_class_that_fails_midway_leaves_the_model_untouched():
    made = []

    def failing(base, rank, alpha):
        if len(made) == 3:
            raise ValueError("no more")
        made.append(LoRALinear(base, rank, alpha))
        return made[-1]

    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="no more"):
        inject(model, 4, 8, layer=failing)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_injection_is_refused_whatever_its_targets():
    model = build("llama")
    inject(model, 2, 4, targets=["q_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapters"):
        inject(model, 2, 4, targets=["v_proj"])
    assert unchanged(model, before)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_peft_adapted_is_refused():
    import peft

    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(ValueError, match="PEFT"):
            inject(model, 2, 4)


@pytest.mark.parametrize("act", [merge, save_adapter])
def test_a_plain_model_has_nothing_to_merge_or_save(act, tmp_path):
    with pytest.raises(ValueError, match="plain"):
        act(build("llama"), *([tmp_path] if act is save_adapter else []))


def test_a_classifiers_head_is_left_out():
    config = CONFIGS["bert"]()
    model = BertForSequenceClassification(config)
    assert "classifier" not in find_targets(model)
    assert "bert.pooler.dense" in find_targets(model)


def test_a_model_of_ones_own_works():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    x = torch.randn(3, 4)
    y = model(x)
    inject(model, 2, 2)
    assert torch.equal(model(x), y)
    assert isinstance(model[0], LoRALinear)
    assert isinstance(merge(model)[2], nn.Linear)


def test_a_layer_used_in_two_places_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.ModuleDict({"proj": shared}), "second": nn.ModuleDict({"proj": shared})})
    result = count(inject(model, 2, 4, targets=["proj"]))
    assert model["first"]["proj"] is model["second"]["proj"]
    assert result.trainable == 2 * (4 + 4)
    merge(model)
    assert model["first"]["proj"] is model["second"]["proj"]
    assert isinstance(model["first"]["proj"], nn.Linear)


def test_attention_that_reads_weights_directly_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert find_targets(model) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        inject(model, 2, 4, targets=["out_proj"])


def test_a_readers_own_layer_can_be_injected_and_merged():
    class Mine(nn.Module):
        def __init__(self, base, rank, alpha, bonus):
            super().__init__()
            self.base, self.bonus = base, bonus
            self.A = nn.Parameter(torch.zeros(rank, base.in_features))

        def forward(self, x):
            return self.base(x) + self.bonus

        def merged(self):
            plain = copy.deepcopy(self.base)
            plain.bias.data += self.bonus
            return plain

    model = nn.Sequential(nn.Linear(3, 3))
    y = model(torch.ones(1, 3))
    inject(model, 2, 4, layer=Mine, bonus=1.0)
    torch.testing.assert_close(model(torch.ones(1, 3)), y + 1)
    torch.testing.assert_close(merge(model)(torch.ones(1, 3)), y + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = build("llama", dtype)
    assert isinstance(model, LlamaForCausalLM)
    inject(model, 2, 4)
    randomise(model)
    logits = logits_of(model, "llama")
    assert logits.dtype == dtype
    merged = logits_of(merge(model), "llama")
    torch.testing.assert_close(merged, logits, rtol=0.05, atol=0.05)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("settings", [{"targets": "(1|11)*[!?]"}, {"rank_pattern": {"(1|11)*[!?]": 2}}], ids=str)
def test_an_expression_that_never_ends_is_refused(settings):
    model = nn.Sequential()
    model.add_module("1" * 40, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="quick to match"):
        inject(model, 2, 4, **settings)


def test_a_layer_that_is_compiled_alone_is_refused():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"))
    with pytest.raises(ValueError, match="compiled alone"):
        inject(model, 2, 4)
    assert all(p.requires_grad for p in model.parameters())
