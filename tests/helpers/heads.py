"""Tiny random models with a head of their own: classifiers, and encoders with decoders; and what goes into them."""

import torch
import transformers as tf
from torch import nn

from helpers.architectures import CONFIGS, TINY

VIT = {k: v for k, v in TINY.items() if k.startswith(("hidden", "intermediate", "num"))} | {"image_size": 8}
WHISPER = {k: TINY[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")} | {
    **{f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 1), ("attention_heads", 2))},
    **{"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "decoder_start_token_id": 1},
    **{"max_source_positions": 10, "max_target_positions": 16, "dropout": 0.0},
}
MODELS = {
    "bert": (tf.BertForSequenceClassification, lambda: CONFIGS["bert"]()),
    "vit": (tf.ViTForImageClassification, lambda: tf.ViTConfig(**VIT, patch_size=4, num_labels=3)),
    "llama": (tf.LlamaForSequenceClassification, lambda: CONFIGS["llama"]()),
    "whisper": (tf.WhisperForConditionalGeneration, lambda: tf.WhisperConfig(**WHISPER)),
}


def build_head(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode; the same seed gives the same weights."""
    make, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(config()).eval()


def rows(name: str, number: int = 4) -> list[dict[str, torch.Tensor]]:
    """Examples with labels, as a collate of torch's makes batches of."""
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 61, (7,), generator=g) for _ in range(number)]
    if name == "whisper":
        return [{"input_features": torch.randn(8, 20, generator=g), "labels": row} for row in tokens]
    inputs = [
        {"pixel_values": torch.randn(3, 8, 8, generator=g)} if name == "vit" else {"input_ids": t} for t in tokens
    ]
    return [row | {"labels": torch.tensor(i % 2)} for i, row in enumerate(inputs)]


def scores_of(model: nn.Module, name: str, grad: bool = False) -> torch.Tensor:
    """The logits of two examples."""
    batch = torch.utils.data.default_collate(rows(name, 2))
    with torch.set_grad_enabled(grad):
        return model(**batch).logits
