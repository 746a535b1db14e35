"""What the frozen layers below the first adapter answer is kept only where that changes nothing."""

import pytest
import torch
from helpers.architectures import adapted, build
from helpers.texts import examples

from lorakit import fit, inject
from lorakit.speed.frozen_prefix import below
from lorakit.training.batch import collate, pack, spans

UPPER = {
    "llama": r"model\.layers\.1\..*proj",
    "qwen3": r"model\.layers\.1\.mlp.*proj",
    "gemma2": r"model\.layers\.1\..*proj",
    "gpt2": r"transformer\.h\.1\..*(c_attn|c_fc)",
    "opt": r"model\.decoder\.layers\.1\..*(q_proj|fc1)",
    "gpt-neox": r"gpt_neox\.layers\.1\..*(query_key_value|dense)",
}


def upper(name, **settings):
    model = build(name)
    torch.manual_seed(1)
    inject(model, 3, 6, targets=UPPER[name], **settings)
    return model.train()


def prefix(model, texts):
    """What can be skipped, and why not."""
    return below(model, [text.input_ids for text in texts])


def refused(model, texts):
    found, why = prefix(model, texts)
    assert found is None
    return why


@pytest.mark.parametrize("name", UPPER)
def test_training_is_the_same_and_the_lower_layers_run_in_the_first_epoch_alone(name, monkeypatch):
    texts, kept = examples(12), upper(name)
    lower, seen = next(m for m in kept.modules() if isinstance(m, torch.nn.ModuleList))[0], []
    forward = type(lower).forward

    def counted(self, *args, **kwargs):
        seen.append(self is lower)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lower), "forward", counted)
    ours = fit(kept, texts, steps=6, batch_size=6, lr=1e-2, show=False)
    assert seen.count(False) - seen.count(True) == 1 + 4  # one of three trials, and two of three epochs, go without it
    monkeypatch.setattr("lorakit.speed.accelerated.below", lambda model, texts: (None, "not here"))
    plain = upper(name)
    theirs = fit(plain, texts, steps=6, batch_size=6, lr=1e-2, show=False)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_known_batch_is_not_computed_again_packed_or_padded():
    model, texts = upper("llama"), examples(8)
    found, why = prefix(model, texts)
    assert why.startswith("1 frozen blocks")
    layer, seen = model.model.layers[0].self_attn.q_proj, []
    keys, lengths = range(8), [len(text.input_ids) for text in texts]
    padded, packed = collate(texts), pack(texts)
    with torch.no_grad():
        expected = {"padded": model(padded["input_ids"], padded["attention_mask"]).logits}
        places = {"position_ids": packed["position_ids"], "use_cache": False}
        expected["packed"] = model(packed["input_ids"], **places).logits
        with found.batch(keys, spans(lengths, False), padded["input_ids"].shape):
            model(padded["input_ids"], padded["attention_mask"])
        layer.register_forward_hook(lambda *_: seen.append(1))
        with found.batch(keys, spans(lengths, False), padded["input_ids"].shape):
            got = {"padded": model(padded["input_ids"], padded["attention_mask"]).logits}
        with found.batch(keys, spans(lengths, True), packed["input_ids"].shape):
            got["packed"] = model(packed["input_ids"], **places).logits
    assert not seen
    real = padded["attention_mask"].bool()
    assert torch.equal(got["padded"][real], expected["padded"][real])
    for row, start, length in spans(lengths, True):
        part = row, slice(start, start + length)
        torch.testing.assert_close(got["packed"][part], expected["packed"][part], rtol=1e-4, atol=1e-5)


def test_dropout_hooks_and_adapters_at_the_bottom_rule_it_out():
    texts = examples(4)
    assert prefix(upper("llama"), texts)[0]
    assert prefix(upper("llama", dropout=0.5), texts)[0], "dropout above does not matter"
    assert "first block trains" in refused(adapted("llama"), texts)
    noisy = build("gpt2")
    noisy.transformer.h[0].attn.resid_dropout.p = 0.5
    inject(noisy, 3, 6, targets=UPPER["gpt2"])
    assert "dropout" in refused(noisy.train(), texts)
    hooked = upper("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "hook" in refused(hooked, texts)
    trains = upper("llama")
    trains.model.embed_tokens.weight.requires_grad_()
    assert "outside of the blocks" in refused(trains, texts)


def test_a_side_path_past_the_blocks_rules_it_out():
    model = upper("llama")
    first, second = model.model.layers
    taken = type(second).forward

    class Remembering(type(first)):
        def forward(self, hidden, *args, **kwargs):
            second.side = hidden.sum(-1, keepdim=True)
            return super().forward(hidden, *args, **kwargs)

    class Reading(type(second)):
        def forward(self, hidden, *args, **kwargs):
            return taken(self, hidden + vars(self).pop("side"), *args, **kwargs)

    first.__class__, second.__class__ = Remembering, Reading
    assert "does not run without" in refused(model, examples(4))


def test_too_much_is_not_kept(monkeypatch):
    monkeypatch.setattr("lorakit.speed.frozen_prefix.MAX_BYTES", 100)
    assert "1e-07 are allowed" in refused(upper("llama"), examples(4))
