"""Modules import only from above; importing lorakit stays light; third parties that are imported are declared."""

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).resolve().parents[1] / "lorakit"
ORDER = [  # from the ground up
    *("progress", "files", "manifest", "libraries", "machine", "memory", "attention"),
    *("repacking", "fused", "lowrank", "lora", "gated", "norms", "lean", "stack", "dora", "pissa", "loraplus", "nf4"),
    *("inject", "fold", "quantized"),
    *("adapter_files", "adapter", "updates", "arithmetic"),
    *("fetch", "configs", "ledger", "rehearsal", "budget"),
    *("models", "sqlrun", "sqlwords", "sqlharder", "sqlmake", "sqllevels", "sqlfiles", "sql"),
    *("batch", "below", "loss", "divergence", "export", "gguffile", "train", "plain", "many", "generate"),
    *("facts", "extract", "pretrain"),
    *("ablate", "recorded", "records", "sweep", "plan", "stats", "intrinsic", "intrinsic_card", "plots"),
    *(
        "answers",
        "checks_lowrank",
        "checks_lora",
        "checks_sft",
        "checks_qlora",
        "checks_dora",
        "checks_ablation",
        "checks_merging",
        "checks",
    ),
    *("outputs", "exercises", "execute", "lessons", "doctor", "cli"),
]
MODULES = sorted(path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
MAX_LINES = 250
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def imported(source):
    """Yields the dotted name behind every import of a source, inside functions too; `lorakit.x` for relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["lorakit" if node.level else "", node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "lorakit" else [module]


def imported_modules(source):
    """Returns the modules of lorakit that a source imports; `lorakit` for the package itself."""
    names = [name.split(".") for name in imported(source)]
    return {name[1] if len(name) > 1 else "lorakit" for name in names if name[0] == "lorakit"}


def test_imports_are_found_wherever_they_are():
    source = (
        "import lorakit.a\nfrom lorakit import b\nfrom .c import x\ndef f():\n    from . import d\n    import lorakit\n"
    )
    assert imported_modules(source + "import torch, lorakitten") == {"a", "b", "c", "d", "lorakit"}


@each_module
def test_a_module_imports_only_from_above(path):
    assert path.stem in ORDER, f"give {path.name} its place in ORDER"
    above = set(ORDER[: ORDER.index(path.stem)])
    assert imported_modules(path.read_text(encoding="utf-8")) <= above


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
