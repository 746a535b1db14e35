"""An exercise with a right answer: inputs, what is right for each, and what each known mistake makes of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lorakit.course.checks.grading import CheckFailed, ask, judge, parts


@dataclass(frozen=True)
class Case:
    """One input of an exercise, with the right answer and wrong ones.

    Args:
        on: the input in words, with which every message begins.
        inputs: the arguments of the reader's function.
        right: what it should return.
        wrong: hint -> what somebody returns here who makes this mistake; left out, or right, where it does no harm.
    """

    on: str
    inputs: tuple
    right: Any
    wrong: dict[str, Any]


class Exercise:
    """The check of a function whose answers are known: it prints "right", or says on which input it is wrong, and why.

    Every mistake is written once, in `Case.wrong`: a check recognises it there, and a test answers with it.

    Args:
        cases: makes the cases; its docstring becomes the check's.
        right: the line that is printed in the end.
        values: the name of the answer, or of its parts as the reader returns them ("A, B"); or a function of an answer
            and its case that yields what is to be compared, as (name, tensor), and may `require` more in between.
    """

    def __init__(self, cases: Callable[..., Iterator[Case]], right: str, values: str | Callable = "the answer"):
        self.cases, self.right = cases, right
        self.values = _named(values) if isinstance(values, str) else values
        self.__module__, self.__name__, self.__doc__ = cases.__module__, cases.__name__, cases.__doc__

    def __call__(self, function: Any) -> None:
        for case in self.cases():
            self.ask(function, case)
        print(self.right)

    def ask(self, function: Any, case: Case) -> None:
        """Asks for one answer, and judges it."""
        self.judge(ask(function, *case.inputs, on=case.on), case)

    def judge(self, got: Any, case: Case) -> None:
        """Compares an answer with the right one, value by value; a wrong value gets the hint of its mistake."""
        want = self._known(case.right, case)
        wrong = {hint: self._known(answer, case) for hint, answer in case.wrong.items()}
        for name, value in self.values(got, case):
            judge(value, want[name], {hint: known.get(name) for hint, known in wrong.items()}, case.on, name)

    def _known(self, answer: Any, case: Case) -> dict[str, Any]:
        """The values of an answer of ours, as far as it gets."""
        known: dict[str, Any] = {}
        with suppress(CheckFailed):
            for name, value in self.values(answer, case):
                known[name] = value
        return known


def exercise(
    right: str, values: str | Callable = "the answer", kind: type[Exercise] = Exercise
) -> Callable[[Callable], Exercise]:
    """Makes a check (an `Exercise`, or another kind of it) of a function that yields cases; arguments as there."""
    return lambda cases: kind(cases, right, values)


def in_parts(*given: tuple[Any, dict[str, Any]]) -> tuple[tuple, dict[str, tuple]]:
    """Returns `right` and `wrong` of an answer of several parts, each given as (right part, hint -> wrong part)."""
    hints = dict.fromkeys(hint for _, wrong in given for hint in wrong)
    return tuple(want for want, _ in given), {
        hint: tuple(wrong.get(hint, want) for want, wrong in given) for hint in hints
    }


def _named(names: str) -> Callable[[Any, Case], Iterable[tuple[str, Any]]]:
    def values(got: Any, case: Case) -> Iterable[tuple[str, Any]]:
        split = parts(got, names, case.on) if ", " in names else (got,)
        return zip(names.split(", "), split, strict=True)

    return values
