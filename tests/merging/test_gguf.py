"""GGUF files: transformers reads them back as the model that was written; what they cannot hold is refused."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from helpers.architectures import CONFIGS, build, logits_of
from helpers.parity import randomise
from tokenizers import Tokenizer, models, pre_tokenizers

import lorakit
from lorakit.merging.export import export_merged
from lorakit.merging.gguf import _turned, write_gguf, write_lora_gguf
from lorakit.merging.updates import Update, read_updates


def tensors(path):
    return {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with biases nowhere, grouped queries, and SmolLM2's tokenizer."""
    _, tokenizer = lorakit.load_model("smollm2")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="8MB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_0", 0.12), ("Q4_1", 0.12)]
)
def test_a_file_is_read_back_as_the_model(folder, tmp_path, kind, error):
    assert len(list(folder.glob("model*.safetensors"))) > 1, "several files"
    path = write_gguf(folder, tmp_path / "new" / "model.gguf", kind)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        other = again.state_dict()[name]
        bound = 1e-2 if kind.startswith("Q4") and "embed" in name else error  # both ends have eight bits at least
        assert (other - weight).norm() <= bound * weight.norm(), name
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_the_tokenizer_is_in_the_file(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    fields = gguf.GGUFReader(path).fields
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = fields["tokenizer.ggml.tokens"].contents()
    assert words[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(set(words)) == len(tokenizer) + 3
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.token_type"].contents()[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    again = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "<|im_start|>user\nfind 1234 Ünïcode, don't  stop<|im_end|>\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_an_adapter_is_written_with_its_scale_and_the_order_of_its_base(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    write_gguf(folder, tmp_path / "base.gguf")
    lorakit.inject(model, 4, 32, scale_rule="rslora")
    for layer in lorakit.adapters(model).values():
        torch.nn.init.normal_(layer.B)
    updates = read_updates(model)
    found = tensors(write_lora_gguf(updates, folder, tmp_path / "adapter.gguf"))
    assert len(found) == 2 * len(updates)
    lorakit.merge(model).save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    base = tensors(tmp_path / "base.gguf")
    merged = tensors(write_gguf(tmp_path / "merged", tmp_path / "merged.gguf"))
    for name in (key.removesuffix(".lora_a") for key in found if key.endswith(".lora_a")):
        change = found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        torch.testing.assert_close(base[name] + change, merged[name], atol=1e-5, rtol=1e-4)
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == 0.0
    assert fields["general.type"].contents() == "adapter"


ENDS = {
    "both": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "one for both": {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "the input": {"targets": ["embed_tokens", "q_proj"]},
    "the output": {"targets": ["lm_head", "q_proj"]},
    "a whole head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"targets": ["q_proj"], "trainable_token_indices": [5, 7]},
}


def test_llama_cpp_looks_tokens_up_in_an_embeddings_first_factor(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    model = lorakit.inject(build("llama"), 2, 4, targets=["embed_tokens", "lm_head"])
    randomise(model)
    found = tensors(write_lora_gguf(read_updates(model), tmp_path / "llama", tmp_path / "adapter.gguf"))
    merged = lorakit.merge(model).get_input_embeddings().weight - build("llama").get_input_embeddings().weight
    A, B = (found[f"token_embd.weight.lora_{x}"] for x in "ab")
    assert A.shape == (61, 2)
    torch.testing.assert_close(A @ B.T, merged)
    assert found["output.weight.lora_a"].shape == (2, 16)


def bytes_only(size):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted(split.alphabet())[:size]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", ENDS)
def test_both_ends_come_back_from_an_exported_models_file(tmp_path, ends, tied):
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    bytes_only(config.vocab_size).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lorakit.inject(model, lorakit.LoRAConfig(2, 4, **ENDS[ends]))
    randomise(model)
    lorakit.save_adapter(model, tmp_path / "adapter")
    want = logits_of(model.eval(), "llama")
    export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path = write_gguf(tmp_path / "out", tmp_path / "model.gguf")
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits_of(again.eval(), "llama"), want, rtol=1e-5, atol=1e-5)


def test_rows_of_queries_and_keys_are_put_in_pairs():
    config = CONFIGS["llama"]()
    rows = torch.arange(16.0)[:, None] * torch.ones(16, 3)
    assert _turned(rows, "model.layers.0.self_attn.q_proj", config)[:8, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert _turned(rows[:8], "model.layers.0.self_attn.k_proj", config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(_turned(rows, "model.layers.0.self_attn.v_proj", config), rows)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma"])
def test_another_architecture_is_refused(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected a Llama"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_what_cannot_be_written_is_refused_and_nothing_is_lost(tmp_path):
    build("llama-biased-tied").save_pretrained(tmp_path / "llama")
    (tmp_path / "there.gguf").write_text("mine")
    update = {"model.layers.0.self_attn.q_proj": Update(torch.ones(16, 2), torch.ones(2, 16))}
    with pytest.raises(FileExistsError, match="new file"):
        write_lora_gguf(update, tmp_path / "llama", tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    path: Path = tmp_path / "new.gguf"
    with pytest.raises(ValueError, match="kind"):
        write_gguf(tmp_path / "llama", path, "Q3")
    with pytest.raises(ValueError, match="expected updates"):
        write_lora_gguf({}, tmp_path / "llama", path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        write_gguf(tmp_path, path)
    with pytest.raises(ValueError, match="no place"):
        write_lora_gguf({"model.layers.7.self_attn.q_proj": update.popitem()[1]}, tmp_path / "llama", path)
    for name in ("lm_head", "model.embed_tokens"):
        with pytest.raises(ValueError, match=f"expected weights that no other layer has, got '{name}'"):
            write_lora_gguf({name: Update(torch.ones(61, 2), torch.ones(2, 16))}, tmp_path / "llama", path)
    with pytest.raises(ValueError, match="blocks of 32"):
        write_lora_gguf({"lm_head": Update(torch.ones(61, 2), torch.ones(2, 16))}, _untied(tmp_path), path, "Q8_0")
    assert not path.exists()


def _untied(folder):
    build("llama").save_pretrained(folder / "untied")
    return folder / "untied"


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    model, tokenizer = lorakit.load_model("tiny")
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="byte-level BPE"):
        write_gguf(tmp_path / "tiny", tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


@pytest.mark.parametrize("change", ["lowercase", "space in front"])
def test_a_tokenizer_that_changes_texts_first_is_refused(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    file = copy / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    if change == "lowercase":
        spec["normalizer"] = {"type": "Lowercase"}
    else:
        spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match="expected a tokenizer"):
        write_gguf(copy, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
