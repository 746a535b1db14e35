"""Files that are never half-written."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4


def write_atomically(contents: Mapping[Path, bytes | Callable[[Path], object]]) -> None:
    """Writes each file beside its place and moves it there, so that a reader never sees half of one.

    A file's content is its bytes, or a function that writes them to the path it is given.
    """
    drafts = {path: path.with_name(f".{path.name}.{uuid4().hex}.tmp") for path in contents}  # each call has its own
    try:
        for path, draft in drafts.items():
            content = contents[path]
            if callable(content):
                content(draft)
            else:
                draft.write_bytes(content)
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
