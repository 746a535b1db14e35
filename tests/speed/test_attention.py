"""Short attention is torch's, in value and gradient, whatever the heads, masks and dtypes, and only where it may be."""

import pytest
import torch
from torch.nn import functional as F

from lorakit.layers import shortcuts
from lorakit.speed.attention import _ShortAttention, attention, short_attention


def tensors(heads, groups, seq, keys, dtype=torch.float32, d_v=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, seq, 8), (batch, groups, keys, 8), (batch, groups, keys, d_v)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def answers(function, inputs):
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.fixture
def calls(monkeypatch):
    seen = []
    real = short_attention
    monkeypatch.setattr("lorakit.speed.attention.short_attention", lambda *args: seen.append(args) or real(*args))
    return seen


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("how", ["open", "causal", "mask", "one query", "scale"])
def test_it_is_torchs(calls, dtype, tolerance, heads, groups, how):
    seq, keys = (1, 7) if how == "one query" else (7, 7)
    inputs = tensors(heads, groups, seq, keys, dtype, d_v=5)
    options = {"enable_gqa": True, "is_causal": how == "causal", "scale": 0.3 if how == "scale" else None}
    if how == "mask":
        options["attn_mask"] = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
        options["attn_mask"][0, :, 5:, :3] = False
    theirs = answers(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), inputs)
    with _ShortAttention():
        ours = answers(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), inputs)
    assert len(calls) == 1
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize(
    "how", ["float mask", "dropout", "hidden rows", "causal, more keys", "three dimensions", "vmap"]
)
def test_the_rest_is_left_to_torch(calls, how):
    inputs, options = tensors(2, 2, 5, 9 if "more" in how else 5), {"is_causal": "causal" in how}
    if how == "float mask":
        options["attn_mask"] = torch.randn(5, 5)
    if how == "hidden rows":
        options["attn_mask"] = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        options["attn_mask"][1, :, :2] = False
    if how == "dropout":
        options["dropout_p"] = 0.5
    if how == "three dimensions":
        inputs = [x.detach()[0].requires_grad_() for x in inputs]

    def function(*qkv):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(*qkv, **options)

    if how == "vmap":
        function = torch.vmap(function, randomness="same")
        inputs = [x.detach()[None].requires_grad_() for x in inputs]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = answers(function, inputs)
    with _ShortAttention():
        ours = answers(function, inputs)
    assert not calls
    assert_same(ours, theirs, 1e-6)


def test_nothing_of_seq_by_seq_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        short_attention(*tensors(4, 2, 40, 40))
    assert kept
    assert all(shape[-1] < 40 for shape in kept)


@pytest.mark.parametrize(
    ("tokens", "dtype", "short"), [(40, torch.bfloat16, True), (400, torch.bfloat16, False), (40, torch.float32, False)]
)
def test_it_is_taken_only_where_it_pays(calls, tokens, dtype, short):
    inputs = tensors(2, 2, tokens, tokens, dtype)
    with attention(torch.nn.Linear(2, 2, dtype=dtype)) as decision:
        ours = F.scaled_dot_product_attention(*inputs)
        with shortcuts.forbidden():
            theirs = F.scaled_dot_product_attention(*inputs)
    F.scaled_dot_product_attention(*inputs)
    assert len(calls) == short
    assert decision.used == (dtype == torch.bfloat16)
    assert_same([ours], [theirs], 2e-2)
