"""Near names: what somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

from lorakit._words import short

FEW = 4  # names that are all said


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Refuses what is not one of the known names.

    Raises:
        ValueError: says what was expected, and the near names.
    """
    known = list(known)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"expected {what}, {near_names(name, known)}")


def near_names(name: object, known: Iterable[str]) -> str:
    """The end of an error message: what was got, and the known names that look like it, or all if they are few."""
    known = list(known)
    near = get_close_matches(name, known, n=4, cutoff=0.4) if isinstance(name, str) else []
    rest = [other for other in known if other not in near] if len(known) <= FEW else []
    also = f"; also: {', '.join(rest)}" if near and rest else ""
    return f"got {short(name)}; {'near' if near else 'known'}: {', '.join(near or known) or 'none'}{also}"
