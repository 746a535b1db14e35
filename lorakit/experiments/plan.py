"""A sweep's plan, a YAML file: which function, over which grid, into which folder."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, update_wrapper
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from lorakit._paths import as_path
from lorakit._words import one_line, short
from lorakit.experiments.records import MOST_JOBS, Grid, Settings, expand


class _Yaml(yaml.SafeLoader):
    """YAML in which 2e-4 is a number, as in Python; plain YAML 1.1 asks for 2.0e-4 and takes 2e-4 for a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str | bytes, place: str = "") -> Any:
    """Returns the value that a YAML text stands for; `place` tells in an error where it stood.

    Raises:
        ValueError: it is none, in one line; or a value in it is none, such as the 31st of February.
    """
    if not isinstance(text, str | bytes):
        raise ValueError(f"expected YAML{place}, got {short(text)}")
    try:
        return yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"expected YAML{place}, got: {one_line(error)}") from None


def read_yaml_file(path: Path) -> Any:
    """Returns the value that a YAML file stands for; an error names the file."""
    return read_yaml(path.read_bytes(), f" in {path.name}")


@dataclass(frozen=True)
class Plan:
    """What `sweep` is to be called with."""

    function: Callable[..., Any]
    grid: Grid
    folder: Path
    options: dict[str, Any]  # jobs, together, at_once

    @property
    def settings(self) -> list[Settings]:
        """Every run's parameters."""
        return expand(self.grid)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _grid(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, Mapping) for part in parts)


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "function": ("file.py:name or package.module:name", lambda value: isinstance(value, str)),
    "grid": ("a mapping of parameters to values, or several,", _grid),
    "folder": ("a folder's name", lambda value: isinstance(value, str) and value != ""),
    "jobs": ("a number of processes, or -1", lambda value: _whole(value) and 0 < abs(value) <= MOST_JOBS),
    "together": ("a list of parameters", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)),
    "at_once": ("a whole number above 0", lambda value: _whole(value) and value > 0),
}  # of a plan's entries, in words and as a check


def load_plan(path: str | PathLike) -> Plan:
    """Reads a plan and finds its function.

        function: train.py:run        # or package.module:run; files are beside the plan
        grid:                         # a mapping, or a list of mappings, as for lorakit.experiments.records.expand
          rank: [1, 4, 16]
          lr: [1e-3, 1e-2]
          seed: [0, 1, 2]
        folder: results               # beside the plan, too; by default named as the plan
        jobs: 2                       # and `together`, `at_once`, as for sweep

    Raises:
        FileNotFoundError: there is no such plan, or no such file with the function.
        ValueError: the plan is not YAML, lacks something, or says something unknown.
    """
    path = as_path("a plan", path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a plan, got no such file: {path}")
    plan = read_yaml_file(path)
    if not isinstance(plan, dict):
        raise ValueError(f"expected a mapping with function and grid in {path.name}, got {plan!r}")
    if missing := {"function", "grid"} - set(plan):
        raise ValueError(f"expected {' and '.join(sorted(missing))} in {path.name}")
    if unknown := set(plan) - set(FORMS):
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"expected {', '.join(sorted(FORMS))} in {path.name}, got {names}")
    for name, value in plan.items():
        form, fits = FORMS[name]
        if not fits(value):
            raise ValueError(f"expected {form} for {name} in {path.name}, got {value!r}")
    settings = expand(plan["grid"])
    function = find_function(plan["function"], path.parent)
    if function.__module__ == "lorakit.experiments.ablation":  # there a task may be a folder
        from lorakit.experiments.ablation import beside

        function = beside(function, settings, path.parent)
    options = {name: plan[name] for name in ("jobs", "together", "at_once") if name in plan}
    if unknown := set(options.get("together", ())) - {name for setting in settings for name in setting}:
        raise ValueError(
            f"expected parameters of the grid for together in {path.name}, got {', '.join(sorted(unknown))}"
        )
    return Plan(function, plan["grid"], path.parent / plan.get("folder", path.stem), options)


def find_function(name: str, folder: Path) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` means; files are looked for in the folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name has another form, the module or function is not there, or the module cannot be imported.
    """
    module, _, attribute = str(name).rpartition(":")
    if not module or not attribute:
        raise ValueError(f"expected file.py:name or package.module:name, got {name!r}")
    try:
        if module.endswith(".py"):
            return FileFunction(Path(os.path.realpath(folder / module)), attribute)
        found = importlib.import_module(module)
    except (OSError, ValueError):
        raise  # it says all
    except ModuleNotFoundError as error:
        raise ValueError(f"expected a module {module!r}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a file does while it is read
        text = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"expected a function {attribute!r} in {module}, which cannot be imported: {text}") from error
    return _attribute(found, attribute)


def _attribute(module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"expected a function {name!r} in {module.__name__.removeprefix('_plan_')}, got {function!r}")
    return function


class FileFunction:
    """A function in a file that no import finds; other processes, to which it is pickled, read the file again."""

    def __init__(self, path: Path, name: str):
        if not path.is_file():
            raise FileNotFoundError(f"expected a file with the function, got none at {path}")
        self.place = path, name
        self.function = _attribute(_module(path, path.stat().st_mtime_ns), name)
        update_wrapper(self, self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return FileFunction, self.place


@cache
def _module(path: Path, changed: int) -> ModuleType:
    """The module in a file, which finds its neighbours while it is read; `sys.path` and `sys.modules` stay as they are.

    Its folder comes last in `sys.path`: a neighbour `random.py` is not taken for the library's.
    """
    name, folder = f"_plan_{path.stem}", str(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    known, importable = set(sys.modules), folder in map(os.path.abspath, sys.path)
    sys.modules[name] = module  # dataclasses look there while they are made
    sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
        new = {each: found for each, found in list(sys.modules.items()) if each not in known}
        tops = {each for each, found in new.items() if not importable and folder in _places(found)}
        for each in new:
            if each == name or each.partition(".")[0] in tops:
                del sys.modules[each]
    return module


def _places(module: ModuleType) -> list[str]:
    """The folders in which a module's file lies, or in which that of a package's folder does."""
    spec = getattr(module, "__spec__", None)
    return [str(Path(each).parent) for each in [spec and spec.origin, *getattr(module, "__path__", [])] if each]
