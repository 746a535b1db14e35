"""The scripts of the recorded studies, `data/NAME/record.py`, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

DATA = Path(__file__).resolve().parents[2] / "data"


def load_study(name: str) -> ModuleType:
    """Imports a study's script without running it."""
    spec = importlib.util.spec_from_file_location(f"study_{name}", DATA / name / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
