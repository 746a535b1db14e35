"""How a lesson holds its conclusions: true where it claims them, and elsewhere in words."""

from typing import Any


def expect(holds: Any, sentence: str, *, here: bool) -> None:
    """Asserts a conclusion that was drawn from measurements; what is true at any setting needs a plain `assert`.

    Args:
        holds: whether it is true of this run.
        sentence: the conclusion, without its full stop.
        here: whether the lesson claims it for these settings; if not, it prints whether the conclusion holds.

    Raises:
        AssertionError: it is claimed here and not true.
    """
    if not here:
        print(f"{'holds' if holds else 'does not hold'} with these settings: {sentence}")
    elif not holds:
        raise AssertionError(f"expected with these settings: {sentence}")
