"""The notebooks of exercises: their solutions, their stubs, and mistakes that a check should refuse."""

import re
from pathlib import Path

import nbformat
import pytest

from lorakit.course import checks, exercises
from lorakit.course.checks import CheckFailed

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = exercises.find_solutions(NOTEBOOKS)
EACH_CHECK = sorted(name for name in checks.__all__ if name.startswith("check_"))


def read(path):
    return nbformat.read(path, as_version=4)


def is_measured(cell):
    """True for a cell that trains and measures: it takes seconds, and shows other numbers every time."""
    return "nbval-ignore-output" in cell.metadata.get("tags", [])


def answers_of(nb):
    """Yields (name of the check, the reader's function) for every exercise of a notebook."""
    names = {}
    exec("import torch\nfrom torch import nn", names)
    for cell in (cell for cell in nb.cells if cell.cell_type == "code" and not is_measured(cell)):
        asked = re.fullmatch(r"checks\.(check_\w+)\((\w+)\)", cell.source)
        if asked:
            yield asked[1], names[asked[2]]
        else:
            exec(cell.source, names)


def turns_of(nb):
    """Yields (name of the check, the stub, the folded solution) for every "your turn" of a lesson."""
    for stub, turn, solution in zip(nb.cells, nb.cells[1:], nb.cells[2:], strict=False):
        asked = re.fullmatch(r"checks\.your_turn\(checks\.(check_\w+), (\w+)\)", turn.source)
        if asked:
            folded = re.search(
                r"<details><summary>Solution</summary>\n\n```python\n(.*?)```", solution.source, re.DOTALL
            )
            assert folded, f"{asked[1]}: expected a folded solution below the check"
            yield asked[1], *(defined(source, asked[2]) for source in (stub.source, folded[1]))


def defined(source, name):
    names = {}
    exec("import math\n\nimport torch\nfrom torch import nn\nfrom torch.nn import functional as F", names)
    exec(source, names)
    return names[name]


TURNS = {check: both for path in LESSONS for check, *both in turns_of(read(path))}
SOLVED = {check: answer for path in SOLUTIONS for check, answer in answers_of(read(path))}
SOLVED |= {check: solution for check, (_, solution) in TURNS.items()}
STUBS = {check: answer for path in SOLUTIONS for check, answer in answers_of(exercises.derive(read(path)))}
STUBS |= {check: stub for check, (stub, _) in TURNS.items()}


def changed(check, part, change):
    """An answer that differs from the solution's in one of its parts."""

    def answer(*inputs):
        right = list(SOLVED[check](*inputs))
        right[part] = change(right[part])
        return tuple(right)

    return answer


def each_mistake(lesson, mistakes):
    """Parametrises a test with `check, answer, hint`, out of check -> [(wrong answer, words of its hint), ...].

    Every check of the lesson needs one at least that does not come from the check itself.
    """
    own = {name for name in EACH_CHECK if getattr(checks, name).__module__.endswith(lesson)}
    assert own == set(mistakes), f"expected mistakes for each check of {lesson}"
    rows = [(check, *mistake) for check, given in mistakes.items() for mistake in given]
    return pytest.mark.parametrize(("check", "answer", "hint"), rows, ids=[f"{name}: {hint}" for name, _, hint in rows])


def assert_refused(check, answer, hint, capsys):
    """Fails unless the check refuses the answer with these words, and prints nothing."""
    with pytest.raises(CheckFailed, match=re.escape(hint)) as caught:
        getattr(checks, check)(answer)
    assert ": " in str(caught.value), "expected the input, then the message"
    assert "right" not in capsys.readouterr().out


def everything(model):
    return sum(p.numel() for p in model.parameters())
