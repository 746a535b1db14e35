"""Near names: what somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names that look like `name`, or all of them."""
    known = list(known)
    return f"got {name!r}; near: {', '.join(get_close_matches(name, known) or known)}"
