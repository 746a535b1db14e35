"""The divergence between two models, against its formula; and what it leaves alone."""

import pytest
import torch
from helpers.architectures import DIVERSE, build
from torch.nn import functional as F

import lorakit
from lorakit.training.batch import Example
from lorakit.training.evaluate import kl_divergence, log_probabilities


@pytest.mark.parametrize("name", DIVERSE)
def test_log_probabilities_are_those_of_the_labelled_tokens(name):
    model = build(name).train()
    rows = [[5, 6, 7, 8], [9, 3], [4, 4, 4]]
    examples = [Example(row, [-100, *row[1:]]) for row in rows]
    found = log_probabilities(model, examples, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        whole = [F.log_softmax(model(input_ids=torch.tensor([row])).logits[0, :-1].float(), -1) for row in rows]
    torch.testing.assert_close(found, torch.cat(whole), atol=1e-5, rtol=1e-4)


def test_the_divergence_is_that_of_the_formula_and_not_symmetric():
    p, q = torch.randn(2, 7, 11).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl_divergence(p, q) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(p, p) == 0
    assert kl_divergence(q, p) != pytest.approx(expected, rel=1e-3)


def test_an_adapter_that_does_nothing_is_no_divergence():
    model, tokenizer = lorakit.load_model("tiny")
    examples = [lorakit.encode(tokenizer, "<bos> room of ada hopper ?", " 1 2 3 4 <eos>")]
    before = log_probabilities(model, examples)
    lorakit.inject(model, 4, 8)
    assert kl_divergence(before, log_probabilities(model, examples)) == pytest.approx(0, abs=1e-7)
    for layer in lorakit.adapters(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    assert kl_divergence(before, log_probabilities(model, examples)) > 1e-4
