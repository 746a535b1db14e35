"""An adapter of a resized vocabulary: its file has the new rows, and a model with fewer tokens is refused."""

import peft
import pytest
import torch
import transformers as tf
from helpers.architectures import build
from helpers.parity import peft_model, randomise, snapshot, unchanged

from lorakit import AdapterError, inject, load_adapter, merge, save_adapter

NEW = torch.tensor([[3, 62, 63, 5]])
CASES = {
    "LoRA alone": {},
    "new rows": {"trainable_token_indices": [62, 63]},
    "the head": {"modules_to_save": ["lm_head"]},
    "LoRA on the embedding": {"targets": ["q_proj", "embed_tokens"]},
    "both ends as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def resized(folder, seed, tokens=64):
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokens)
    return model.eval()


@torch.no_grad()
def answers(model):
    return model(NEW).logits


@pytest.mark.parametrize("name", ["llama-biased-tied", "llama"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_file_has_the_new_rows_and_a_plain_reload_both_ends(name, case, tmp_path):
    build(name).save_pretrained(tmp_path / "base")
    ours, settings = resized(tmp_path / "base", 0), CASES[case]
    randomise(inject(ours, 2, 4, **settings))
    save_adapter(ours, tmp_path / "ours")
    wanted = answers(ours)
    torch.testing.assert_close(answers(load_adapter(resized(tmp_path / "base", 1), tmp_path / "ours")), wanted)
    again = peft.PeftModel.from_pretrained(resized(tmp_path / "base", 2), tmp_path / "ours")
    torch.testing.assert_close(answers(again), wanted, rtol=1e-5, atol=1e-5)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = snapshot(plain)
    with pytest.raises(AdapterError, match=r"64 tokens.* one of 61: model\.resize_token_embeddings\(64\) first"):
        load_adapter(plain, tmp_path / "ours")
    assert unchanged(plain, before)
    merge(ours).save_pretrained(tmp_path / "merged")
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(reloaded), wanted, rtol=1e-5, atol=1e-5)
    theirs = peft_model(resized(tmp_path / "base", 0), r=2, target_modules=["q_proj"], **settings_of(settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    loaded = load_adapter(resized(tmp_path / "base", 3), tmp_path / "peft")
    torch.testing.assert_close(answers(loaded), answers(theirs), rtol=1e-4, atol=1e-4)


def settings_of(settings):
    return {key: value for key, value in settings.items() if key != "targets"}


def test_a_model_without_a_base_to_compare_is_told_by_its_size(tmp_path):
    big = build("llama")
    big.resize_token_embeddings(64)
    save_adapter(inject(big, 2, 4), tmp_path)
    with pytest.raises(AdapterError, match=r"resize_token_embeddings\(64\)"):
        load_adapter(build("llama"), tmp_path)
    larger = build("llama")
    larger.resize_token_embeddings(70)
    load_adapter(larger, tmp_path)
