"""The checks of lesson 02, LoRA by hand: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import SOLVED, assert_refused, each_mistake
from torch import nn


def wrong_layer(
    frozen=True, draw=torch.randn, wide_a=1.0, wide_b=0.0, scale=None, before="x", on_output=False, cut=False
):
    """A class that check_layer refuses, for one reason."""

    class Wrong(nn.Module):
        def __init__(self, base, rank, alpha, dropout):
            super().__init__()
            self.base = base if frozen is None else base.requires_grad_(not frozen)
            self.A = nn.Parameter(wide_a * draw(rank, base.in_features))
            self.B = nn.Parameter(wide_b * torch.randn(base.out_features, rank))
            self.scale = {None: alpha / rank, "one": 1.0, "alpha": alpha}[scale]
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            if before == "both":
                x = self.dropout(x)
            inner = (self.dropout(x) if before == "x" else x) @ self.A.T
            inner = self.dropout(inner) if before == "B" else inner
            update = self.scale * inner @ self.B.T
            update = update.detach() if cut else update
            return self.base(x) + (self.dropout(update) if on_output else update)

    return Wrong


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def in_place(base, A, B, alpha):
    base.weight.data += alpha / len(A) * B @ A
    return base


def grown(A, B, alpha, new_rank, rows=torch.randn, columns=torch.zeros, power=1.0):
    more = new_rank - len(A)
    A_new = torch.cat([A, rows(more, A.shape[1])])
    return A_new, torch.cat([B, columns(len(B), more)], dim=1), alpha * (new_rank / len(A)) ** power


def judged(**wrongly):
    """A judgement of the statements that is wrong about some of them."""

    def wrong(base, *adapter):
        right = SOLVED["check_wrong"](base, *adapter)
        said = {letter: holds(base, *adapter) for letter, holds in wrongly.items()}
        return (right | {letter for letter, yes in said.items() if not yes}) - {x for x, yes in said.items() if yes}

    return wrong


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_merge": [
        (lambda base, A, B, alpha: linear(base.weight + B @ A, base.bias), "did you forget the scale?"),
        (lambda base, A, B, alpha: linear(base.weight + alpha / len(A) * B @ A), "the base's bias is lost"),
        (lambda base, A, B, alpha: linear(base.weight + alpha / len(A) * B @ A, torch.zeros(len(B))), "use bias=False"),
        (lambda base, A, B, alpha: base.weight + alpha / len(A) * B @ A, "expected an nn.Linear, got Tensor"),
        (lambda base, A, B, alpha: base.weight + alpha / len(A) * A @ B, "your code raised RuntimeError: mat1"),
        (in_place, "an argument was changed in place"),
    ],
    "check_wrong": [
        (lambda base, A, B, alpha: {"a", "b", "c", "d", "e", "f"}, "r = 8, alpha = 8, start of A uniform: your set"),
        (judged(c=lambda base, A, B, alpha: False), "your set calls c wrong, but here alpha / r is 1"),
        (judged(d=lambda base, A, B, alpha: False), "start of A uniform: your set calls d wrong: compute A.std()"),
        (judged(e=lambda base, A, B, alpha: True), "your set calls e right: a uniform draw ends"),
        (judged(f=lambda base, A, B, alpha: True), "your set calls f right: without a bias"),
        (judged(a=lambda base, A, B, alpha: True, b=lambda *given: True), "your set are wrong about a, b"),
        (lambda *given: ["a", "b"], "expected a set of letters, got list"),
    ],
    "check_layer": [
        (wrong_layer(draw=torch.ones), "the rows of A hold 1 directions, not 2"),
        (wrong_layer(frozen=None), "base.bias, base.weight would train too"),
        (wrong_layer(frozen=False), "base.bias, base.weight would train too"),
        (wrong_layer(cut=True), "no gradient reaches both"),
        (wrong_layer(wide_a=0.0), "both gradients are zero for ever"),
        (wrong_layer(wide_b=1.0), "B must start at zero"),
        (wrong_layer(scale="one"), "off by exactly alpha / r"),
        (wrong_layer(scale="alpha"), "divide alpha by the rank"),
        (wrong_layer(before="both"), "dropout may only touch the adapter's input"),
        (wrong_layer(before="nowhere"), "dropout does nothing in training mode"),
        (wrong_layer(before="B"), "dropout is at the wrong place"),
        (wrong_layer(before="nowhere", on_output=True), "dropout is at the wrong place"),
        (lambda base, rank, alpha, dropout: base, "two nn.Parameter named A and B"),
    ],
    "check_swap": [
        (lambda W, old, new: W + new[2] / len(new[0]) * new[1] @ new[0], "still holds the old adapter"),
        (lambda W, old, new: W.T, "got (8, 5); is it transposed?"),
    ],
    "check_first_update": [
        (lambda grad_W, A, alpha, lr: -lr * alpha / len(A) * grad_W @ A.T @ A, "has s once"),
        (lambda grad_W, A, alpha, lr: -lr * (alpha / len(A)) ** 2 * A.T @ A @ grad_W, "your code raised RuntimeError"),
        (lambda grad_W, A, alpha, lr: -2 * lr * (alpha / len(A)) ** 2 * grad_W @ A.T @ A, "exactly the factor 2"),
    ],
    "check_grow": [
        (lambda *inputs: grown(*inputs, power=0.0), "alpha must grow as r does"),
        (lambda *inputs: grown(*inputs, power=0.5), "the square root is rsLoRA's rule"),
        (lambda *inputs: grown(*inputs, power=2.0), "is off by exactly the factor 2.5"),
        (lambda *inputs: grown(*inputs, rows=torch.zeros), "nothing will ever be learned"),
        (lambda *inputs: grown(*inputs, columns=torch.randn), "has grown by what was added"),
        (lambda *inputs: grown(*inputs, rows=lambda n, d: inputs[0][:1].expand(n, d)), "the new rows repeat the old"),
        (lambda A, B, alpha, r: (A, B, alpha), "A and B should have shapes (5, 9) and (7, 5)"),
        (lambda A, B, alpha, r: grown(A, B, alpha, r)[:2], "expected `return A, B, alpha`, got tuple of 2"),
    ],
}


@each_mistake("02_lora", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
