"""What cannot be meant is refused at every door, in one line, before anything is done."""

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.architectures import adapted, build
from helpers.texts import TOKENIZER, examples

from lorakit import (
    DoRALinear,
    Example,
    LoRAConfig,
    NF4Linear,
    Recipe,
    Spec,
    adapters,
    budget,
    dequantize_model,
    exact_match,
    fit,
    fit_many,
    folded,
    greedy,
    inject,
    loraplus_groups,
    merge,
    olora_start,
    pissa_start,
    quantize_model,
)
from lorakit.training.evaluate import kl_divergence, log_probabilities

TEXTS, LONG, STRANGE = examples(4), [Example([3] * 33, [3] * 33)], [Example([3, 61], [3, 61])]
NAN, INF, QUIET = math.nan, math.inf, {"show": False}


@Sequence.register
class Stream:
    """Examples that come one after the other, and cannot be read by number."""

    def __iter__(self):
        return iter(TEXTS)


def with_nan():
    model = adapted("llama")
    next(iter(adapters(model).values())).A.data[0, 0] = NAN
    return model


def rotten(model):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = NAN
    return model


def many(lr=1e-3, seed=0, texts=TEXTS):
    return fit_many(build("llama"), texts, [Spec(LoRAConfig(2, 4), lr, seed)], steps=1, show=False)


BAD = {
    "inject rank True": lambda: inject(build("llama"), True, 4),
    "inject alpha nan": lambda: inject(build("llama"), 2, NAN),
    "inject alpha True": lambda: inject(build("llama"), 2, True),
    "inject a scale that fails": lambda: inject(build("llama"), 2, 4, scale_rule=lambda alpha, rank: 1 / 0),
    "inject DoRA over NaN": lambda: inject(rotten(build("llama")), 2, 4, layer=DoRALinear),
    "fit no steps": lambda: fit(adapted("llama"), TEXTS, **QUIET),
    "fit steps 0": lambda: fit(adapted("llama"), TEXTS, steps=0, **QUIET),
    "fit steps True": lambda: fit(adapted("llama"), TEXTS, steps=True, **QUIET),
    "fit an unknown number": lambda: fit(adapted("llama"), TEXTS, steps=1, epochs=1, **QUIET),
    "fit lr nan": lambda: fit(adapted("llama"), TEXTS, steps=1, lr=NAN, **QUIET),
    "fit lr inf": lambda: fit(adapted("llama"), TEXTS, steps=1, lr=INF, **QUIET),
    "fit lr True": lambda: fit(adapted("llama"), TEXTS, steps=1, lr=True, **QUIET),
    "fit ratio 0": lambda: fit(adapted("llama"), TEXTS, steps=1, loraplus_ratio=0.0, **QUIET),
    "fit too long": lambda: fit(adapted("llama"), LONG, steps=1, **QUIET),
    "fit unknown tokens": lambda: fit(adapted("llama"), STRANGE, steps=1, **QUIET),
    "fit a stream": lambda: fit(adapted("llama"), Stream(), steps=1, **QUIET),
    "fit no language model": lambda: fit(torch.nn.Sequential(torch.nn.Linear(2, 2)), TEXTS, steps=1, **QUIET),
    "fit_many lr nan": lambda: many(lr=NAN),
    "fit_many lr -1": lambda: many(lr=-1.0),
    "fit_many too long": lambda: many(texts=LONG),
    "Recipe warmup nan": lambda: Recipe(1, warmup=NAN),
    "Recipe weight_decay inf": lambda: Recipe(1, weight_decay=INF),
    "Recipe clip nan": lambda: Recipe(1, clip=NAN),
    "Recipe batch_size True": lambda: Recipe(1, True),
    "groups lr nan": lambda: loraplus_groups(adapted("llama"), NAN),
    "greedy an empty prompt": lambda: greedy(build("llama"), TOKENIZER, ["a", ""], **QUIET),
    "greedy an empty stop": lambda: greedy(build("llama"), TOKENIZER, ["a"], stop="", **QUIET),
    "greedy one text": lambda: greedy(build("llama"), TOKENIZER, "abc", **QUIET),
    "greedy too long": lambda: greedy(build("llama"), TOKENIZER, ["a" * 32], **QUIET),
    "greedy no tokens": lambda: greedy(build("llama"), TOKENIZER, ["a"], max_new_tokens=0, **QUIET),
    "greedy batches of -1": lambda: greedy(build("llama"), TOKENIZER, ["a"], batch_size=-1, **QUIET),
    "greedy no language model": lambda: greedy(torch.nn.Linear(2, 2), TOKENIZER, ["a"], **QUIET),
    "exact_match batches of 0": lambda: exact_match(build("llama"), TEXTS, batch_size=0, **QUIET),
    "exact_match too long": lambda: exact_match(build("llama"), LONG, **QUIET),
    "exact_match unknown tokens": lambda: exact_match(build("llama"), STRANGE, **QUIET),
    "log_probabilities none": lambda: log_probabilities(build("llama"), []),
    "merge NaN": lambda: merge(with_nan()),
    "folded NaN": lambda: folded(with_nan()).__enter__(),
    "quantize NaN": lambda: quantize_model(rotten(build("llama"))),
    "quantize blocks of 3": lambda: quantize_model(build("llama"), block_size=3),
    "quantize no such setting": lambda: quantize_model(build("llama"), bits=3),
    "quantize without values": lambda: quantize_model(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))),
    "NF4 a codebook of NaN": lambda: NF4Linear(torch.nn.Linear(4, 4), codebook=(NAN, 1.0)),
    "dequantize to int8": lambda: dequantize_model(quantize_model(build("llama")), torch.int8),
    "budget rank True": lambda: budget(build("llama").config, rank=True),
    "budget tokens 0": lambda: budget(build("llama").config, tokens=0),
    "pissa rank 9": lambda: pissa_start(torch.randn(4, 4), 9, 1.0),
    "pissa scale 0": lambda: pissa_start(torch.randn(4, 4), 2, 0.0),
    "pissa NaN": lambda: pissa_start(torch.full((4, 4), NAN), 2, 1.0),
    "olora rank 0": lambda: olora_start(torch.randn(4, 4), 0, 1.0),
    "an example with a strange label": lambda: Example([3, 4], [3, -5]),
    "an example with an id of -100": lambda: Example([-100, 4], [3, 4]),
    "an example of truth values": lambda: Example([True, True], [True, True]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_in_one_line(case):
    with pytest.raises(ValueError, match=r"\Aexpected[^\n]*\Z"):
        BAD[case]()


def test_an_answer_ends_where_the_context_does():
    model = build("gpt2")  # it has 32 positions, and no more
    assert len(greedy(model, TOKENIZER, ["a" * 30], max_new_tokens=48, show=False)) == 1


def test_tokens_that_cannot_come_add_nothing_to_a_divergence():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert kl_divergence(p, torch.tensor([[0.25, 0.5, 0.25]]).log()) == pytest.approx(0.5 * math.log(2))
