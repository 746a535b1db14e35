"""What was decided about a trick, and why, for people and records."""

from typing import NamedTuple


class Decision(NamedTuple):
    """Whether a trick is used, and a phrase that says why, with the numbers that decided."""

    used: bool
    why: str

    def __str__(self) -> str:
        return f"{'used' if self.used else 'not used'}: {self.why}"
