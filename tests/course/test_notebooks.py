"""The laws of a lesson, and each lesson run on a tiny model; `make test` also replays committed outputs."""

import ast
import copy
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest
import transformers
from helpers.tiny_llama import save_tiny_llama
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import lorakit
from lorakit.course import lessons, outputs

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PROFILES = sorted((NOTEBOOKS / "profiles").glob("*.yaml"))
TAGS = {"parameters", "headline", "nbval-ignore-output"}
SMOKE_SECONDS = 300.0  # finds what does not end; how long a lesson takes depends on the machine
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.mark.slow
@each_lesson
def test_a_lesson_runs_on_a_tiny_model_with_other_settings(path, tiny_llama, tmp_path):
    defaults = lessons.default_parameters(nbformat.read(path, as_version=4))
    others = {"model_name": str(tiny_llama), "rank": 64, "seed": 7}
    if defaults["model_name"] == "tiny":
        del others["model_name"]
    others = {name: value for name, value in others.items() if name in defaults}
    result = lessons.run_lesson(path, lessons.lesson_parameters(path, "smoke", others), tmp_path / path.name)
    assert not result.error
    assert result.wall_seconds < SMOKE_SECONDS


@pytest.mark.parametrize("name", ["tiny", "a GPT-2"])  # one cannot read the questions, the other has other layers
def test_lesson_01_says_in_one_line_which_models_it_takes(name):
    def load(name, device):
        sizes = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)
        return (transformers.GPT2LMHeadModel(sizes), None) if name == "a GPT-2" else lorakit.load_model(name)

    (cell,) = (c for c in code_cells(nbformat.read(LESSONS[1], as_version=4)) if "load_model(model_name" in c.source)
    with pytest.raises(ValueError, match=f"^expected smollm2, or a model with layers q_proj and k_proj.*got {name}$"):
        exec(cell.source, {"lorakit": lorakit, "load_model": load, "model_name": name, "device": "cpu"})


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_names_lessons_and_parameters_that_are_there(profile):
    settings = lessons.read_yaml(profile.read_text(encoding="utf-8")) or {}
    assert set(settings) <= {"all", *(path.stem for path in LESSONS)}
    for path in LESSONS:
        lessons.lesson_parameters(path, profile.stem, {})
    assert settings == {} or profile.stem != "laptop", "the laptop profile is the lessons' own defaults"


# ---- laws: each takes a notebook and asserts ----


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def prose(nb):
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def tagged(nb, tag):
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


def parameters_are_literals_with_units(nb):
    (cell,) = tagged(nb, "parameters")
    assert lessons.default_parameters(nb)
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+ = .+  # \w.*", line), f"expected `name = literal  # unit`, got {line!r}"


def tags_are_known(nb):
    used = {tag for cell in nb.cells for tag in cell.metadata.get("tags", [])}
    assert used <= TAGS, f"{sorted(used - TAGS)}: a slip, or a tag that papermill and nbval do not both obey"


def code_cells_are_small(nb):
    lines = [len(cell.source.splitlines()) for cell in code_cells(nb)]
    assert min(lines) >= 1, "an empty code cell"
    assert max(lines) <= 20
    assert median(lines) <= 8


def prose_is_neither_thin_nor_long(nb):
    open_text = re.sub(r"<details>.*?</details>", "", prose(nb), flags=re.DOTALL)  # what is folded is read on demand
    assert 500 <= len(open_text.split()) <= 2050  # nine studies need the most


def outputs_come_from_one_clean_run(nb):
    assert [cell.execution_count for cell in code_cells(nb)] == list(range(1, len(code_cells(nb)) + 1))
    assert outputs.find_litter(nb) == []
    tidy = copy.deepcopy(nb)
    assert outputs.clean(tidy) == []
    assert tidy == nb, "expected outputs saved by `make outputs`"


def cells_have_ids(nb):
    assert (nb.nbformat, nb.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    nbformat.validate(nb)


def images_are_local(nb):
    texts = [prose(nb)] + [outputs.output_text(output) for cell in code_cells(nb) for output in cell.outputs]
    assert not re.search(r"!\[[^\]]*\]\(\s*https?:|<img[^>]+src\s*=\s*.?https?:", "\n".join(texts))


def a_lesson_has_its_parts(nb):
    headings = re.findall(r"^#+ +(.+)", prose(nb), re.MULTILINE)
    assert nb.cells[0].source.startswith("# ")
    assert re.search(r"\byou will\b", prose(nb), re.IGNORECASE)
    assert any("what we found" in heading.lower() for heading in headings[-3:]), (
        "only exercises and next lesson may follow"
    )


def a_headline_is_printed(nb):
    assert len(tagged(nb, "headline")) == 1
    assert outputs.headline(nb)


def conclusions_are_claimed_at_the_defaults(nb):
    texts = [outputs.output_text(output) for cell in code_cells(nb) for output in cell.outputs]
    assert "with these settings:" not in "\n".join(texts), "an `expect` that only says whether it holds"


def nothing_is_left_to_do(nb):
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", "\n".join(cell.source for cell in nb.cells))


READ = {"outcome", "decided", "smallest"}  # of a verdict, whose flags are lost when this alone is read off it


def mentions(node, names):
    inside = list(ast.walk(node))
    return any(isinstance(each, ast.Attribute) and each.attr in READ for each in inside) or any(
        isinstance(each, ast.Name) and each.id in names for each in inside
    )


def conclusions_keep_their_flags(nb):
    """No assertion rests on what was read off a verdict; `expect(verdict.says(outcome), sentence)` sees its flags."""
    nodes = [node for cell in code_cells(nb) for node in ast.walk(ast.parse(cell.source))]
    bare: set[str] = set()  # names that hold an outcome without its flags, and functions that return one
    for _ in range(3):  # from name to name
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(each, ast.Return) and each.value and mentions(each.value, bare) for each in ast.walk(node)
            ):
                bare.add(node.name)
            elif isinstance(node, ast.Assign | ast.NamedExpr | ast.AugAssign) and mentions(node.value, bare):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                bare |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    for node in nodes:
        told = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "expect"
        if isinstance(node, ast.Assert) or (told and node.args):
            claim = node.test if isinstance(node, ast.Assert) else node.args[0]
            assert not mentions(claim, bare), f"expected `verdict.says(...)` in `expect`, got {ast.unparse(node)}"


LAWS = [
    parameters_are_literals_with_units,
    tags_are_known,
    code_cells_are_small,
    prose_is_neither_thin_nor_long,
    outputs_come_from_one_clean_run,
    cells_have_ids,
    images_are_local,
    a_lesson_has_its_parts,
    a_headline_is_printed,
    conclusions_are_claimed_at_the_defaults,
    conclusions_keep_their_flags,
    nothing_is_left_to_do,
]


@each_lesson
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_lesson_keeps_the(law, path):
    law(nbformat.read(path, as_version=4))


OWN_RULES = {"difference", "ttest_ind", "ttest_rel", "dunnett"}


@each_lesson
def test_a_lesson_decides_by_the_one_rule(path):
    """Comparisons are `compare`'s, `compare_all`'s and `tune`'s: other rules know no flags."""
    nodes = [node for cell in code_cells(nbformat.read(path, 4)) for node in ast.walk(ast.parse(cell.source))]
    taken = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not taken & OWN_RULES


# ---- the laws themselves: a lesson that keeps them all, and what breaks each ----


def exemplary_lesson():
    text = "word " * 500
    cells = [
        new_markdown_cell("# Title\nYou will see."),
        new_code_cell("steps = 60  # gradient steps", metadata={"tags": ["parameters"]}, execution_count=1),
        new_markdown_cell(f"## What we found\n{text}"),
        new_code_cell("print('fine')", metadata={"tags": ["headline"]}, execution_count=2),
    ]
    cells[3].outputs = [new_output("stream", name="stdout", text="fine\n")]
    nb = new_notebook(cells=cells)
    outputs.clean(nb)
    return nb


def source(index, text):
    def change(nb):
        nb.cells[index].source = text

    return change


def said(index, text, name="stdout"):
    return lambda nb: nb.cells[index].outputs.append(new_output("stream", name=name, text=text))


BREAKS = [
    (parameters_are_literals_with_units, source(1, "steps = 60")),
    (parameters_are_literals_with_units, source(1, "steps = 6 * n  # gradient steps")),
    (parameters_are_literals_with_units, lambda nb: nb.cells[1].metadata.tags.clear()),
    (tags_are_known, lambda nb: nb.cells[3].metadata.tags.append("raises-exception")),
    (code_cells_are_small, source(3, "1\n" * 21)),
    (code_cells_are_small, source(3, "1\n" * 17)),
    (prose_is_neither_thin_nor_long, source(2, "## What we found\nlittle")),
    (prose_is_neither_thin_nor_long, source(2, "word " * 2051)),
    (outputs_come_from_one_clean_run, lambda nb: nb.cells[3].update(execution_count=3)),
    (outputs_come_from_one_clean_run, lambda nb: nb.cells[3].update(execution_count=None)),
    (outputs_come_from_one_clean_run, lambda nb: nb.metadata.kernelspec.update(name="my-venv")),
    (outputs_come_from_one_clean_run, lambda nb: nb.cells[3].metadata.update(collapsed=True)),
    (
        outputs_come_from_one_clean_run,
        lambda nb: nb.cells[3].outputs.append(new_output("error", ename="E")),
    ),
    (outputs_come_from_one_clean_run, said(3, "a word", name="stderr")),
    (outputs_come_from_one_clean_run, said(3, "C:\\data")),
    (outputs_come_from_one_clean_run, said(3, "lib/site-packages/x.py")),
    (outputs_come_from_one_clean_run, said(3, "FutureWarning: x")),
    (outputs_come_from_one_clean_run, said(3, "saved 2031-01-02 03:04")),
    (outputs_come_from_one_clean_run, said(3, " 50%|#####     | 1/2")),
    (cells_have_ids, lambda nb: nb.cells[3].update(id=nb.cells[1].id)),
    (images_are_local, source(2, "![a plot](https://example.org/a.png)")),
    (images_are_local, source(2, '<img width="3" src="https://example.org/a.png">')),
    (a_lesson_has_its_parts, source(0, "Title. You will see.")),
    (a_lesson_has_its_parts, source(0, "# Title")),
    (a_lesson_has_its_parts, source(2, "## What we found\n## A\n## B\n## C")),
    (a_headline_is_printed, lambda nb: nb.cells[3].outputs.clear()),
    (conclusions_are_claimed_at_the_defaults, said(3, "holds with these settings: ranks differ")),
    (conclusions_keep_their_flags, source(3, 'assert verdict.outcome == "higher"')),
    (conclusions_keep_their_flags, source(3, 'expect(verdict.decided, "it is higher", here=True)')),
    (conclusions_keep_their_flags, source(3, 'said = [each.outcome for each in found]\nassert said[0] == "higher"')),
    (conclusions_keep_their_flags, source(3, "def decide(v):\n    return v.outcome\n\n\nassert decide(found)")),
    (nothing_is_left_to_do, source(2, "TO" + "DO: write this")),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_an_exemplary_lesson_keeps_the(law):
    law(exemplary_lesson())


@pytest.mark.parametrize(("law", "change"), BREAKS, ids=[f"{law.__name__}-{i}" for i, (law, _) in enumerate(BREAKS)])
def test_a_broken_lesson_is_caught_by(law, change):
    nb = exemplary_lesson()
    change(nb)
    with pytest.raises((AssertionError, ValueError, nbformat.ValidationError)):
        law(nb)
