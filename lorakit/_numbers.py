"""Numbers that somebody has given, seen to be numbers and in range before anything is done with them."""

import math
from numbers import Integral, Real
from typing import Any


def check_integer(what: str, value: Any, least: int = 1, most: float = math.inf) -> None:
    """Refuses what is no integer from `least` to `most`; True and False are none.

    Raises:
        ValueError: says what was expected.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        limits = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"expected {what} as an integer {limits}, got {value!r}")


def is_number(value: Any) -> bool:
    """True for an integer or a float, which may be NaN or infinite; not for True and False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(what: str, value: Any) -> None:
    """Refuses what is no finite number above zero.

    Raises:
        ValueError: says what was expected.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"expected a finite {what} > 0, got {value!r}")
