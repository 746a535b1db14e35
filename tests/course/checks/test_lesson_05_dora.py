"""The checks of lesson 05, DoRA and friends: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import SOLVED, assert_refused, changed, each_mistake


def allocated(rule):
    return lambda importance, budget: {k: rule(v, budget, len(importance)) for k, v in importance.items()}


def unshared(W, rank, s, left, right):
    """A PiSSA whose factors get these powers of the singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = U[:, :rank] * S[:rank] ** left / s, S[:rank, None] ** right * Vh[:rank]
    return A, B, W - s * B @ A


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_dora": [
        (lambda W, A, B, s, m: W, "expected `return weight, start`"),
        (lambda W, A, B, s, m: (W.add_(s * B @ A), m), "an argument was changed in place"),
        (lambda W, A, B, s, m: SOLVED["check_dora"](W, A, 0 * B, s, m), "is W alone, with new lengths"),
    ],
    "check_equivalent": [
        (lambda alpha, rank, new: (new**0.5, alpha), "is that of new_rank"),
        (lambda alpha, rank, new: (rank**0.5, 3 * alpha), "new_alpha should be 48, got 72"),
    ],
    "check_pissa": [
        (lambda W, rank, s: unshared(W, rank, s, 1.0, 0.0), "do not share the singular values"),
        (lambda W, rank, s: unshared(W, rank, s, 0.0, 1.0), "do not share the singular values"),
        (lambda W, rank, s: (lambda A, B, R: (B, A, R))(*SOLVED["check_pissa"](W, rank, s)), "mixed up"),
        (changed("check_pissa", 2, lambda residual: None), "residual should be a tensor"),
        (changed("check_pissa", 2, lambda residual: residual[:2]), "residual should have shape"),
        (lambda W, rank, s: SOLVED["check_pissa"](W, rank, s)[:2], "expected `return A, B, residual`"),
        (lambda W, rank, s: (*SOLVED["check_pissa"](W, rank, s)[:2], W), "is W: take s B A off"),
    ],
    "check_allocate": [
        (allocated(lambda x, n, k: x.argsort(descending=True).argsort() < n // k), "every layer keeps as many"),
        (lambda d, n: SOLVED["check_allocate"]({k: -v for k, v in d.items()}, n), "the least important are kept"),
        (lambda d, n: {k: v >= torch.cat(list(d.values())).topk(n).values[-1] for k, v in d.items()}, "a threshold"),
        (lambda d, n: {k: v > torch.cat(list(d.values())).topk(n).values[-1] for k, v in d.items()}, "the budget is"),
        (lambda d, n: {k: int(v.sum()) for k, v in SOLVED["check_allocate"](d, n).items()}, "entries, True or False"),
        (lambda d, n: (d.clear(), {})[1], "an argument was changed in place"),
        (lambda d, n: {"q_proj": SOLVED["check_allocate"](d, n)["q_proj"]}, "a dict with a mask for each layer"),
        (allocated(lambda x, n, k: x == x), "everything is kept"),
        (lambda d, n: torch.cat(list(SOLVED["check_allocate"](d, n).values())), "a dict with a mask for each layer"),
        (lambda d, n: d, "entries, True or False"),
        (allocated(lambda x, n, k: torch.arange(len(x)) < n), "is for all layers together"),
        (lambda d, n: {k: v.flip(0) for k, v in SOLVED["check_allocate"](d, n).items()}, "more important directions"),
        (lambda d, n: dict(reversed(SOLVED["check_allocate"](d, n).items())), "in another order"),
    ],
    "check_tradeoff": [
        (changed("check_tradeoff", 0, lambda names: names[:-1]), "candidates are wrong about"),
        (changed("check_tradeoff", 0, lambda names: names * 2), "is named twice"),
        (lambda arms: (3, {}), "a list of the arms' names"),
        (changed("check_tradeoff", 1, lambda verdicts: {}), "one entry for each arm but the first"),
        (changed("check_tradeoff", 1, lambda verdicts: dict.fromkeys(verdicts, "equal")), "of QLoRA, got 'equal'"),
        (
            lambda arms: SOLVED["check_tradeoff"](
                [a | {"accuracy": [max(a["accuracy"]) + x for x in (-1e-9, 0, 1e-9)]} for a in arms]
            ),
            "best seed",
        ),
    ],
}


@each_mistake("05_dora", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
