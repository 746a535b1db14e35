"""What a reader's function answers: called safely, compared with what was expected, and told apart by its mistake."""

import copy
import linecache
import operator
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # relative; float32 rounding is far below, every mistake far above


class CheckFailed(AssertionError):
    """An answer is not right yet; the text says on which input, and what the likely mistake is."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback through the check: only the text is of use to the reader."""
        return [f"CheckFailed: {self}"]


class NotWritten(CheckFailed):
    """The stub is still there: its line that raises NotImplementedError was reached."""


def your_turn(check: Callable[[Any], None], answer: Any) -> None:
    """Prints what a check says to what a reader wrote inside a lesson; the lesson goes on, whatever that is.

    Args:
        check: one of the checks.
        answer: the reader's function or class; a stub that raises NotImplementedError is no fault.
    """
    try:
        check(answer)
    except NotWritten:
        print("Nothing is written yet. Write it and run both cells again, or go on: the lesson does not need it.")
    except CheckFailed as failed:
        print(f"Not right yet. {failed}")
    except (Exception, SystemExit) as error:  # the answer is something that the check did not foresee
        print(f"Not right yet. It ended in {type(error).__name__}: {error}")


def ask(function: Any, *inputs: Any, on: str, in_place: bool = False) -> Any:
    """Returns what `function` answers to copies of `inputs`; whatever goes wrong on the way becomes a CheckFailed.

    Args:
        function: what the reader handed over; anything may come.
        inputs: arguments; the function must leave them as they are.
        on: the input in words, with which every message begins.
        in_place: whether the function gets the arguments themselves, and may change them.

    Raises:
        CheckFailed: not a function, an exception inside it, no result, or an input was changed.
        NotWritten: it raises NotImplementedError.
    """
    if not callable(function):
        raise CheckFailed(f"expected a function, got {_kind(function)}: pass its name, without calling it")
    given = inputs if in_place else copy.deepcopy(inputs)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            answer = function(*given)
    except NotImplementedError as error:
        raise NotWritten(f"not written yet: {error or 'replace the line that raises NotImplementedError'}") from None
    except Exception as error:
        where = _place(error, getattr(function, "__module__", None))
        raise CheckFailed(f"{on}: your code raised {type(error).__name__}: {error}{where}") from error
    if answer is None or answer is ...:
        raise CheckFailed(f"{on}: the answer is {answer}: is there a `return` at the end?")
    if any(not _unchanged(before, after) for before, after in zip(inputs, given, strict=True)):
        raise CheckFailed(f"{on}: an argument was changed in place: work on a copy (`.clone()`, `copy.deepcopy`)")
    return answer


def judge(got: Any, want: Any, mistakes: dict[str, Any], on: str, what: str = "the answer") -> None:
    """Compares an answer with the right one, and a wrong answer with the answers of known mistakes.

    Args:
        got: the reader's tensor or number, or a set of names, or a dict.
        want: the right one; an int, a set and a dict are expected exactly.
        mistakes: hint -> what somebody gets who makes this mistake; None where it makes no difference.
        on: the input in words.
        what: which part of the answer this is.

    Raises:
        CheckFailed: with the hint of the mistake, or else with what distinguishes the two.
    """
    if isinstance(want, set | dict):
        equal = operator.eq
    else:
        equal = partial(same, tolerance=0.0 if isinstance(want, int) else TOLERANCE)
        got, want = as_tensor(got, on, what), _double(want)
        mistakes = {hint: _double(wrong) for hint, wrong in mistakes.items() if wrong is not None}
    if equal(got, want):
        return
    for hint, wrong in mistakes.items():
        if equal(got, wrong):
            raise CheckFailed(f"{on}: {what} {hint}")
    raise CheckFailed(f"{on}: {what} {_difference(got, want)}")


def as_tensor(got: Any, on: str, what: str) -> Tensor:
    """Returns a tensor, an array or a number of the reader's as a float64 tensor."""
    try:
        return _double(got)
    except (TypeError, ValueError, RuntimeError):
        raise CheckFailed(f"{on}: {what} should be a tensor or a number, got {_kind(got)}") from None


def parts(got: Any, names: str, on: str) -> tuple:
    """Returns the parts of an answer that is a tuple; `names` lists them as the reader should return them."""
    count = len(names.split(", "))
    if not isinstance(got, tuple | list) or len(got) != count:
        size = f" of {len(got)}" if isinstance(got, tuple | list) else ""
        raise CheckFailed(f"{on}: expected `return {names}`, got {_kind(got)}{size}")
    return tuple(got)


def require(holds: bool, on: str, message: str) -> None:
    """Raises CheckFailed with `message` unless `holds`."""
    if not holds:
        raise CheckFailed(f"{on}: {message}")


def same(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> bool:
    """True if two float64 tensors agree in shape, and in value up to a share `tolerance` of the norm."""
    return got.shape == want.shape and norm(got - want) <= tolerance * norm(want)


def random_matrix(*shape: int, seed: int) -> Tensor:
    """A matrix (or vector) of standard normal numbers, always the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def norm(x: Tensor) -> float:
    """The Frobenius norm as a number."""
    return torch.linalg.vector_norm(x.double()).item()


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", torch.float64)


def _difference(got: Any, want: Any) -> str:
    """Says in what a wrong answer differs from the right one, as far as that is simple."""
    if isinstance(want, set):
        return f"are wrong about {', '.join(sorted(map(str, got ^ want)))}"
    if isinstance(want, dict):
        name = next(name for name in want if got[name] != want[name])
        return f"should say {want[name]!r} of {name}, got {got[name]!r}"
    if got.shape != want.shape:
        turned = "; is it transposed?" if got.ndim == 2 and got.shape == want.shape[::-1] else ""
        return f"should have shape {tuple(want.shape)}, got {tuple(got.shape)}{turned}"
    if not got.isfinite().all():
        return "is not finite: look for a division by zero"
    if not want.ndim:
        return f"should be {_number(want)}, got {_number(got)}"
    factor = ((got * want).sum() / (want * want).sum().clamp_min(1e-30)).item()
    if factor and same(got, factor * want):
        return f"is off by exactly the factor {factor:.4g}"
    if want.ndim == 2 and same(got, want.T):
        return "is the transpose of the right one"
    return f"is off by {norm(got - want) / max(norm(want), 1e-30):.1%} of its norm"


def _number(value: Tensor) -> str:
    return f"{value.item():,.0f}" if value == value.round() else f"{value.item():,.6g}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {tuple(getattr(value, 'shape', ())) or ''}".strip()


def _unchanged(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, nn.Module):
        old, new = before.state_dict(), after.state_dict()
        return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_unchanged(before[key], after[key]) for key in before)
    if isinstance(before, tuple | list):
        return len(before) == len(after) and all(map(_unchanged, before, after))
    return True


def _place(error: Exception, module: str | None) -> str:
    """The last line of the reader's own code on the way to an exception."""
    frames = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if f.f_globals.get("__name__") == module]
    text = linecache.getline(frames[-1][0].f_code.co_filename, frames[-1][1]).strip() if frames else ""
    return f"\n    in your line `{text}`" if text else ""
