"""The records of a sweep: which runs a grid has, which of them a folder holds, and all of them as a frame."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from lorakit._atomic import write_atomically
from lorakit._paths import as_path
from lorakit._progress import duration

MOST_JOBS = 1_000  # at a time, far above what one machine has
Settings = dict[str, Any]
Grid = Mapping | Iterable[Mapping]


def expand(grid: Grid) -> list[Settings]:
    """All settings of a grid, in order, each once.

    Args:
        grid: parameter -> its values, of which all combinations are taken; a value that is no list, tuple or range is
            the only one. Or several such mappings, one after the other; single settings are such mappings, too.

    Raises:
        ValueError: a parameter has no values, or one that JSON cannot hold; or there are no settings at all.
    """
    found: dict[str, Settings] = {}
    parts = [grid] if isinstance(grid, Mapping) else list(grid) if isinstance(grid, Iterable) else [grid]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"expected a mapping of parameters to values, or several, got {grid!r}")
    for part in parts:
        values = {k: list(v) if isinstance(v, list | tuple | range) else [v] for k, v in part.items()}
        for name, choices in values.items():
            if not isinstance(name, str) or not name or not choices:
                raise ValueError(f"expected a name and at least one value, got {name!r}: {choices}")
        if not values:
            raise ValueError("expected parameters, got an empty grid")
        for chosen in product(*values.values()):
            setting = dict(zip(values, chosen, strict=True))
            try:
                found.setdefault(canonical(setting), json.loads(canonical(setting)))
            except (TypeError, ValueError):
                raise ValueError(f"expected values that JSON can hold and name, got {setting}") from None
    if not found:
        raise ValueError("expected at least one setting, got an empty grid")
    return list(found.values())


@dataclass
class State:
    """What a folder holds of a grid."""

    done: int = 0
    failed: int = 0
    missing: list[Settings] = field(default_factory=list)  # to be made; failed ones too if they are to be tried again
    damaged: list[Path] = field(default_factory=list)  # records that were set aside
    seconds: float | None = None  # that the missing runs may take, one after the other; None if nothing is known

    def __str__(self) -> str:
        text = f"{self.done} runs done, {self.failed} failed, {len(self.missing)} to make"
        if self.missing and self.seconds is not None:
            text += f", about {duration(self.seconds)} one after the other"
        return text


def survey(
    folder: str | os.PathLike, settings: Iterable[Settings], retry: bool = False, guide: str | os.PathLike | None = None
) -> State:
    """What is there of the settings that `expand` gave, and what is missing; sets damaged records aside.

    A missing run may take what its record in the folder `guide` says that it took there, or else the median of all runs
    that are known.
    """
    state, expected = State(), {}
    for setting in settings:
        path = record_path(folder, setting)
        record = read_record(path, state.damaged)
        if record is None or (retry and record["error"]):
            state.missing.append(setting)
        if record is not None:
            state.failed += bool(record["error"])
            state.done += not record["error"]
        elif guide:
            record = read_record(Path(guide, path.name))
        if record is not None and not record["error"] and record["seconds"] is not None:
            expected[path.name] = record["seconds"]
    if expected:
        names = [record_path(folder, setting).name for setting in state.missing]
        state.seconds = sum(expected.get(name, median(expected.values())) for name in names)
    return state


def frame(folder: str | os.PathLike, settings: Iterable[Settings] | None = None) -> pd.DataFrame:
    """The records of a folder as a tidy frame: one row a run, one column a parameter or result.

    Args:
        folder: where a sweep has put them.
        settings: those that are wanted, as `expand` gave them, in their order; if None all, ordered by their values.

    Returns:
        also `error`, empty for a run that went well, and `seconds`, its share of the time, NaN if that was not
        recorded. Runs that are missing or damaged have no row.
    """
    records = read_records(folder, settings)
    rows = [r["settings"] | r["result"] | {"seconds": r["seconds"], "error": r["error"]} for r in records]
    return pd.DataFrame(rows, columns=None if rows else ["seconds", "error"])


def read_records(folder: str | os.PathLike, settings: Iterable[Settings] | None = None) -> list[dict[str, Any]]:
    """The whole records of a folder: `settings`, `result`, `error`, `seconds`, `command`, `device`, `versions` ...

    Args:
        folder: where a sweep has put them.
        settings: as for `frame`.
    """
    if settings is not None:
        chosen = [read_record(record_path(folder, setting)) for setting in settings]
        return [record for record in chosen if record is not None]
    files = as_path("a folder of records", folder).glob("*.json")
    found = [record for record in map(read_record, files) if record is not None]
    return sorted(found, key=lambda record: [(name, *_place(value)) for name, value in record["settings"].items()])


def _place(value: Any) -> tuple[bool, float, str]:
    """Where a value of a parameter comes among others: numbers by size, then the rest by how it is written."""
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, "" if number else canonical(value))


def record_path(folder: str | os.PathLike, setting: Settings) -> Path:
    """Where a run's record lies: its name is a hash of the settings, whatever their order."""
    name = hashlib.sha256(canonical(setting).encode()).hexdigest()[:16]
    return as_path("a folder of records", folder) / f"{name}.json"


def canonical(value: Any) -> str:
    """The one way in which a plain value is written as JSON here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_record(folder: str | os.PathLike, setting: Settings, **facts: Any) -> None:
    """Writes one run's record, with a checksum, atomically."""
    record = {"settings": setting} | facts
    record["checksum"] = _checksum(record)
    write_atomically({record_path(folder, setting): (json.dumps(record, indent=1) + "\n").encode()})


def read_record(path: Path, damaged: list[Path] | None = None) -> dict[str, Any] | None:
    """A record; None if there is none. A damaged one is None as well, and is moved away if there is a list for it."""
    try:
        record = json.loads(path.read_bytes())
        if record["checksum"] == _checksum(record) and record_path(path.parent, record["settings"]) == path:
            return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if damaged is not None:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        damaged.append(aside)
    return None


def _checksum(record: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in record.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
