"""Tiny random models of many families, built from their configs alone, for parity with PEFT."""

import torch
import transformers as tf
from torch import nn

from lorakit import inject

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**TINY, **GQA),
    "llama-biased-tied": lambda: tf.LlamaConfig(
        **TINY, **GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral-gqa": lambda: tf.MistralConfig(**TINY, **GQA),
    "qwen2": lambda: tf.Qwen2Config(**TINY, **GQA),
    "qwen3": lambda: tf.Qwen3Config(**TINY, **GQA, head_dim=8),
    "gemma": lambda: tf.GemmaConfig(**TINY, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**TINY, **GQA, head_dim=8),
    "phi": lambda: tf.PhiConfig(**TINY),
    "phi3": lambda: tf.Phi3Config(**TINY, **GQA),
    "gpt2": lambda: tf.GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1),
    "opt": lambda: tf.OPTConfig(
        **{k: v for k, v in TINY.items() if k != "intermediate_size"}, ffn_dim=24, word_embed_proj_dim=16
    ),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**TINY),
    "bert": lambda: tf.BertConfig(**TINY),
    "t5": lambda: tf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MIXTURES = {  # GPT-OSS stores (E, d_in, d_out) and says so, Llama 4 does not say it; it and DeepSeek share an expert
    "mixtral": lambda: tf.MixtralConfig(**TINY, **GQA, **EXPERTS),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**TINY, **GQA, **QWEN_EXPERTS),
    "olmoe": lambda: tf.OlmoeConfig(**TINY, **GQA, num_experts=4, num_experts_per_tok=2),
    "llama4": lambda: tf.Llama4TextConfig(
        **TINY, **GQA, head_dim=8, intermediate_size_mlp=20, num_local_experts=4, moe_layers=[1]
    ),
    "gpt-oss": lambda: tf.GptOssConfig(
        **TINY,
        **GQA,
        **EXPERTS,
        head_dim=8,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **TINY,
        num_key_value_heads=4,
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1},
        **{"first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
    ),
}
# three for tests that are not about architectures: heads of another width, GPT-2's Conv1D, biases and tied weights
DIVERSE = ("gemma2", "gpt2", "llama-biased-tied")
AUTO = {"bert": tf.AutoModelForMaskedLM, "t5": tf.AutoModelForSeq2SeqLM}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode; the same seed gives the same weights."""
    config = (CONFIGS | MIXTURES)[name]()
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout_prob", "dropout_rate"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AUTO.get(name, tf.AutoModelForCausalLM).from_config(config).to(dtype).eval()


def logits_of(model: nn.Module, name: str, grad: bool = False) -> torch.Tensor:
    """Logits, (2, 7, 61), for fixed random tokens; without `grad`, attention's choice of kernel is the same for all."""
    tokens = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.set_grad_enabled(grad):
        return model(input_ids=tokens, **inputs).logits


def adapted(name, dtype=torch.float32, **settings):
    """A tiny model with adapters whose B is not zero."""
    model = build(name, dtype)
    inject(model, 3, 6, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model
