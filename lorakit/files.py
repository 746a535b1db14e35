"""Files that are never half-written."""

import os
from pathlib import Path


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Writes each file beside its place and moves it there, so that a reader never sees half of one."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, draft in drafts.items():
            with open(draft, "wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
