"""Ablation grids: settings in, one JSON record a run out, through any joblib backend; stopped, a sweep goes on.

def train(rank, lr, seed):                     # settings, by name
    ...
    return {"accuracy": 0.93, "losses": [...]}     # plain values

frame = sweep(train, {"rank": [1, 4, 16], "lr": [1e-3, 1e-2], "seed": range(5)}, "results")
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from joblib import Parallel, delayed

from lorakit._atomic import draft_beside, named_errors
from lorakit._numbers import check_integer
from lorakit._paths import as_path
from lorakit._progress import Progress, duration
from lorakit._words import short
from lorakit.experiments.circumstances import circumstances
from lorakit.experiments.records import (
    MOST_JOBS,
    Grid,
    Settings,
    canonical,
    expand,
    frame,
    read_record,
    record_path,
    survey,
    write_record,
)


def sweep(
    run: Callable[..., Any],
    grid: Grid,
    folder: str | PathLike,
    *,
    jobs: int | None = None,
    together: Sequence[str] = (),
    at_once: int = 16,
    retry: bool = False,
    command: str = "",
    show: bool = True,
) -> pd.DataFrame:
    """Makes the runs of a grid that the folder lacks; each is recorded when it ends, in a file named by its settings.

    A kill at any moment loses the runs in flight and nothing else. Several sweeps may work on one folder: a run that
    another process is making is left to it. A run that fails is recorded with its error and not tried again unless it
    is asked for. A damaged record is set aside as `*.damaged`, reported, and made again.

    Args:
        run: called with a setting's parameters by name; returns a mapping of plain values, whose names are not those of
            parameters. It seeds itself. With processes or a cluster it must be importable or picklable there.
        grid: see `expand`.
        folder: for the records; made if missing. Another function or task wants another folder.
        jobs: how many at a time, -1 for all cores; None for what `joblib.parallel_config` says, else one. The backend
            is joblib's: processes, threads, a Dask or a Ray cluster whose workers see the folder.
        together: parameters in which runs may differ that are made in one call. `run` then takes a list of settings and
            returns a list of results, as `fit_many` wants it. If such a call fails, its runs are tried one by one.
        at_once: most runs in one call.
        retry: make the failed runs again.
        command: recorded with each run; the process's own by default.
        show: draw a progress bar, with the time left.

    Returns:
        the `frame` of the grid: one row a run, failed ones included.

    Raises:
        ValueError: the grid is not one, `together` names a parameter that it does not have, or `jobs` is no number of
            processes.
        OSError: nothing can be written into the folder, which is tried before the first run.
    """
    settings, folder = expand(grid), as_path("a folder of records", folder)
    if isinstance(together, str) or not isinstance(together, Iterable):
        raise ValueError(f"expected a list of parameters for together, got {together!r}")
    check_integer("at_once", at_once)
    if not isinstance(command, str):
        raise ValueError(f"expected command as a text, got {short(command)}")
    unknown = [name for name in together if not any(name in setting for setting in settings)]
    if unknown:
        raise ValueError(f"expected parameters of the grid, got {unknown}")
    if jobs is not None:
        check_jobs(jobs)
    prepare(folder)
    state = survey(folder, settings, retry)
    for damaged in state.damaged:
        print(f"set aside: {damaged}")
    calls = _calls(state.missing, together, at_once)
    facts = {"function": getattr(run, "__qualname__", repr(run)), "command": command or _command()}
    work = (delayed(_make)(run, call, folder, bool(together), retry, facts, os.getpid()) for call in calls)
    start, made = time.perf_counter(), 0
    with Progress(len(state.missing), "sweep", "run", show) as progress:
        for n in Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(work):
            made += n
            left = (time.perf_counter() - start) / made * (len(state.missing) - made)
            progress.update(n, f"{duration(left)} left")
    return frame(folder, settings)


def check_jobs(jobs: int) -> None:
    """Raises a ValueError if that is no number of processes: above 0, or below it as joblib counts the cores."""
    if not 0 < abs(jobs) <= MOST_JOBS:
        raise ValueError(f"expected from 1 to {MOST_JOBS} jobs, or -1 for all cores, got {jobs}")


def prepare(folder: Path) -> None:
    """Makes a folder for records and tries to write into it; drafts that killed processes have left there go.

    Raises:
        OSError: it cannot be made, or nothing can be written there.
    """
    with named_errors(folder):
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        with draft_beside(folder / "record"):
            pass


def _calls(missing: list[Settings], together: Sequence[str], at_once: int) -> list[list[Settings]]:
    """The runs of each call: alike in all parameters but those of `together`."""
    if not together:
        return [[setting] for setting in missing]
    groups: dict[str, list[Settings]] = {}
    for setting in missing:
        alike = canonical({name: value for name, value in setting.items() if name not in together})
        groups.setdefault(alike, []).append(setting)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


def _make(
    run: Callable, settings: list[Settings], folder: Path, batched: bool, retry: bool, facts: dict, sweeper: int
) -> int:
    """Makes and records the runs of a call, in whatever process joblib chose; returns how many it was given."""
    if os.getppid() == sweeper:
        _end_with(sweeper)
    with ExitStack() as held:
        mine = []
        for setting in settings:
            path = record_path(folder, setting)
            try:
                held.enter_context(FileLock(folder / ".locks" / path.stem, timeout=0))  # freed when its process ends
            except Timeout:
                continue
            record = read_record(path)
            if record is None or (retry and record["error"]):
                mine.append(setting)
        if batched and len(mine) > 1:
            start = time.perf_counter()
            try:
                results = list(run(mine))
                if len(results) != len(mine):
                    raise ValueError(f"expected {len(mine)} results, got {len(results)}")
            except KeyboardInterrupt:
                raise
            except BaseException:
                pass  # one of them is at fault: one by one it is found
            else:
                seconds = (time.perf_counter() - start) / len(mine)
                for setting, result in zip(mine, results, strict=True):
                    _record(folder, setting, lambda r=result: r, facts, seconds)
                return len(settings)
        for setting in mine:
            _record(folder, setting, (lambda s=setting: run([s])[0]) if batched else lambda s=setting: run(**s), facts)
    return len(settings)


@cache
def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, however that ended: a worker alone would go on with its calls."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _record(
    folder: Path, setting: Settings, call: Callable[..., Any], facts: dict, seconds: float | None = None
) -> None:
    """Makes a run, or takes the result of one that took `seconds`, and writes what became of it."""
    start, result, error = time.perf_counter(), {}, ""
    try:
        result = _plain(call(), setting)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a run that calls sys.exit has failed; the sweep has not
        error = traceback.format_exc()
    seconds = time.perf_counter() - start if seconds is None else seconds
    write_record(folder, setting, result=result, error=error, seconds=round(seconds, 3), **facts, **circumstances())


def _command() -> str:
    """How this process was started, without the folders of this machine."""
    name, *rest = sys.argv or ["python"]
    return "a notebook" if "ipykernel" in name else " ".join([Path(name).name, *rest])


def _plain(result: Any, setting: Settings) -> dict[str, Any]:
    """The result as JSON gives it back."""
    if not isinstance(result, Mapping):
        raise TypeError(f"expected a mapping of results, got {type(result).__name__}")
    if clash := sorted((set(setting) | {"seconds", "error"}) & set(result)):
        raise ValueError(f"expected results with names of their own, got {clash}")
    return json.loads(json.dumps(dict(result), default=_number))


def _number(value: Any) -> Any:
    """A number of numpy or torch as Python has it; an array as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"expected plain values, got {type(value).__name__}")
