"""Models whose blocks are not the usual ones train, answer and merge, or are refused in one line."""

import pytest
import torch
import transformers as tf
from helpers.hybrids import HYBRIDS
from helpers.texts import TOKENIZER, examples
from torch import nn

from lorakit import adapters, fit, folded, greedy, inject, merge, quantize_model
from lorakit.layers.adapter import own_parameters


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_counts(name):
    torch.manual_seed(0)
    model, tokens = tf.AutoModelForCausalLM.from_config(HYBRIDS[name]()).eval(), torch.arange(3, 9)[None]
    before = model(tokens).logits.detach()
    inject(model, 2, 4)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    fit(model, examples(8), steps=3, batch_size=4, lr=5e-3, show=False)
    factors = {f"{name}.{key}": p for name, each in adapters(model).items() for key, p in own_parameters(each).items()}
    assert not [key for key, p in factors.items() if not p.any()], "layers that never learn"
    for key, p in factors.items():
        if ".B" in key:
            nn.init.normal_(p, std=0.2)
    assert len(greedy(model, TOKENIZER, ["abc", "de"], max_new_tokens=2, show=False)) == 2
    expected = model(tokens).logits.detach()
    with folded(model):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merge(model)(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert quantize_model(model)(tokens).logits.isfinite().all()
