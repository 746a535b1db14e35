"""Recorded runs: a JSON file that grows run by run, and goes on where it was stopped."""

import json
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from lorakit._atomic import write_atomically


def record_runs(
    path: Path,
    grid: Iterable[dict[str, Any]],
    run: Callable[..., dict[str, Any]],
    command: str,
    packages: Iterable[str] = ("torch", "transformers", "peft"),
    **facts: Any,
) -> list[dict[str, Any]]:
    """Makes the runs that the file lacks; the file is written anew, atomically, after each one.

    Several processes may fill one file with different runs: each reads it again before it adds its own.

    Args:
        path: of the JSON file: `runs` and, beside it, the circumstances of the last one.
        grid: the settings of each run, plain values that name it: `{"arm": "LoRA", "lr": 3e-3, "seed": 0}`.
        run: called as `run(**setting)`, returns plain values to be recorded.
        command: that makes the file.
        packages: whose versions are recorded.
        facts: recorded as they are, such as the model's name.

    Returns:
        all runs of the file.
    """
    for setting in grid:
        if any(setting.items() <= made.items() for made in read(path)["runs"]):
            continue
        made = setting | run(**setting)
        with FileLock(f"{path}.lock"):
            results = read(path)
            results["runs"].append(made)
            results |= {"command": command, "device": "cpu", "threads": torch.get_num_threads()} | facts
            results["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
            write_atomically({path: (json.dumps(results, indent=1) + "\n").encode()})
        print({key: value for key, value in made.items() if not isinstance(value, list | dict)}, flush=True)
    return read(path)["runs"]


def read(path: Path) -> dict[str, Any]:
    """What a file holds, with no runs if there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
