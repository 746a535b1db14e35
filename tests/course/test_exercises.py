"""Notebooks of exercises are current, whole and clean; they are generated from their solutions."""

import copy
import re
import subprocess
import sys
from itertools import takewhile

import nbformat
import pytest
from helpers.exercises import NOTEBOOKS, SOLUTIONS, is_measured, read
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lorakit import cli
from lorakit.course import exercises, lessons, outputs

each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


# ---- the notebooks ----


@each_solution
def test_exercises_are_current(path):
    written = (NOTEBOOKS / "exercises" / path.name).read_bytes()
    assert written == exercises.render(path), "run `lorakit exercises`"


def test_every_notebook_of_exercises_has_solutions_and_a_lesson_number():
    names = {path.name for path in SOLUTIONS}
    assert names == {path.name for path in (NOTEBOOKS / "exercises").glob("*.ipynb")}
    assert len({name[:2] for name in names}) == len(names) >= 2


def test_a_cells_lines_end_at_a_newline_alone():
    source = 'text = "a\u2028b\x0cc\x85"\n# --- solution\nx = 1\n# --- end'
    assert exercises.stub_source(source).startswith('text = "a\u2028b\x0cc\x85"\n')


@each_solution
def test_exercises_are_whole(path):
    nb = read(NOTEBOOKS / "exercises" / path.name)
    nbformat.validate(nb)
    prose = [cell for cell in nb.cells if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    assert 3 <= len(prose) <= 6
    levels = []
    for task in prose:
        level, minutes = re.search(r"Difficulty (\d) of 3, about (\d+) minutes", task.source).groups()
        levels.append(int(level))
        assert 5 <= int(minutes) <= 30
        fold = r"<details><summary>{}</summary>\n\n.+\n\n</details>"
        folds = fold.format("Hint") + r"\n\n" + fold.format("Common mistake") + r"\Z"
        assert re.search(folds, task.source, re.DOTALL), "expected a hint, then a common mistake, both folded"
        below = nb.cells[nb.cells.index(task) + 1 :]
        stubs = list(takewhile(lambda cell: not cell.source.startswith("checks.check_"), below))
        assert 1 <= len(stubs) <= 2, "expected a function or two, then the check"
        assert all(cell.cell_type == "code" and 3 <= len(cell.source.splitlines()) <= 20 for cell in stubs)
    assert levels == sorted(levels), "expected rising difficulty"
    assert "# ---" not in "".join(cell.source for cell in nb.cells), "a mark was left"


@each_solution
def test_committed_solutions_are_one_clean_run(path):
    nb = read(path)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert outputs.find_litter(nb) == []
    tidy = copy.deepcopy(nb)
    assert outputs.clean(tidy) == []
    assert tidy == nb, "run `lorakit exercises --refresh`"
    for cell in code:
        if cell.source.startswith("checks."):
            assert "".join(map(outputs.output_text, cell.outputs)).startswith("right: ")


@pytest.mark.slow
@each_solution
def test_solutions_run(path, tmp_path):
    result = lessons.run_lesson(path, {}, tmp_path / path.name)
    assert not result.error
    assert result.wall_seconds < 300
    fresh, committed = read(result.path), read(path)
    for new, old in zip(fresh.cells, committed.cells, strict=True):
        assert is_measured(old) or new.get("outputs") == old.get("outputs")


@pytest.mark.slow
@each_solution
def test_an_exercise_fails_with_a_message_and_no_traceback(path, tmp_path):
    result = lessons.run_lesson(NOTEBOOKS / "exercises" / path.name, {}, tmp_path / path.name)
    assert result.error.startswith("NotWritten: not written yet")
    (failed,) = [out for cell in read(result.path).cells for out in cell.get("outputs", []) if "traceback" in out]
    assert failed.traceback == ["CheckFailed: not written yet: your turn"]


# ---- the generator ----


SOURCE = """\
def f(x):
    y = 2 * x
    # --- solution
    return y + 1
    # --- stub
    # if y:
    #     return y  # wrong
    #
    # --- end


def g():
    # --- solution
    return 1
    # --- end"""
STUB = """\
def f(x):
    y = 2 * x
    if y:
        return y  # wrong



def g():
    raise NotImplementedError("your turn")"""


def test_a_region_becomes_its_stub():
    assert exercises.stub_source(SOURCE) == STUB
    assert exercises.stub_source("x = 1  # --- solution in words") == "x = 1  # --- solution in words"


@pytest.mark.parametrize(
    ("marks", "got"),
    [
        (["# --- end"], "got '# --- end'"),
        (["# --- solution", "# --- solution", "# --- end"], "got '# --- solution'"),
        (["# --- stub", "# --- end"], "got '# --- stub'"),
        (["# --- solution"], "got the end of the cell"),
        (["# --- solution", "# --- stub"], "got the end of the cell"),
    ],
)
def test_marks_out_of_order_are_refused(marks, got):
    with pytest.raises(ValueError, match=got):
        exercises.stub_source("\n".join(marks))


def test_derived_notebooks_keep_ids_and_lose_outputs_and_answers(tmp_path, monkeypatch, capsys):
    cells = [
        new_markdown_cell("# Title"),
        new_markdown_cell("**Why.**", metadata={"tags": ["solution"]}),
        new_code_cell("def f():\n    # --- solution\n    return 1\n    # --- end"),
        new_code_cell("print(f())"),
    ]
    for folder in ("profiles", "solutions"):
        (tmp_path / "notebooks" / folder).mkdir(parents=True)
    path = tmp_path / "notebooks" / "solutions" / "07_x.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["exercises", "--refresh"]) == 0
    assert "07_x" in capsys.readouterr().out
    solved, derived = read(path), read(tmp_path / "notebooks" / "exercises" / path.name)
    assert solved.cells[3].outputs[0].text == "1\n"
    assert [cell.id for cell in derived.cells] == [cells[i].id for i in (0, 2, 3)]
    assert derived.cells[1].source == 'def f():\n    raise NotImplementedError("your turn")'
    assert all(cell.outputs == [] and cell.execution_count is None for cell in derived.cells[1:])
    path.write_text(path.read_text().replace("return 1", "return 1 / 0"))
    assert cli.main(["exercises", "--refresh"]) == 1, "a solution that fails is not saved"


def test_exercises_are_in_style():
    folders = [NOTEBOOKS / "exercises", NOTEBOOKS / "solutions"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *folders], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
