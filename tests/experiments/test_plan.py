"""A plan's function works in every process and leaves no trace in this one; what is wrong with a plan is one line."""

import json
import os
import pickle
import sys

import pytest

from lorakit import cli
from lorakit.experiments import ablation
from lorakit.experiments.plan import load_plan
from lorakit.experiments.records import frame
from lorakit.tasks.facts import facts

RUNS = """
import random
import tabnanny
from dataclasses import dataclass

from neighbour import OFFSET

@dataclass
class Point:
    x: int

def square(x):
    return {"y": Point(x).x ** 2 + OFFSET, "drawn": random.Random(0).randint(0, 9)}
"""


@pytest.fixture
def plan(tmp_path):
    for name in ("random", "tabnanny"):  # loaded long before, and not yet
        (tmp_path / f"{name}.py").write_text("raise ImportError('the plan has shadowed the standard library')\n")
    (tmp_path / "neighbour.py").write_text("OFFSET = 100\n")
    (tmp_path / "runs.py").write_text(RUNS)
    (tmp_path / "plan.yaml").write_text("function: runs.py:square\ngrid: {x: [1, 2, 3]}\njobs: 2\n")
    return tmp_path / "plan.yaml"


def test_a_plan_leaves_nothing_behind(plan):
    path, modules = list(sys.path), set(sys.modules)
    function = load_plan(plan).function
    assert function(x=2) == {"y": 104, "drawn": 6}
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if "runs" in name or name == "neighbour"}
    assert not hasattr(sys.modules["random"], "__path__")
    assert function.__qualname__ == "square"


def test_a_plan_beside_random_py_runs_in_two_processes(plan):
    assert cli.main(["sweep", str(plan)]) == 0
    found = frame(plan.parent / "plan")
    assert sorted(found.y) == [101, 104, 109]


def test_a_function_of_a_file_is_pickled_by_its_place(plan):
    again = pickle.loads(pickle.dumps(load_plan(plan).function))
    assert again(x=3) == {"y": 109, "drawn": 6}


def test_a_changed_file_is_read_again(plan):
    assert load_plan(plan).function(x=1)["y"] == 101
    (plan.parent / "runs.py").write_text(RUNS.replace("** 2", "+ 2"))
    os.utime(plan.parent / "runs.py", ns=(1, 1))
    assert load_plan(plan).function(x=1)["y"] == 103


@pytest.mark.parametrize(
    "text",
    [
        "grid: 5",
        "grid:",
        "grid: [1]",
        "grid: {a: [1]}\nfolder:",
        "grid: {a: [1]}\nfolder: [1]",
        "grid: {a: [1]}\ntogether: 3",
        "grid: {a: [1]}\ntogether: a",
        "grid: {a: [1]}\nat_once: x",
        "grid: {a: [1]}\nat_once: 0",
        "grid: {a: [1]}\njobs: true",
        "grid: {x: [1]}\njobs: " + "9" * 40,
        "grid: {x: [1]}\nfolder: ''",
        "grid: {x: [1]}\ntogether: [y]",
        "grid: {x: [.nan]}",
        "grid: {'': [1]}",
        "grid: {a: [1]}\n3: 4",
        "grid: " + "[" * 20_000,
    ],
)
def test_a_wrong_type_is_one_line(plan, capsys, text):
    plan.write_text(f"function: runs.py:square\n{text}")
    assert cli.main(["sweep", str(plan), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorakit: expected ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad.py", "def run(x:"),
        ("bad.py", "1 / 0"),
        ("bad.py", "import sys; sys.exit(3)"),
        ("bad.py", "raise RuntimeError('two\\nlines')"),
        ("bad.py", "run = 5"),
        ("..bad", ""),
        (".bad", ""),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(plan, capsys, name, text):
    (plan.parent / "bad.py").write_text(text)
    plan.write_text(f"function: {name}:run\ngrid: {{x: [1]}}")
    assert cli.main(["sweep", str(plan), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorakit: expected a function 'run' in bad" if text else "lorakit: expected ")
    assert error.count("\n") == 1


def test_a_missing_plan_is_said_plainly(tmp_path, capsys):
    assert cli.main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("lorakit: expected a plan, got no such file: ")


def test_a_task_is_looked_for_beside_its_plan(tmp_path, capsys, monkeypatch):
    (tmp_path / "plans" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "plans" / "plan.yaml"
    plan.write_text("function: lorakit.experiments.ablation:run\ngrid: {task: mine, steps: 2, lr: 1e-3}\n")
    assert cli.main(["sweep", str(plan), "--dry-run"]) == 2
    assert "train.jsonl" in capsys.readouterr().err
    rows = "".join(json.dumps({"prompt": f.prompt, "completion": f.completion}) + "\n" for f in facts(8))
    for part in ("train", "test"):
        (plan.parent / "mine" / f"{part}.jsonl").write_text(rows)
    assert cli.main(["sweep", str(plan), "--dry-run"]) == 0
    assert cli.main(["sweep", str(plan)]) == 0
    assert frame(tmp_path / "plans" / "plan").task.tolist() == ["mine"], "no folder of this machine in the record"
    plan.write_text("function: lorakit.experiments.ablation:runs\ngrid: {task: mine, seed: [0, 1]}\ntogether: [seed]\n")
    found = load_plan(plan).function([{"task": "mine", "seed": seed, "steps": 2} for seed in (0, 1)])
    assert len(found) == 2


def test_other_tasks_need_no_folder(tmp_path):
    (tmp_path / "plan.yaml").write_text("function: lorakit.experiments.ablation:run\ngrid: {task: [facts, sql]}\n")
    assert load_plan(tmp_path / "plan.yaml").function is ablation.run
