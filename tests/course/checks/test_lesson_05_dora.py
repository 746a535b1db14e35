"""The checks of lesson 05, DoRA and friends: what they say to answers that they do not know themselves."""

import torch
from helpers.exercises import SOLVED, assert_refused, changed, each_mistake


def allocated(rule):
    return lambda importance, budget: {k: rule(v, budget, len(importance)) for k, v in importance.items()}


def best_seed(arms):
    return [arm | {"accuracy": dict.fromkeys(arm["accuracy"], max(arm["accuracy"].values()))} for arm in arms]


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_turned": [
        (lambda W, A, B, s, m: W.norm(), "expected `return turn, lora, dora`"),
        (lambda W, A, B, s, m: (W.add_(s * B @ A), m, m), "an argument was changed in place"),
        (lambda W, A, B, s, m: SOLVED["check_turned"](W, A, B, 1.0, m), "turn has no s"),
        (lambda W, A, B, s, m: SOLVED["check_turned"](W, A, B, s, W.norm(dim=1)), "dora is 0"),
    ],
    "check_equivalent": [
        (lambda alpha, rank, new: (new**0.5, alpha), "is that of new_rank"),
        (lambda alpha, rank, new: (rank**0.5, 3 * alpha), "new_alpha should be 48, got 72"),
    ],
    "check_portable": [
        (lambda W, A, B, s: (A, B), "A_file should have shape"),
        (lambda W, A, B, s: SOLVED["check_portable"](W, A, B, s)[::-1], "A_file should have shape"),
        (lambda W, A, B, s: (torch.cat([A, A]), torch.cat([B, B * 0], 1)), "is what trains alone"),
        (changed("check_portable", 1, lambda B: None), "B_file should be a tensor"),
        (lambda W, A, B, s: SOLVED["check_portable"](W, A, B, s)[:1], "expected `return A_file, B_file`"),
        (lambda W, A, B, s: SOLVED["check_portable"](W.mul_(2), A, B, s), "an argument was changed in place"),
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
        (changed("check_tradeoff", 1, lambda verdicts: dict.fromkeys(verdicts, "equal")), "of lucky, got 'equal'"),
        (lambda arms: (SOLVED["check_tradeoff"](best_seed(arms))[0], SOLVED["check_tradeoff"](arms)[1]), "best seed"),
    ],
}


@each_mistake("05_dora", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
