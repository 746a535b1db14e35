"""A sweep's plan, a YAML file: which function, over which grid, into which folder."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from lorakit.experiments.records import Grid, Settings, expand


class _Yaml(yaml.SafeLoader):
    """YAML in which 2e-4 is a number, as in Python; plain YAML 1.1 asks for 2.0e-4 and takes 2e-4 for a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Returns the value that a YAML text stands for."""
    return yaml.load(text, _Yaml)


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
    path = Path(path)
    try:
        plan = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {path.name}, got: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise ValueError(f"expected a mapping with function and grid in {path.name}, got {plan!r}")
    known = {"function", "grid", "folder", "jobs", "together", "at_once"}
    if missing := {"function", "grid"} - set(plan):
        raise ValueError(f"expected {' and '.join(sorted(missing))} in {path.name}")
    if unknown := set(plan) - known:
        raise ValueError(f"expected {', '.join(sorted(known))} in {path.name}, got {', '.join(sorted(unknown))}")
    expand(plan["grid"])
    function = find_function(plan["function"], path.parent)
    options = {name: plan[name] for name in ("jobs", "together", "at_once") if name in plan}
    return Plan(function, plan["grid"], path.parent / plan.get("folder", path.stem), options)


def find_function(name: str, folder: Path) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` means; files are looked for in the folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name has another form, or the module or function is not there.
    """
    module, _, attribute = str(name).rpartition(":")
    if not module or not attribute:
        raise ValueError(f"expected file.py:name or package.module:name, got {name!r}")
    found = _from_file(folder / module) if module.endswith(".py") else _from_package(module)
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ValueError(f"expected a function {attribute!r} in {module}, got {function!r}")
    return function


def _from_file(path: Path) -> ModuleType:
    """The module, importable by its stem as well, so that other processes find what it defines."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a file with the function, got none at {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"expected a module {name!r}: {error}") from None
