"""The untrained model's answers on record belong to the prompts that lesson 00 makes, and to no others."""

from pathlib import Path

import nbformat
import pytest
from helpers.studies import load_study

from lorakit.experiments.records import expand

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CELLS = ["l00-01", "l00-03", "l00-05", "l00-09", "l00-16", "l00-r1"]  # up to the record; none of them asks a model


@pytest.fixture
def lesson(monkeypatch):
    """Runs those cells with other settings, and returns their names; a model that is asked answers "asked"."""

    def run(**others):
        names = {"answer": lambda items, hint, tokens: ["asked"] * len(items)}
        cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOKS / "00_start_here.ipynb", as_version=4).cells}
        for name in CELLS:
            exec(cells[name], names)
            if name == "l00-03":
                names |= others
        return names

    monkeypatch.chdir(NOTEBOOKS)
    return run


def answers(names):
    return [
        t
        for hint in names["hints"].values()
        for items in names["asked"].values()
        for t in names["untrained"](items, hint)
    ]


def test_the_lesson_finds_all_its_prompts_on_record(lesson, capsys):
    names = lesson()
    assert len(answers(names)) == len(set(names["on_record"])) == 2 * 3 * 16
    assert "asked" not in answers(names)


@pytest.mark.parametrize(
    "others", [{"model_name": "tiny"}, {"base_tokens": 32}, {"test_items": 128}], ids=lambda others: next(iter(others))
)
def test_with_other_settings_the_model_is_asked(others, lesson):
    assert set(answers(lesson(**others))) == {"asked"}


def test_with_other_examples_in_the_prompt_the_model_is_asked(lesson):
    names = lesson(steps=10)
    asked = [names["untrained"](items, names["hints"]["shown three examples"]) for items in names["asked"].values()]
    assert {text for texts in asked for text in texts} == {"asked"}


def test_the_study_asks_what_the_lesson_asks(lesson):
    names, study = lesson(), load_study("untrained")
    recorded = [prompt for how in expand(study.GRID) for prompt in study.prompts(how)]
    made = [
        hint + item.prompt for hint in names["hints"].values() for items in names["asked"].values() for item in items
    ]
    assert sorted(recorded) == sorted(made)
