"""`W + L R` multiplies like the sum that it stands for, and is not made."""

import pytest
import torch
from torch.nn import functional as F

from lorakit.layers.low_rank_sum import LowRankSum

OFFSETS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
TOKENS = torch.tensor([2, 0, 3, 3, 1, 0, 2, 1, 0, 3])

PRODUCTS = {  # what code does with a stack (4, 16, 24) of matrices
    "linear": lambda x, W: F.linear(x, W[1].mT),
    "linear of a bias": lambda x, W: F.linear(x, W[torch.tensor(2)].T, torch.arange(24.0)),
    "matmul": lambda x, W: x @ W[2],
    "from the left": lambda x, W: W[3].transpose(-2, -1) @ x.mT,
    "batched": lambda x, W: torch.bmm(x.expand(4, 10, 16), W),
    "one for each token": lambda x, W: torch.bmm(x[:, None], W[TOKENS]),
    "grouped": lambda x, W: F.grouped_mm(x, W, offs=OFFSETS),
    "grouped and turned": lambda x, W: F.grouped_mm(x, W.transpose(1, 2).mT, offs=OFFSETS),
    "some experts": lambda x, W: torch.matmul(x, W[1:3]),
}
OTHERS = {
    "einsum": lambda x, W: torch.einsum("bi,eio->beo", x, W),
    "elementwise": lambda x, W: 2 * W + x.sum(),
    "a mask": lambda x, W: x @ W[torch.tensor([True, False, True, False])],
    "rows": lambda x, W: W[0][3] + W[1, 2],
    "turned otherwise": lambda x, W: W.transpose(0, 1) * x[0, :, None, None],
}


def operands(dtype=torch.float32, rank=3):
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 16), (4, 16, 24), (4, 16, rank), (4, rank, 24)]
    x, W, L, R = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(dtype).requires_grad_(), W.to(dtype), L.requires_grad_(), R.requires_grad_()


@pytest.mark.parametrize("case", [*PRODUCTS, *OTHERS])
def test_values_and_gradients_are_those_of_the_sum(case):
    found = []
    for make in (LowRankSum.make, lambda W, L, R: W + L @ R):
        x, W, L, R = operands()
        y = (PRODUCTS | OTHERS)[case](x, make(W, L, R))
        assert type(y) is torch.Tensor
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in (x, L, R) if p.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", PRODUCTS)
def test_known_products_do_not_make_the_sum(case):
    x, W, L, R = operands()
    weight = LowRankSum.make(W, L, R)
    weight.value = lambda: pytest.fail("the sum was made")
    PRODUCTS[case](x, weight)


def test_a_narrow_weight_swallows_no_small_update():
    x, W, L, R = operands(torch.bfloat16)
    small = 1e-4 * L.detach()
    update = x[:1].float() @ (small[2] @ R[2])
    kept = (x[:1] @ LowRankSum.make(torch.zeros_like(W), small, R)[2]).float()
    torch.testing.assert_close(kept, update, rtol=0.05, atol=1e-5)
    assert (LowRankSum.make(W, small, R).value() == W).float().mean() > 0.8  # which the rounded sum would


def test_its_description_is_the_weights():
    W, L, R = operands(torch.bfloat16)[1:]
    weight = LowRankSum.make(W, L, R)
    assert (weight.shape, weight.dtype, weight.ndim, len(weight)) == (W.shape, W.dtype, 3, 4)
    assert weight.data_ptr() == W.data_ptr()
