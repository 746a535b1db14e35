"""Every check takes its solution, refuses the stub and odd answers, and knows each of its mistakes by its hint."""

import copy
import re

import numpy as np
import pytest
import torch
from helpers.exercises import EACH_CHECK, SOLVED, STUBS
from torch import nn

from lorakit.course import checks
from lorakit.course.checks import CheckFailed, grading
from lorakit.course.checks.exercise import Case, Exercise, exercise

LESSONS = [vars(module) for name, module in vars(checks).items() if name.startswith("lesson_")]
EXERCISES = {name: each for names in LESSONS for name, each in names.items() if isinstance(each, Exercise)}
CASES = {name: list(check.cases()) for name, check in EXERCISES.items()}
EACH_HINT = [(name, hint) for name, cases in CASES.items() for hint in dict.fromkeys(h for c in cases for h in c.wrong)]
each_check = pytest.mark.parametrize("check", EACH_CHECK)


def complaints(check, cases, hint):
    """What a check says to somebody who makes this mistake, input by input; nothing where it does no harm."""
    for case in cases:
        answer = copy.deepcopy(case.wrong.get(hint, case.right))
        try:
            check.ask(lambda *_, answer=answer: answer, case)
        except CheckFailed as failed:
            yield str(failed)


@pytest.mark.parametrize(("check", "hint"), EACH_HINT, ids=[f"{name}: {hint}" for name, hint in EACH_HINT])
def test_a_mistake_is_refused_with_its_hint(check, hint):
    assert any(said.endswith(f" {hint}") for said in complaints(EXERCISES[check], CASES[check], hint))


@pytest.mark.parametrize("check", EXERCISES)
def test_right_answers_are_right(check, capsys):
    answers = iter([copy.deepcopy(case.right) for case in CASES[check]])
    EXERCISES[check](lambda *_: next(answers))
    assert capsys.readouterr().out == f"{EXERCISES[check].right}\n"


def test_a_mistake_that_does_no_harm_is_found():
    @exercise("right", "the sum")
    def check():
        for a, b in [(1, 1), (2, 2)]:
            yield Case(f"{a} and {b}", (a, b), a + b, {"is the double": 2 * a, "is the product": a * b, "is off": 0})

    said = {hint: list(complaints(check, list(check.cases()), hint)) for hint in ("is the double", "is the product")}
    assert said == {"is the double": [], "is the product": ["1 and 1: the sum is the product"]}


def test_every_check_has_its_exercise():
    assert sorted(SOLVED) == sorted(STUBS) == EACH_CHECK
    assert len(EXERCISES) > len(EACH_CHECK) / 2


@each_check
def test_a_solution_is_right(check, capsys):
    state = torch.random.get_rng_state()
    getattr(checks, check)(SOLVED[check])
    assert re.fullmatch(r"right: .+\n", capsys.readouterr().out), "one line"
    assert torch.equal(torch.random.get_rng_state(), state), "a check leaves the random state as it was"
    assert getattr(checks, check).__doc__.startswith("Checks ")


@each_check
def test_a_stub_is_not(check, capsys):
    hint = "both gradients are zero for ever" if check == "check_layer" else "not written yet: your turn"
    with pytest.raises(CheckFailed, match=hint):
        getattr(checks, check)(STUBS[check])
    assert capsys.readouterr().out == ""


ODD_ANSWERS = {
    "nothing": None,
    "an ellipsis": ...,
    "a word": "word",
    "a number": 3,
    "not a number": float("nan"),
    "a scalar tensor": torch.tensor(2.0),
    "an empty tensor": torch.empty(0),
    "a tensor of three dimensions": torch.ones(2, 2, 2),
    "a pair": (torch.ones(3, 3), "b"),
    "a triple": (torch.ones(3, 3), None, 1.0),
    "zeros": (torch.zeros(2), torch.zeros(2, 2)),
    "a layer": nn.Linear(3, 3),
    "a class": dict,
}


@each_check
@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=list(ODD_ANSWERS))
def test_odd_answers_get_a_message_and_never_an_error(check, answer):
    with pytest.raises(CheckFailed) as caught:
        getattr(checks, check)(lambda *inputs: copy.deepcopy(answer))
    assert len(str(caught.value)) > 30


@each_check
def test_what_is_no_function_is_said_to_be_none(check):
    with pytest.raises(CheckFailed, match=r"expected a function, got int: pass its name, without calling it"):
        getattr(checks, check)(3)


@each_check
def test_an_exception_is_reported_with_the_line_it_came_from(check):
    def answer(*inputs):
        numbers = [1]
        return numbers[7]

    with pytest.raises(CheckFailed, match=r"your code raised IndexError: .*\n    in your line `return numbers\[7\]`"):
        getattr(checks, check)(answer)


def test_numbers_and_matrices_are_taken_in_any_form():
    checks.check_rank_for_energy(lambda *inputs: np.int64(SOLVED["check_rank_for_energy"](*inputs)))
    checks.check_swap(lambda *inputs: SOLVED["check_swap"](*inputs).double().numpy())
    checks.check_balance(lambda B, A: SOLVED["check_balance"](B.requires_grad_(), A))


def test_a_wrong_answer_without_a_known_reason_is_described():
    want = grading.random_matrix(3, 3, seed=0)
    for got, right, words in [
        (-2 * want, want, "is off by exactly the factor -2"),
        (want.T, want, "is the transpose of the right one"),
        (want / 0, want, "is not finite"),
        (want + 0.1 * want.norm() * torch.eye(3) / 3**0.5, want, "is off by 10.0% of its norm"),
        (want[:2], want, "should have shape (3, 3), got (2, 3)"),
        (288, 287, "should be 287, got 288"),
        ({"a", "b"}, {"a", "c"}, "are wrong about b, c"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "should say 3 of b, got 2"),
    ]:
        with pytest.raises(CheckFailed, match=re.escape(f"small input: it {words}")):
            grading.judge(got, right, {}, "small input", "it")


def test_an_argument_that_is_changed_in_place_is_noticed():
    for inputs, change in [
        ((torch.ones(2),), lambda x: x.mul_(2)),
        ((nn.Linear(2, 2),), lambda layer: layer.weight.data.mul_(2)),
        (({"a": [torch.ones(2)]},), lambda given: given["a"][0].mul_(2)),
        (({"a": 1},), lambda given: given.popitem()),
    ]:
        with pytest.raises(CheckFailed, match="small input: an argument was changed in place"):
            grading.ask(lambda given, change=change: change(given) is None or 1, *inputs, on="small input")


def test_jupyter_shows_the_message_without_a_traceback():
    assert CheckFailed("off by one")._render_traceback_() == ["CheckFailed: off by one"]


# ---- your turn, inside a lesson ----


def stub(*inputs):
    raise NotImplementedError("your turn")


def no_return(*inputs):
    pass


def raises(*inputs):
    return [1][7]


def leaves(*inputs):
    raise SystemExit("enough")


class Unkind:
    """An answer that no check foresees: even its comparison fails."""

    def __eq__(self, other):
        raise ArithmeticError("no")

    __hash__ = None

    def __getattr__(self, name):
        raise ArithmeticError("no")


LESSON_GOES_ON = {
    "a stub": (stub, "Nothing is written yet."),
    "no return": (no_return, "Not right yet. .*: the answer is None: is there a `return` at the end?"),
    "an exception": (raises, r"(?s)Not right yet. .*your code raised IndexError.*in your line `return \[1\]\[7\]`"),
    "an exit": (leaves, "Not right yet. It ended in SystemExit: enough"),
    "no function": (3, "Not right yet. expected a function, got int"),
    "a word": (lambda *inputs: "word", "Not right yet. "),
    "an object": (lambda *inputs: Unkind(), "Not right yet. "),
}


@pytest.mark.parametrize(("answer", "said"), LESSON_GOES_ON.values(), ids=list(LESSON_GOES_ON))
def test_a_lesson_goes_on_whatever_the_reader_wrote(answer, said, capsys):
    checks.your_turn(checks.check_swap, answer)
    assert re.match(said, capsys.readouterr().out)


@each_check
def test_a_lesson_says_whether_the_answer_is_right(check, capsys):
    checks.your_turn(getattr(checks, check), SOLVED[check])
    checks.your_turn(getattr(checks, check), lambda *inputs: Unkind())
    assert re.fullmatch(r"(?s)right: [^\n]+\nNot right yet\. .+", capsys.readouterr().out)
