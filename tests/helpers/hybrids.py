"""Tiny random models whose blocks are not the usual ones: state spaces, experts, gated norms."""

import transformers as tf

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}

HYBRIDS = {
    "mamba": lambda: tf.MambaConfig(**MAMBA, state_size=4, time_step_rank=4),
    "mamba2": lambda: tf.Mamba2Config(**MAMBA, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "bamba": lambda: tf.BambaConfig(**TINY, **STATES, attn_layer_indices=[1]),
    "granite-moe-hybrid": lambda: tf.GraniteMoeHybridConfig(
        **TINY,
        **STATES,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=40,
    ),
    "nemotron-h": lambda: tf.NemotronHConfig(
        **TINY | {"num_hidden_layers": 3},
        hybrid_override_pattern="M-*",
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **TINY, head_dim=8, intermediate_size_mlp=32, num_local_experts=2, moe_layers=[0]
    ),
}
