"""The course as a program: chooses lessons, sets their parameters, runs them, and refreshes their committed outputs."""

import ast
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from lorakit._atomic import write_atomically
from lorakit._suggest import near_names
from lorakit.course.outputs import ANSI, clean, find_litter, headline
from lorakit.course.runner import Executor, Screen
from lorakit.experiments.plan import read_yaml as read_yaml
from lorakit.experiments.plan import read_yaml_file


@dataclass
class Result:
    """What became of one lesson; `error` is empty if all is well."""

    stem: str
    path: Path
    wall_seconds: float
    cpu_seconds: float
    headline: str
    error: str


# ---- which lessons, with which parameters ----


def find_notebooks() -> Path:
    """Returns the course's folder `notebooks`: in the working directory, or beside an editable install."""
    for parent in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (parent / "notebooks" / "profiles").is_dir():
            return parent / "notebooks"
    raise FileNotFoundError("expected the folder notebooks/ in the working directory: run this in the course's folder")


def select_lessons(names: list[str], folder: Path) -> list[Path]:
    """Returns the lessons named by number ("3", "03") or by stem ("03_sft"); all of them, in order, without names."""
    lessons = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not lessons:
        raise FileNotFoundError(f"expected lessons in {folder}, such as 00_name.ipynb, but there are none")
    numbers = {stem[:2]: stem for stem in lessons}
    stems = [numbers.get(name.zfill(2), name.removesuffix(".ipynb")) if name else "" for name in names] or list(lessons)
    return [lessons[_known(stem, lessons, "a lesson")] for stem in stems]


def default_parameters(nb: NotebookNode) -> dict[str, Any]:
    """Returns name -> default of the cell tagged `parameters`, which holds nothing but assignments of literals."""
    cells = [cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    return {line.targets[0].id: ast.literal_eval(line.value) for source in cells for line in ast.parse(source).body}


def lesson_parameters(path: Path, profile: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns what is set in a lesson: the profile's `all` where it applies, then its own entry, then the overrides."""
    profiles = {file.stem: file for file in sorted((path.parent / "profiles").glob("*.yaml"))}
    settings = _read_profile(profiles[_known(profile, profiles, "a profile")])
    defaults = default_parameters(nbformat.read(path, as_version=4))
    values = {name: value for name, value in settings.get("all", {}).items() if name in defaults}
    values |= settings.get(path.stem, {}) | overrides
    for name, value in values.items():
        default = defaults[_known(name, defaults, f"a parameter of {path.stem}")]
        if default is not None and type(value) is not type(default) and (type(default), type(value)) != (float, int):
            raise ValueError(f"expected {type(default).__name__} for {name} of {path.stem}, got {value!r}")
    return values


def _read_profile(file: Path) -> dict[str, dict[str, Any]]:
    settings = read_yaml_file(file) or {}
    found = {stem: values or {} for stem, values in settings.items()} if isinstance(settings, dict) else None
    if found is None or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError(f"expected lessons and their parameters in {file.name}, got {settings!r}")
    return found


def _known(name: str, known: dict[str, Any], what: str) -> str:
    if name not in known:
        raise ValueError(f"expected {what}, {near_names(name, known)}")
    return name


# ---- running ----


def run_lessons(names: list[str], profile: str, overrides: dict[str, Any], out: Path) -> list[Result]:
    """Runs lessons into `out/profile/` and prints a table; what is misspelt is found before the first one starts."""
    jobs = [(path, lesson_parameters(path, profile, overrides)) for path in select_lessons(names, find_notebooks())]
    (out / profile).mkdir(parents=True, exist_ok=True)  # found now if it cannot be, not after a lesson
    results = [run_lesson(path, parameters, out / profile / path.name) for path, parameters in jobs]
    width = max(len(text) for text in ["lesson", *(result.stem for result in results)])
    print(f"\n{'lesson':<{width}}  result  wall s   CPU s  headline")
    for r in results:
        verdict = "failed" if r.error else "ok"
        print(f"{r.stem:<{width}}  {verdict:<6}  {r.wall_seconds:6.1f}  {r.cpu_seconds:6.1f}  {r.headline}".rstrip())
    print("\nexecuted notebooks:", *(f"  {result.path}" for result in results), sep="\n")
    return results


def run_lesson(path: Path, parameters: dict[str, Any], target: Path) -> Result:
    """Executes one lesson and saves the executed copy, also after a failure."""
    nb = load_notebook_node(str(path))
    if parameters:
        nb = parameterize_notebook(nb, parameters, kernel_name="python3", language="python")
    result = _execute(nb, path)
    result.path = target
    _save(nb, target)
    if result.error:
        print(f"its copy: {target}")
    return result


def refresh(paths: list[Path]) -> list[Result]:
    """Runs notebooks with their own parameters and saves them with new, clean outputs; a failed one stays as it was."""
    results = []
    for path in paths:
        nb = load_notebook_node(str(path))
        result = _execute(nb, path)
        complaints = [] if result.error else clean(nb) + find_litter(nb)
        if complaints:
            result.error = "not saved: " + "; ".join(complaints)
            print(f"[{path.stem}] {result.error}")
        elif not result.error:
            _save(nb, path)
        results.append(result)
    return results


def _execute(nb: NotebookNode, path: Path) -> Result:
    screen = Screen(nb, path.stem)
    executor, start, error = Executor(nb, screen), time.perf_counter(), ""
    try:
        executor.run(path.parent)
    except Exception as problem:  # a failed lesson must not keep the others from running
        error = f"{type(problem).__name__}: {problem}"
        if isinstance(problem, CellExecutionError):
            error = f"{problem.ename}: {problem.evalue}"
        elif isinstance(problem, DeadKernelError):
            error += " (often for want of memory)"
        error = ANSI.sub("", error)[:2000]
    seconds = time.perf_counter() - start
    if error:
        screen.close(f"FAILED in cell {screen.number}, section {screen.heading!r}")
        print("\n".join(f"    {line}" for line in screen.source.splitlines()), error, sep="\n")
    else:
        screen.close(f"ok, {seconds:.0f} s")
    return Result(path.stem, path, seconds, executor.cpu_seconds, headline(nb), error)


def _save(nb: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: (nbformat.writes(nb) + "\n").encode()})
