"""torch's default dtype changes nothing: every tensor that lorakit makes says its own."""

import ast
from pathlib import Path

import pytest
import torch
from helpers.architectures import build
from helpers.texts import TOKENIZER, examples
from torch import nn

from lorakit import DoRALinear, LoRALinear, NF4Linear, adapters, fit, greedy, inject, quantize_model
from lorakit.course.checks.grading import random_matrix
from lorakit.layers import nf4
from lorakit.layers.subspace import RandomSubspace
from lorakit.merging.arithmetic import dare
from lorakit.merging.updates import Update
from lorakit.tasks.tiny_model import make_model

PACKAGE = Path(__file__).resolve().parents[2] / "lorakit"
MAKERS = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "eye", "rand", "randn"}


def tensors_without_dtype(source: str) -> list[int]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [c for c in calls if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "torch"]
    silent = [c for c in made if c.func.attr in MAKERS and not any(key.arg == "dtype" for key in c.keywords)]
    return [call.lineno for call in silent]


def test_every_tensor_that_is_made_says_its_dtype():
    found = {path: tensors_without_dtype(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(PACKAGE)): lines for path, lines in found.items() if lines}
    assert tensors_without_dtype("x = torch.zeros(3)\ny = torch.ones(2, dtype=d)\nz = torch.linspace(0, 1, 3)") == [
        1,
        3,
    ]


def quantised(linear, model):
    layer = NF4Linear(linear)
    return [
        layer.codes,
        layer.absmax_codes,
        layer.frozen_weight(torch.float32),
        nf4.nf4_codebook(),
        nf4.byte_codebook(),
    ]


def adapted(linear, model):
    layers = [each(linear, 2, 4) for each in (LoRALinear, DoRALinear)]
    return [p for layer in layers for p in layer.parameters()]


def trained(linear, model):
    inject(quantize_model(model), 2, 4)
    loss = fit(model, examples(), steps=3, batch_size=4, lr=1e-2, show=False).loss
    answers = greedy(model, TOKENIZER, ["abc", "de"], max_new_tokens=4, show=False)
    return [loss, answers, *[layer.B for layer in adapters(model).values()]]


def drawn(linear, model):
    update = {"0": Update(random_matrix(6, 2, seed=1), random_matrix(2, 6, seed=2))}
    space = RandomSubspace(nn.Sequential(linear), 5)
    return [dare([update], [1.0], 0.5, 2)["0"].matrix, space.z, space.lengths]


def made_small(linear, model):
    return list(make_model().parameters())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("results", [quantised, adapted, trained, drawn, made_small], ids=lambda f: f.__name__)
def test_results_are_the_same_under_any_default(results, default):
    def under(dtype):
        nf4._pairs.cache_clear()
        nf4._bytes.cache_clear()
        torch.manual_seed(0)
        linear, model = nn.Linear(128, 64), build("llama")
        torch.set_default_dtype(dtype)
        try:
            return results(linear, model)
        finally:
            torch.set_default_dtype(torch.float32)

    for usual, other in zip(under(torch.float32), under(default), strict=True):
        if isinstance(usual, torch.Tensor):
            assert other.dtype == usual.dtype
            assert torch.equal(usual, other)
        else:
            assert usual == other
