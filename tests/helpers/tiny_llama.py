"""A random Llama with SmolLM2's tokenizer, so small that a lesson runs on it in seconds."""

from pathlib import Path

import torch
import transformers

from lorakit._optional import quiet
from lorakit.models.download import fetch_model


def save_tiny_llama(folder: Path) -> Path:
    """Saves it as a folder for `load_model`, and returns the folder.

    As in SmolLM2, several query heads share keys and values, and the head is tied. Other than there, no width is a
    multiple of NF4's blocks of 64; all are above rank 64.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch_model("smollm2"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
