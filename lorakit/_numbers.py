"""Numbers and lists that somebody has given, seen to be such and in range before anything is done with them."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from lorakit._words import short

LARGEST = 2**63 - 1  # that torch and sqlite hold


def check_integer(what: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Refuses what is no integer from `least` to `most`; True and False are none.

    Raises:
        ValueError: says what was expected.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:
        limits = f">= {least}" if most == LARGEST and not (whole and value > most) else f"from {least} to {most}"
        raise ValueError(f"expected {what} as an integer {limits}, got {short(value)}")


def is_number(value: Any) -> bool:
    """True for what a float holds, NaN and infinity too; not for True and False."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isinstance(float(value), float)
    except OverflowError:
        return False


def check_positive(what: str, value: Any) -> None:
    """Refuses what is no finite number above zero.

    Raises:
        ValueError: says what was expected.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"expected a finite {what} > 0, got {short(value)}")


def check_list(what: str, value: Any) -> None:
    """Refuses what cannot be read more than once and by places: a number, a text, a mapping, a generator.

    Raises:
        ValueError: says what was expected.
    """
    try:
        listed = len(value) >= 0 and hasattr(value, "__getitem__")
    except TypeError:  # a tensor without dimensions has `__len__`, and no length
        listed = False
    if not listed or isinstance(value, str | bytes | Mapping | type):
        raise ValueError(f"expected a list of {what}, got {short(value)}")
