"""The command `lorakit`: running lessons from handmade notebooks, refreshing them, the doctor, and fetching."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import lorakit
from lorakit import cli
from lorakit._optional import need
from lorakit.course import doctor, lessons, outputs, runner
from lorakit.merging import convert, export
from lorakit.models import download
from lorakit.tasks import tiny_model
from lorakit.tasks.sql import task as sql_task

PROFILES = {"laptop": "", "smoke": "all: {seed: 7}\n00_first: {steps: 2, rate: 2e-4}\n", "gpu": "all: {missing: 1}\n"}
BAR = """\
from lorakit._progress import Progress
with Progress(4, "training") as bar:
    for _ in range(4):
        bar.update(note="loss 0.5")
"""


def code(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def write_lesson(folder, stem, *cells):
    path = folder / f"{stem}.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A course of two lessons, the second of which fails, in the working directory."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    for name, text in PROFILES.items():
        (folder / "profiles" / f"{name}.yaml").write_text(text)
    write_lesson(
        folder,
        "00_first",
        new_markdown_cell("# First\n## Set up"),
        code(
            "steps = 60  # gradient steps\nrate = 0.1  # per step\nseed = 0  # number\nname = 'a'  # word", "parameters"
        ),
        new_markdown_cell("## Train"),
        code(BAR, "nbval-ignore-output"),
        code("import os, sys\nprint('steps', steps, 'rate', rate,\n      'seed', seed)", "headline"),
        code("print(sys.executable, os.environ['PYTHONHASHSEED'], os.path.basename(os.getcwd()))"),
    )
    write_lesson(
        folder, "01_second", code("seed = 0  # number", "parameters"), code("1 + 1\nassert seed < 0, 'too big'")
    )
    alien = tmp_path / "alien" / "kernels" / "python3"  # a kernel of the same name that belongs to something else
    alien.mkdir(parents=True)
    (alien / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "alien"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    return folder


def test_run_sets_parameters_shows_progress_and_keeps_copies(notebooks, capsys):
    before = {path: path.read_bytes() for path in notebooks.glob("*.ipynb")}
    assert cli.main(["run", "--profile", "smoke", "-p", "seed", "3"]) == 1  # the second lesson fails
    text = capsys.readouterr().out
    assert "[00_first] cell 2/5  Train" in text, "no line for a section"
    assert text.count("training ") == 1, "a bar is printed once where no line can be redrawn"
    assert "4/4 steps" in text
    assert "loss 0.5" in text
    table = {line.split()[0]: line for line in text.split("\nlesson ")[1].splitlines() if line.startswith("0")}
    assert table["00_first"].endswith("steps 2 rate 0.0002 seed 3"), "the headline, with the parameters set"
    assert " ok " in table["00_first"]
    assert "failed" in table["01_second"]
    assert float(table["00_first"].split()[3]) > 0, "no CPU seconds"
    for message in (
        "FAILED in cell 3",
        "assert seed < 0",
        "AssertionError: too big",
        "its copy: runs/smoke/01_second.ipynb",
    ):
        assert message in text
    assert "\x1b" not in text
    copy = nbformat.read("runs/smoke/00_first.ipynb", as_version=4)
    assert lessons.default_parameters(copy)["steps"] == 60, "the defaults stay in view beside the injected cell"
    assert copy.cells[-1].outputs[0].text.split() == [sys.executable, "0", "notebooks"]
    failed = nbformat.read("runs/smoke/01_second.ipynb", as_version=4)
    assert failed.cells[-1].outputs[0].output_type == "error"
    assert {path: path.read_bytes() for path in before} == before, "a run must not touch the lessons"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "00_frist"], "expected a lesson, got '00_frist'; near: 00_first"),
        (["run", "9"], "expected a lesson, got '9'; known: 00_first, 01_second"),
        (["run", "0", "-p", "step", "1"], "expected a parameter of 00_first, got 'step'; near: steps"),
        (["run", "0", "-p", "steps", "1O"], "expected int for steps of 00_first, got '1O'"),
        (["run", "0", "-p", "name", "2"], "expected str for name of 00_first, got 2"),
        (["run", "0", "1", "-p", "steps", "1"], "expected a parameter of 01_second, got 'steps'"),
        (["run", ""], "expected a lesson, got ''"),
        (["run", "0", "-p", "seed", "[1"], "expected YAML, got: while parsing a flow sequence"),
        (["run", "0", "-p", "seed", "2020-02-31"], "expected YAML, got: day is out of range"),
        (["run", "0", "-p", "seed", "[" * 5000], "expected YAML, got: "),
        (["run", "0", "--out", "notebooks/00_first.ipynb"], "Not a directory: 'notebooks/00_first.ipynb/laptop'"),
        (["run", "--profile", "labtop"], "expected a profile, got 'labtop'; near: laptop; also: gpu, smoke"),
        (["run", "--in-place", "--profile", "smoke"], "expected --in-place without"),
    ],
)
def test_what_is_misspelt_is_said_before_anything_runs(notebooks, capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("profile", ["[1", "5", "[all]", "{all: 5}", "{00_first: [1]}"])
def test_a_profile_that_is_none_is_said_in_one_line(notebooks, capsys, profile):
    (notebooks / "profiles" / "smoke.yaml").write_text(profile)
    assert cli.main(["run", "0", "--profile", "smoke"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lorakit: expected ")
    assert "smoke.yaml" in err
    assert err.count("\n") == 1


def test_lessons_are_named_by_number_stem_or_file(notebooks):
    names = [path.stem for path in lessons.select_lessons(["1", "00", "00_first", "01_second.ipynb"], notebooks)]
    assert names == ["01_second", "00_first", "00_first", "01_second"]


def test_parameters_come_from_the_profile_then_from_the_command(notebooks):
    path = notebooks / "00_first.ipynb"
    assert lessons.lesson_parameters(path, "laptop", {}) == {}
    assert lessons.lesson_parameters(path, "smoke", {"steps": 3}) == {"seed": 7, "steps": 3, "rate": 2e-4}
    assert lessons.lesson_parameters(path, "gpu", {}) == {}, "`all` holds only where a lesson has the parameter"
    assert lessons.lesson_parameters(path, "laptop", {"rate": 1}) == {"rate": 1}, "an int will do for a float"


def test_a_notebooks_folder_is_found_beside_the_package(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()  # somebody's own: no course in it
    monkeypatch.chdir(tmp_path)
    assert lessons.find_notebooks() != tmp_path / "notebooks"


def test_a_terminal_sees_one_line_redrawn(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    screen = runner.Screen(new_notebook(cells=[code("1")]), "00_first")
    screen.start_cell(code("1"))
    screen.bar("a", "training 1/2")
    screen.close("ok")
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert "\r[00_first] cell 1/1  training 1/2" in text
    assert text.endswith("\r[00_first] ok\n")


def test_a_long_bar_is_echoed_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    screen = runner.Screen(new_notebook(), "00_first")
    for clock[0] in range(100):
        screen.bar("a", f"training {clock[0]}/100")
    screen.end_cell()
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "31/100",
        "62/100",
        "93/100",
        "99/100",
    ]


@pytest.mark.long
def test_refresh_writes_clean_outputs_twice_the_same(notebooks):
    cells = [code("n = 2  # count", "parameters"), code(BAR, "nbval-ignore-output"), code("print(n)\nn")]
    path = write_lesson(notebooks, "00_first", *cells)
    ids = [cell.id for cell in cells]
    assert cli.main(["run", "--in-place", "00"]) == 0
    first = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3]
    assert [cell.id for cell in nb.cells] == ids
    assert nb.cells[1].outputs == [], "a progress bar is litter"
    assert [outputs.output_text(out) for out in nb.cells[2].outputs] == ["2\n", "2"]
    assert [set(cell.metadata) for cell in nb.cells] == [{"tags"}, {"tags"}, set()]
    assert nb.metadata.language_info == {"name": "python"}
    assert nb.metadata.kernelspec.name == "python3"
    assert cli.main(["run", "--in-place", "00"]) == 0
    assert path.read_bytes() == first


@pytest.mark.long
def test_refresh_saves_neither_litter_nor_a_failure(notebooks, capsys):
    litter = [
        "import sys",
        "sys.stderr.write('hm')",
        "print('/ho' + 'me/me/x')",
        BAR,
        "object()",
        "print('FutureWarning: x')",
    ]
    path = write_lesson(notebooks, "00_first", *map(code, litter))
    before = [file.read_bytes() for file in (path, notebooks / "01_second.ipynb")]
    assert cli.main(["run", "--in-place"]) == 1
    assert [file.read_bytes() for file in (path, notebooks / "01_second.ipynb")] == before
    said = capsys.readouterr().out
    for number, what in enumerate(
        ["stderr", "a machine path", "draws a progress bar", "a memory address", "a warning"], 2
    ):
        assert f"cell {number} {'' if what.startswith('draws') else 'shows '}{what}" in said


def test_doctor_reports_in_text_and_in_json(capsys):
    assert cli.main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"versions", "machine", "model", "speed", "missing", "traps"}
    assert report["versions"]["torch"]
    assert report["machine"]["cores"] >= 1
    assert cli.main(["doctor"]) == bool(report["missing"])
    text = capsys.readouterr().out
    assert "torch threads" in text
    assert "oneDNN" in text
    assert all(trap in text for trap in report["traps"])


SOUND = {
    "versions": {"bitsandbytes": "0.50"},
    "machine": {"cores": 4, "torch_threads": 4, "cpu_flags": "avx2", "free_memory_bytes": 9e9},
    "model": {"free_disk_bytes": 9e9},
}


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("machine", {"cpu_flags": "avx2 avx512_bf16"}, "AVX512-BF16"),
        ("machine", {"cpu_flags": "avx2 avx512_f"}, "whole number of blocks"),
        ("machine", {"torch_cuda_build": "12.9", "gpu": None}, "CUDA build"),
        ("machine", {"torch_threads": 1}, "1 of 4 cores"),
        ("machine", {"OMP_NUM_THREADS": "8"}, "more threads"),
        ("machine", {"HF_HUB_OFFLINE": "true"}, "HF_HUB_OFFLINE"),
        ("machine", {"system": "Linux x86_64"}, "GOMP_SPINCOUNT"),
        ("machine", {"free_memory_bytes": 1e9}, "memory"),
        ("model", {"free_disk_bytes": 1e9}, "base model is cached"),
    ],
)
def test_every_trap_is_found_where_it_is_set_and_only_there(section, change, word):
    assert doctor.find_traps(SOUND) == []
    (trap,) = doctor.find_traps(SOUND | {section: SOUND[section] | change})
    assert word in trap


def test_doctor_compares_versions_with_the_ranges(monkeypatch, capsys):
    asked = [
        "torch>=2.8",
        'lorakit[models]; extra == "course"',
        'transformers>=5.0; extra == "models"',
        'nbval; extra == "test"',
    ]
    installed = {"torch": "2.1.0", "lorakit": "0.1.0"}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(doctor, "_version", installed.get)
    assert doctor.check_requirements() == (["transformers>=5.0"], ["torch 2.1.0"])
    assert cli.main(["doctor"]) == 1
    assert "torch 2.1.0: outside the range" in capsys.readouterr().out


def test_fetch_prints_the_folder_and_passes_errors_on_as_one_line(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(download, "fetch_model", lambda name, verify: calls.append((name, verify)) or tmp_path)
    assert cli.main(["fetch"]) == 0
    assert cli.main(["fetch", "other", "--verify"]) == 0
    assert calls == [("smollm2", False), ("other", True)]
    assert capsys.readouterr().out == f"{tmp_path}\n" * 2
    monkeypatch.undo()
    assert cli.main(["fetch", "smolm2"]) == 2
    assert "got 'smolm2'; near: smollm2" in capsys.readouterr().err


WITHOUT = """
import sys
import lorakit, lorakit.cli
WANTS = {"nbformat": "run", "psutil": "exercises", "yaml": "sweep plan.yaml", "joblib": "sweep plan.yaml"}
for module, line in WANTS.items():
    sys.modules[module] = None
    print(lorakit.cli.main(line.split()), file=sys.stderr)
    del sys.modules[module]
sys.modules["joblib"] = None
try:
    lorakit.sweep
except ImportError as error:
    print(error, file=sys.stderr)
"""


def test_what_is_not_installed_is_named_with_its_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        *("lorakit: nbformat is needed: pip install 'lorakit[course]'", "2"),
        *("lorakit: psutil is needed: pip install 'lorakit[course]'", "2"),
        *("lorakit: yaml is needed: pip install 'lorakit[sweep]'", "2"),
        *("lorakit: joblib is needed: pip install 'lorakit[sweep]'", "2"),
        "joblib is needed: pip install 'lorakit[sweep]'",
    ]


def test_a_fault_of_lorakits_own_is_no_want_of_a_package():
    with pytest.raises(ImportError, match=r"No module named 'lorakit\.absent'"):
        need("lorakit.absent")


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", ""],
        ["pretrain", ""],
        ["sweep", ""],
        ["merge", "tiny", "", "--out", "new"],
        ["merge", "tiny", "adapter", "--out", ""],
        ["convert", "adapter", "--base", "tiny", ""],
        ["run", "--out", ""],
    ],
)
def test_an_empty_name_is_not_the_working_directory(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "got an empty name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/deep", "loop"])
@pytest.mark.parametrize("command", ["data", "pretrain", "merge", "convert"])
def test_what_cannot_be_written_is_found_before_the_work(command, place, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for module, name in (
        (sql_task, "generate"),
        (tiny_model, "pretrain"),
        (export, "load_model"),
        (convert, "load_model"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    merging = {
        "merge": ["tiny", "adapter", "--out", place],
        "convert": ["adapter", "--base", "tiny", "--rank", "2", place],
    }
    assert cli.main([command, *merging.get(command, [place])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorakit: ")
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_bytes() == b""


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lorakit {lorakit.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "lorakit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lorakit {lorakit.__version__}\n"


def test_the_command_line_does_not_import_what_it_does_not_need():
    source = (
        "import sys, lorakit.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('papermill' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(name in done.stdout for name in cli.COMMANDS)
