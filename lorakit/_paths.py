"""Paths that somebody has given, seen to be such before anything is looked for."""

import os
from pathlib import Path
from typing import Any

from lorakit._words import short


def as_path(what: str, value: Any) -> Path:
    """A path from a text or a path.

    Raises:
        ValueError: it is neither, it is empty, or it holds a zero byte, which no system allows.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"expected a path of {what}, got {short(value)}")
    return Path(value)
