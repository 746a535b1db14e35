"""The page "which interval when": the functions that it names exist, and each that makes an interval is on it."""

import importlib
import inspect
import re
from pathlib import Path

from lorakit.experiments import verdicts

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PAGE = (NOTEBOOKS / "which_interval.md").read_text(encoding="utf-8")
MODULES = ("stats", "tuning", "verdicts")
NAMED = {each for each in re.findall(r"`(\w+\.\w+)`", PAGE) if each.split(".")[0] in MODULES}


def functions(module):
    """The public functions that a module of lorakit.experiments defines."""
    found = importlib.import_module(f"lorakit.experiments.{module}")
    return {
        name
        for name, value in vars(found).items()
        if inspect.isfunction(value) and value.__module__ == found.__name__ and not name.startswith(("_", "check_"))
    }


def test_every_function_that_is_named_exists():
    assert len(NAMED) >= 8
    for each in NAMED:
        module, name = each.split(".")
        assert name in functions(module), each


def test_every_function_that_makes_an_interval_is_named():
    public = {f"{module}.{name}" for module in MODULES for name in functions(module)}
    assert public - {"stats.difference", "verdicts.finding"} == NAMED  # neither is the one rule


def test_the_page_is_right_about_how_few_are_few():
    assert verdicts.ENOUGH == 5
    assert "fewer than five seeds" in PAGE


def test_lesson_06_links_it():
    assert "(which_interval.md)" in (NOTEBOOKS / "06_rank_ablations.ipynb").read_text(encoding="utf-8")
