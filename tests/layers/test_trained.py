"""What trains beside LoRA, layer by layer: whole modules, rows of tokens, embeddings, and what is tied to them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit.layers.embedding import LoRAEmbedding
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.layers.tied import Tied
from lorakit.layers.token_rows import TrainedRows
from lorakit.layers.trained import TrainedModule

IDS = torch.tensor([[3, 0, 5], [6, 3, 1]])


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Strange(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


def moved(layer):
    """With parameters as after some training."""
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator).to(p.dtype)
    return layer


def embedding(kind=nn.Embedding, **settings):
    torch.manual_seed(0)
    return kind(7, 4, **settings)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("make", [lambda base: LoRAEmbedding(base, 2, 4), lambda base: TrainedRows(base, [5, 3])])
def test_a_changed_embedding_is_that_with_the_changed_table(kind, make):
    base = embedding(kind, padding_idx=3)
    assert torch.equal(make(base)(IDS), base(IDS))
    layer, whole = moved(make(base)), copy.deepcopy(base)
    whole.weight = nn.Parameter(layer.table().detach())
    torch.testing.assert_close(layer(IDS), whole(IDS))
    torch.testing.assert_close(layer.merged()(IDS), whole(IDS))
    assert torch.equal(layer.weight + 0, whole.weight)  # for code that computes with it
    layer(IDS).square().sum().backward(), whole(IDS).square().sum().backward()
    if isinstance(layer, TrainedRows):
        torch.testing.assert_close(layer.rows.grad, whole.weight.grad[[5, 3]])  # and nothing for padding
        assert not layer.rows.grad[1].any()
    else:
        torch.testing.assert_close(layer.A.grad, layer.scale * layer.B.T @ whole.weight.grad.T)
    assert layer.removed() is base
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (7, 4, 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_trained_rows_of_an_output_layer(bias, quantised):
    torch.manual_seed(0)
    base = nn.Linear(64, 7, bias=bias)
    base = NF4Linear(base) if quantised else base
    layer, x = moved(TrainedRows(base, [5, 3])), torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.table(), base.bias))
    if quantised:
        with pytest.raises(ValueError, match="floating-point base, got NF4Linear"):
            layer.merged()
    else:
        torch.testing.assert_close(layer.merged()(x), layer(x))
        torch.testing.assert_close(base.weight + layer.delta_weight(), layer.table())


@pytest.mark.parametrize(
    "make", [lambda b: LoRAEmbedding(b, 2, 4), lambda b: TrainedRows(b, [5, 3]), lambda b: TrainedModule(b)]
)
def test_a_tied_layer_answers_with_the_sources_table(make):
    base, head, other = embedding(), nn.Linear(4, 7), embedding(Scaled)
    head.weight = other.weight = base.weight
    source = moved(make(base))
    below, beside, x = Tied(head, source), Tied(other, source), torch.randn(2, 4)
    table = source.table().detach()
    torch.testing.assert_close(below(x), F.linear(x, table, head.bias))
    torch.testing.assert_close(beside(IDS), 3 * F.embedding(IDS, table))
    torch.testing.assert_close(below.merged()(x), below(x))
    torch.testing.assert_close(head.weight + below.delta_weight(), table)
    assert not [p for p in below.parameters() if p.requires_grad]
    twin = copy.deepcopy(nn.ModuleList([source, below]))
    assert twin[1].source is twin[0]


def test_a_module_trains_in_float32_beside_a_narrow_model():
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    layer, x = TrainedModule(base), torch.randn(2, 4, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.trained.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.parameters())
    assert layer(x).dtype == torch.bfloat16
    before = copy.deepcopy(base.state_dict())
    moved(layer)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=0.05, atol=0.05)
    assert {p.dtype for p in layer.merged().parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in layer.removed().state_dict().items())
    layer.trained[1].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merged()


REFUSED = {
    "a list": (lambda: TrainedModule(nn.ModuleList([nn.Linear(2, 2)])), "called, got a ModuleList"),
    "nothing to train": (lambda: TrainedModule(nn.ReLU()), "floating-point numbers, got ReLU"),
    "four bits": (lambda: TrainedModule(nn.Sequential(NF4Linear(nn.Linear(64, 2)))), "floating-point numbers"),
    "counters": (lambda: TrainedModule(nn.BatchNorm1d(2)), "floating-point numbers, got BatchNorm1d"),
    "LoRA on more than a table": (lambda: LoRAEmbedding(embedding(Strange), 2, 4), "Strange, which does more"),
    "rows of more than a table": (lambda: TrainedRows(embedding(Strange), [1]), "Strange, which does more"),
    "renormalised": (lambda: LoRAEmbedding(embedding(max_norm=1.0), 2, 4), "without max_norm"),
    "no rows": (lambda: TrainedRows(embedding(), []), "different token ids"),
    "a negative row": (lambda: TrainedRows(embedding(), [-1]), "from 0 to 6, got -1"),
    "rows of a norm": (lambda: TrainedRows(nn.LayerNorm(4), [1]), "linear-like"),
    "rank 0": (lambda: LoRAEmbedding(embedding(), 0, 4), "rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_so_is_refused_in_one_line(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=rf"\Aexpected[^\n]*{words}[^\n]*\Z"):
        make()
