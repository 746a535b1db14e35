"""Modules import only from above; importing lorakit stays light; third parties that are imported are declared."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).resolve().parents[2] / "lorakit"
ROOMS = (  # from the ground up; those in one row do not know each other
    ("_words",),
    ("_atomic", "_numbers", "_optional", "_paths", "_progress", "_random", "_suggest"),
    ("layers",),
    ("speed",),
    ("models",),
    ("training",),
    ("cost", "merging"),
    ("tasks",),
    ("experiments",),
    ("course",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.stem.startswith("__"))
MAX_LINES = 400
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(path.relative_to(PACKAGE).parts))


def imported(source):
    """Yields the dotted name behind every import of a source, inside functions too, as far down as it is written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "expected imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(source):
    """The modules of lorakit that a source imports, as parts of their path: ("layers", "lora")."""
    for name in imported(source):
        parts = name.split(".")
        if parts[0] == "lorakit":
            while len(parts) > 1 and not (path := PACKAGE.joinpath(*parts[1:])).with_suffix(".py").is_file():
                if path.is_dir() and (path / "__init__.py").is_file():
                    break
                parts.pop()
            yield tuple(parts[1:])


def module_of(path):
    """The parts of a module's path; a package's are its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def find_breaches(path, source):
    """What a module imports from its own floor's other rooms or from above; and the package itself, which is above."""
    room = module_of(path)[0]
    for other in imported_modules(source):
        if room != "cli" and (not other or (other[0] != room and FLOOR[other[0]] >= FLOOR[room])):
            yield ".".join(other) or "lorakit"


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from lorakit.layers.lora import LoRALinear", None),
        ("from lorakit.layers import lora\nimport torch, lorakitten", None),
        ("from lorakit.models.inject import inject", None),
        ("def f():\n    from lorakit.experiments import sweep", "experiments.sweep"),
        ("import lorakit.merging.gguf", "merging.gguf"),
        ("from lorakit import fit", "lorakit"),
    ],
)
def test_a_breach_is_found_wherever_it_is(source, breach):
    assert list(find_breaches(PACKAGE / "cost" / "budget.py", source)) == ([breach] if breach else [])


@each_module
def test_a_room_imports_only_from_below(path):
    assert module_of(path)[0] in FLOOR, f"give {path.name} a room"
    assert list(find_breaches(path, path.read_text(encoding="utf-8"))) == []


def test_no_module_imports_itself_in_a_circle():
    needs = {module_of(path): set(imported_modules(path.read_text(encoding="utf-8"))) for path in MODULES}
    list(TopologicalSorter(needs).static_order())  # raises CycleError


@each_module
def test_a_module_is_short_and_has_a_subject(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: which two ideas are in it?"
    assert path.stem not in {"utils", "helpers", "common", "misc"}


def test_third_parties_are_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {canonicalize_name(Requirement(text).name) for text in asked}
    providers = metadata.packages_distributions()
    roots = {name.split(".")[0] for path in MODULES for name in imported(path.read_text(encoding="utf-8"))}
    for root in sorted(roots - set(sys.stdlib_module_names) - {"lorakit"}):
        assert declared & {canonicalize_name(name) for name in providers.get(root, [root])}, f"declare what has {root}"


def modules_after(statement):
    source = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_lorakit_needs_only_its_core_dependencies():
    requirements = [Requirement(text) for text in metadata.requires("lorakit")]
    optional = {each.name for each in requirements if each.marker and "extra" in str(each.marker)} - {"lorakit"}
    providers = metadata.packages_distributions()
    loaded = modules_after("import lorakit")
    core = modules_after("import torch, safetensors.torch, jaxtyping, tqdm")
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft", "matplotlib"}
    assert not {name for name in loaded - core if optional & set(providers.get(name, []))}
