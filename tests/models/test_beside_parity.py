"""Heads, norms, token rows and embeddings against PEFT: outputs, gradients, merged weights, files both ways."""

from functools import partial

import peft
import pytest
import torch
from helpers.architectures import build, logits_of
from helpers.four_bits import by_bitsandbytes, llama_folder  # noqa: F401
from helpers.heads import build_head, scores_of
from helpers.parity import gradients_of, peft_model, randomise, relative

from lorakit import AdapterError, LoRAConfig, count, inject, load_adapter, merge, save_adapter

QV, TIED, UNTIED = ["q_proj", "v_proj"], "llama-biased-tied", "llama"
LANGUAGE = {name: (partial(build, name), partial(logits_of, name=name)) for name in (TIED, UNTIED, "gpt2", "t5", "opt")}
HEADS = {f"{n} with a head": (partial(build_head, n), partial(scores_of, name=n)) for n in ("bert", "vit", "llama")}
MODELS = LANGUAGE | HEADS | {"whisper": (partial(build_head, "whisper"), partial(scores_of, name="whisper"))}

BOTH_ENDS = {"embed_tokens": 3, "lm_head": 3}
CASES = [
    ("bert with a head", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ("bert with a head", {"target_modules": "all-linear", "modules_to_save": ["classifier", "score", "pooler"]}),
    ("bert with a head", {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}),
    ("bert with a head", {"target_modules": ["query", "word_embeddings"], "use_rslora": True}),
    ("vit with a head", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier", "layernorm"]}),
    ("llama with a head", {"target_modules": QV, "modules_to_save": ["score"]}),
    (UNTIED, {"target_modules": QV, "modules_to_save": ["norm"]}),
    (UNTIED, {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens", "mlp"]}),
    (UNTIED, {"target_modules": QV, "trainable_token_indices": [5, 3]}),
    (UNTIED, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [4]}}),
    (UNTIED, {"target_modules": [*QV, "embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 3}}),
    (TIED, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    (TIED, {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (TIED, {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    (TIED, {"target_modules": QV, "trainable_token_indices": [5, 3, 0]}),
    (TIED, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [4]}}),
    (TIED, {"target_modules": [*QV, "embed_tokens"]}),
    (TIED, {"target_modules": [*QV, "lm_head"]}),
    (TIED, {"target_modules": [*QV, "lm_head"], "ensure_weight_tying": True}),
    (TIED, {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True, "rank_pattern": BOTH_ENDS}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "modules_to_save": ["ln_f"]}),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 3]}),
    ("opt", {"target_modules": QV, "trainable_token_indices": [5, 3, 0]}),
    ("t5", {"target_modules": ["q"], "trainable_token_indices": [5, 3], "modules_to_save": ["final_layer_norm"]}),
    ("whisper", {"target_modules": QV, "trainable_token_indices": [5, 3]}),
]
IDS = [f"{name}: {', '.join(map(str, settings.values()))}" for name, settings in CASES]
each_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)


def both(name, settings):
    """PEFT's model and ours with the same values, and the function that gives their logits."""
    make, logits = MODELS[name]
    theirs = peft_model(make(), r=2, lora_alpha=4, **settings)
    randomise(theirs)
    return make(), theirs, logits


@each_case
@pytest.mark.filterwarnings("ignore")
def test_pefts_file_gives_equal_logits_gradients_and_merged_weights(name, settings, tmp_path):
    ours, theirs, logits = both(name, settings)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    before = logits(theirs)
    torch.testing.assert_close(logits(ours), before, rtol=1e-5, atol=1e-5)
    mine, yours = (gradients_of(model, logits(model, grad=True)) for model in (ours, theirs))
    if "ensure_weight_tying" in settings and "modules_to_save" not in settings:  # PEFT's two factors are four there
        yours["model.embed_tokens.A"] += yours.pop("lm_head.B").T
        yours["model.embed_tokens.B"] += yours.pop("lm_head.A").T
    assert set(mine) == set(yours)
    assert max(relative(mine[key], yours[key]) for key in mine) < 5e-5
    torch.testing.assert_close(logits(merge(ours)), before, rtol=1e-5, atol=1e-5)


@each_case
@pytest.mark.filterwarnings("ignore")
def test_our_file_in_peft_gives_equal_logits(name, settings, tmp_path):
    make, logits = MODELS[name]
    theirs = peft_model(make(), r=2, lora_alpha=4, **settings)
    ours = inject(make(), LoRAConfig.from_peft(theirs.peft_config["default"]))
    trainable, _ = theirs.get_nb_trainable_parameters()
    twice = sum(p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "lm_head.lora" in n)
    tied_lora = settings.get("ensure_weight_tying") and "modules_to_save" not in settings
    assert count(ours).trainable == trainable - (twice if tied_lora else 0)
    start = logits(make())
    torch.testing.assert_close(logits(ours), start, rtol=1e-5, atol=1e-5)
    randomise(ours)
    assert relative(logits(ours), start) > 1e-3
    save_adapter(ours, tmp_path)
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_adapter(make(), tmp_path)), logits(ours), rtol=0, atol=0)
    in_place = inject(make(), LoRAConfig.from_peft(theirs.peft_config["default"]))
    held = {id(p) for p in in_place.parameters()}
    torch.testing.assert_close(logits(load_adapter(in_place, tmp_path)), logits(ours), rtol=0, atol=0)
    assert held == {id(p) for p in in_place.parameters()}


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [3, 5]}])
@pytest.mark.filterwarnings("ignore")
def test_beside_four_bits_it_is_pefts_too(settings, llama_folder, tmp_path):  # noqa: F811
    theirs = peft.get_peft_model(by_bitsandbytes(llama_folder), peft.LoraConfig(r=2, target_modules=QV, **settings))
    randomise(theirs)
    theirs.train().save_pretrained(tmp_path)
    ours = load_adapter(by_bitsandbytes(llama_folder).train(), tmp_path)
    tokens = torch.tensor([[3, 5, 7, 9]])
    mine, yours = (gradients_of(model, model(tokens).logits) for model in (ours, theirs))
    assert set(mine) == set(yours)
    assert max(relative(mine[key], yours[key]) for key in mine) < 5e-5


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_tied_ends_have_one_scale(pattern, tmp_path):
    """PEFT scales each by the pattern for its own name, so that one pattern alone means two changes of one weight."""
    settings = {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True, pattern: {"embed_tokens": 3}}
    _, theirs, _ = both(TIED, settings)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"expected one rank and one alpha with ensure_weight_tying, from"):
        load_adapter(MODELS[TIED][0](), tmp_path)
    config = LoRAConfig(2, 4, targets=settings["target_modules"], ensure_weight_tying=True, **{pattern: {"lm_head": 3}})
    with pytest.raises(ValueError, match=r"expected one rank and one alpha with ensure_weight_tying, from"):
        inject(MODELS[TIED][0](), config)
