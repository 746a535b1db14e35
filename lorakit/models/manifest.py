"""A folder's files with their sizes and checksums, so that damage is found before it is loaded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "lorakit_manifest.json"


def sha256(file: Path) -> str:
    """The checksum of one file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(folder: Path, origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Writes the manifest of a folder, and makes sure that all is on the disk.

    Args:
        folder: its files are listed, but not a README, which people may improve.
        origin: what else the manifest says: where the files are from.

    Returns:
        file name -> its `bytes` and `sha256`.
    """
    found = [file for file in sorted(folder.iterdir()) if file.name not in (MANIFEST, "README.md", ".gitattributes")]
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in found}
    (folder / MANIFEST).write_text(json.dumps({**origin, "files": files}, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # a cache may be shared
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    return files


def find_damage(folder: Path, origin: dict[str, Any], verify: bool) -> str | None:
    """Why a sealed folder cannot be used, None if it can.

    Args:
        folder: where the files and the manifest lie.
        origin: what the manifest must say besides.
        verify: compare checksums too; without it only sizes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    if any(manifest.get(key) != value for key, value in origin.items()):
        return "another version of lorakit made it"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            return f"{name} is missing or has another size"
        if verify and sha256(file) != expected["sha256"]:
            return f"{name} has changed"
    return None
