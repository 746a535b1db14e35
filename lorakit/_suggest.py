"""Near names: what somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

FEW = 4  # names that are all said


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what was got, and the known names that look like it, or all if they are few."""
    known = list(known)
    near = get_close_matches(name, known, n=4, cutoff=0.4)
    rest = [other for other in known if other not in near] if len(known) <= FEW else []
    also = f"; also: {', '.join(rest)}" if near and rest else ""
    return f"got {name!r}; {'near' if near else 'known'}: {', '.join(near or known) or 'none'}{also}"
