"""The checks of lesson 08, forgetting: what they say to answers that they do not know themselves."""

import numpy as np
import torch
from helpers.exercises import SOLVED, assert_refused, each_mistake

MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_at_equal_success": [
        (lambda new, old, share: float(np.interp(share, new, old)), "the loss"),
        (lambda new, old, share: 2 * SOLVED["check_at_equal_success"](new, old, share), "the loss should be"),
        (lambda new, old, share: old[-1], "is the one at the end"),
    ],
    "check_intruders": [
        (lambda W, D, k, e: SOLVED["check_intruders"](W, D, k, e) + 20, "the count should be"),
        (lambda W, D, k, e: SOLVED["check_intruders"](D, W, k, e), "the count"),
    ],
    "check_step_flops": [
        (lambda *sizes: SOLVED["check_step_flops"](*sizes)[::-1], "full should be"),
        (lambda *sizes: SOLVED["check_step_flops"](*sizes)[0], "expected `return full, lora`"),
    ],
    "check_rate_ratio": [
        (lambda *arms: (SOLVED["check_rate_ratio"](*arms)[0], True), "inside"),
        (lambda *arms: SOLVED["check_rate_ratio"](*arms[::-1]), "is full fine-tuning's over LoRA's"),
        (lambda *arms: torch.tensor(SOLVED["check_rate_ratio"](*arms)[0]), "expected `return ratio, inside`"),
    ],
}


@each_mistake("08_forgetting", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)
