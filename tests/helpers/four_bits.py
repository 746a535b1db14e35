"""A small Llama whose rows are whole blocks, loaded plainly or in four bits by bitsandbytes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from lorakit._optional import quiet

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(path)
    return path


def plain(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def by_bitsandbytes(folder, dtype=torch.float32, **settings):
    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    } | settings
    with quiet():
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()
