"""A model that would mix packed texts is found out, whenever it is asked."""

import pytest
import torch
from helpers.architectures import build

from lorakit.speed.packing import packable


class Leaky(torch.nn.Module):
    """A model in which every token sees all before it, whatever the positions say."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61)

    def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids).cumsum(1)
        return type("Output", (), {"logits": self.head(hidden)})()


class Strict(Leaky):
    """A model that takes no positions."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("make", "words"), [(Leaky, "does not keep packed texts apart"), (Strict, "takes no positions")]
)
def test_a_model_that_would_mix_texts_is_found_out(make, words):
    model = make().train()
    assert not packable(model).used
    assert words in packable(model).why
    assert model.training


def test_the_answer_is_about_the_model_as_it_is_now():
    model = build("llama")
    assert packable(model).used
    model.config._attn_implementation = "eager"
    kept = model.model.forward
    model.model.forward = lambda position_ids=None, **inputs: kept(**inputs)  # somebody drops the positions
    assert not packable(model).used
    del model.model.forward
    assert packable(model).used
