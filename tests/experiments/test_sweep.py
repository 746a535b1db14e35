"""A sweep makes the missing runs and no others, whatever happens to it in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import psutil
import pytest

from lorakit import cli
from lorakit.experiments.plan import load_plan
from lorakit.experiments.records import expand, frame, read_record, read_records, record_path, survey, write_record
from lorakit.experiments.sweep import sweep

GRID = {"x": [1, 2, 3], "seed": range(2)}

THREADS_AT_FIRST = os.environ.get("OMP_NUM_THREADS")


def square(x, seed):
    return {"y": x * x + seed, "losses": [1.0, 0.5]}


# ---- grids and records ----


def test_a_grid_is_all_combinations_each_once():
    assert expand({"a": [1, 2], "b": "text", "c": (None, True)}) == [
        {"a": a, "b": "text", "c": c} for a in (1, 2) for c in (None, True)
    ]
    assert expand([{"a": [1, 2]}, {"a": 2, "b": [0.5]}, {"a": 1}]) == [{"a": 1}, {"a": 2}, {"a": 2, "b": 0.5}]
    assert expand({"targets": [["q", "v"], "all"]}) == [{"targets": ["q", "v"]}, {"targets": "all"}]
    assert expand({"a": ((1, 2),)}) == [{"a": [1, 2]}]


@pytest.mark.parametrize("grid", [{}, [], {"a": []}, {"a": [{1, 2}]}, {"a": [float("nan")]}, {1: [2]}])
def test_what_is_no_grid_is_refused(grid):
    with pytest.raises(ValueError, match="expected"):
        expand(grid)


def test_a_record_is_named_by_its_settings_whatever_their_order(tmp_path):
    assert record_path(tmp_path, {"a": 1, "b": 2.5}) == record_path(tmp_path, {"b": 2.5, "a": 1})
    assert record_path(tmp_path, {"a": 1}) != record_path(tmp_path, {"a": 1.0})


def test_runs_become_records_and_a_tidy_frame(tmp_path):
    found = sweep(square, GRID, tmp_path, command="make sweep", show=False)
    assert found[["x", "seed", "y"]].values.tolist() == [[x, s, x * x + s] for x in (1, 2, 3) for s in (0, 1)]
    assert set(found.error) == {""}
    record = json.loads(record_path(tmp_path, {"x": 2, "seed": 1}).read_text())
    assert record["result"] == {"y": 5, "losses": [1.0, 0.5]}
    assert record["settings"] == {"x": 2, "seed": 1}
    assert record["function"] == "square"
    assert record["command"] == "make sweep"
    assert {"python", "torch", "lorakit"} <= set(record["versions"])
    assert record["seconds"] >= 0
    assert record["device"]
    assert record["threads"] >= 1
    assert len(frame(tmp_path)) == 6
    assert len(frame(tmp_path, expand({"x": 1, "seed": [0, 7]}))) == 1


def test_only_missing_runs_are_made(tmp_path):
    made = []

    def run(x, seed):
        made.append((x, seed))
        return {"y": x}

    sweep(run, {"x": [1, 2], "seed": 0}, tmp_path, show=False)
    sweep(run, GRID, tmp_path, show=False)
    assert sorted(made) == [(x, seed) for x in (1, 2, 3) for seed in (0, 1)]
    assert str(survey(tmp_path, expand(GRID))) == "6 runs done, 0 failed, 0 to make"


def test_numbers_of_numpy_and_torch_are_plain_in_the_record(tmp_path):
    import numpy as np
    import torch

    def run(x):
        return {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": float("inf")}

    assert sweep(run, {"x": [1]}, tmp_path, show=False).iloc[0][["a", "b", "c"]].tolist() == [0.5, [1, 2], float("inf")]


def test_a_failed_run_is_recorded_and_tried_again_only_on_request(tmp_path):
    broken = True

    def run(x):
        if x == 2 and broken:
            raise RuntimeError("no luck")
        return {"y": x}

    grid = {"x": [1, 2, 3]}
    found = sweep(run, grid, tmp_path, show=False)
    assert found.y.tolist()[::2] == [1, 3]
    assert "RuntimeError: no luck" in found.error[1]
    broken = False
    assert sweep(run, grid, tmp_path, show=False).error[1]
    assert survey(tmp_path, expand(grid)).failed == 1
    assert sweep(run, grid, tmp_path, retry=True, show=False).y.tolist() == [1, 2, 3]


@pytest.mark.parametrize("together", [(), ("x",)])
def test_a_run_that_exits_has_failed_alone_and_one_that_is_stopped_stops_all(tmp_path, together):
    def run(*settings, **setting):
        for each in settings[0] if settings else [setting]:
            if each["x"] == 2:
                raise stop
        return [{"y": each["x"]} for each in settings[0]] if settings else {"y": setting["x"]}

    stop = SystemExit("bad setting")
    found = sweep(run, {"x": [1, 2, 3]}, tmp_path, together=together, show=False)
    assert found.y.tolist()[::2] == [1, 3]
    assert "SystemExit: bad setting" in found.error[1]
    stop = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(run, {"x": [4, 2, 5]}, tmp_path, together=together, retry=True, show=False)
    assert "SystemExit" in frame(tmp_path, [{"x": 2}]).error[0]


def test_rows_are_ordered_by_their_settings(tmp_path):
    for setting in expand([{"arm": ["b", "a"], "lr": [1e-2, 3e-3, 2]}, {"arm": "a", "lr": None}]):
        write_record(tmp_path, setting, result={}, error="", seconds=1.0, device="none")
    found = [(record["settings"]["arm"], record["settings"]["lr"]) for record in read_records(tmp_path)]
    assert found == [(arm, lr) for arm in "ab" for lr in (3e-3, 1e-2, 2, None)][:-1]
    assert frame(tmp_path).arm.tolist() == [arm for arm, _ in found]
    assert read_records(tmp_path)[0]["device"] == "none"


def test_seconds_that_nobody_noted_are_no_guide(tmp_path):
    write_record(tmp_path, {"x": 1}, result={"y": 1}, error="", seconds=None)
    state = survey(tmp_path, expand({"x": [1, 2]}))
    assert str(state) == "1 runs done, 0 failed, 1 to make"
    assert frame(tmp_path).seconds.isna().all()


@pytest.mark.parametrize(
    "result", [None, {"x": 1}, {"error": 1}, {"seconds": 1}, {"y": object()}], ids=["none", "x", "error", "s", "object"]
)
def test_a_result_that_cannot_be_recorded_is_a_failed_run(tmp_path, result):
    assert "expected" in sweep(lambda x: result, {"x": [1]}, tmp_path, show=False).error[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "renamed", "nested"])
def test_a_damaged_record_is_set_aside_reported_and_made_again(tmp_path, damage, capsys):
    whole = sweep(square, GRID, tmp_path, show=False)
    path, other = (record_path(tmp_path, {"x": 2, "seed": seed}) for seed in (0, 1))
    text = path.read_text()
    path.write_text(
        {
            "cut": text[:80],
            "flipped": text.replace('"y": 4', '"y": 5'),
            "empty": "",
            "renamed": text,
            "nested": "[" * 100_000,
        }[damage]
    )
    if damage == "renamed":
        os.replace(path, other)  # another run's name
        path = other
    assert read_record(path) is None
    again = sweep(square, GRID, tmp_path, show=False)
    assert "set aside" in capsys.readouterr().out
    assert path.with_suffix(".damaged").exists()
    assert again[["x", "seed", "y"]].equals(whole[["x", "seed", "y"]])


# ---- several runs in a call ----


def test_runs_that_are_alike_are_made_in_one_call(tmp_path):
    calls = []

    def run(settings):
        calls.append(settings)
        return [{"y": s["x"] * s["seed"]} for s in settings]

    grid = {"task": ["a", "b"], "x": [1, 2, 3], "seed": [0, 1]}
    found = sweep(run, grid, tmp_path, together=["x", "seed"], at_once=4, show=False)
    assert [len(call) for call in calls] == [4, 2, 4, 2]
    assert all(len({s["task"] for s in call}) == 1 for call in calls)
    assert found.y.tolist() == [x * seed for _ in "ab" for x in (1, 2, 3) for seed in (0, 1)]
    for wrong in (["ranks"], "x"):
        with pytest.raises(ValueError, match=r"expected .*parameters"):
            sweep(run, grid, tmp_path, together=wrong, show=False)


def test_of_runs_in_one_call_only_the_culprit_fails(tmp_path):
    def run(settings):
        return [{"y": 1 / s["x"]} for s in settings]

    found = sweep(run, {"x": [2, 0, 4]}, tmp_path, together=["x"], show=False)
    assert found.y.tolist()[::2] == [0.5, 0.25]
    assert "ZeroDivisionError" in found.error[1]


# ---- plans ----

RUNS = """
from pathlib import Path

def square(x, seed=0):
    if x < 0:
        raise ValueError("negative")
    return {"y": x * x}

def squares(settings):
    return [square(**setting) for setting in settings]
"""


def write_plan(folder, text):
    (folder / "runs.py").write_text(RUNS)
    (folder / "plan.yaml").write_text(text)
    return str(folder / "plan.yaml")


def test_the_command_makes_a_plan_and_says_what_it_costs(tmp_path, capsys, monkeypatch):
    plan = write_plan(tmp_path, "function: runs.py:square\ngrid: {x: [1, 2], lr: 1e-3}\nfolder: out\n")
    with pytest.raises(SystemExit):
        cli.main(["sweep"])
    assert cli.main(["sweep", plan, "--dry-run"]) == 0
    assert "0 runs done, 0 failed, 2 to make" in capsys.readouterr().out
    assert cli.main(["sweep", plan]) == 1  # square has no lr
    assert "unexpected keyword" in capsys.readouterr().out
    plan = write_plan(tmp_path, "function: runs.py:square\ngrid: [{x: [1, 2]}, {x: 3, seed: [1, 2]}]\nfolder: out\n")
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main(["sweep", plan]) == 0
    assert "4 runs done" in capsys.readouterr().out
    assert sorted(frame(tmp_path / "out", expand({"x": 3, "seed": [1, 2]})).y) == [9, 9]
    assert load_plan(plan).settings[2] == {"x": 3, "seed": 1}


def test_a_folder_without_records_is_an_empty_frame(tmp_path):
    assert (frame(tmp_path / "nothing").error == "").all()


def test_several_plans_are_made_anew_elsewhere_at_a_known_cost(tmp_path, capsys):
    grids = {"a": "{x: [1, 2, 3]}", "b": "{x: 4, seed: [0, 1]}"}
    (tmp_path / "runs.py").write_text(RUNS)
    for name, grid in grids.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yaml").write_text(f"function: runs.py:square\ngrid: {grid}\n")
        for setting in load_plan(tmp_path / f"{name}.yaml").settings[:2]:
            write_record(tmp_path / name, setting, result={"y": 0}, error="", seconds=60.0 * setting["x"])
    plans = [str(tmp_path / f"{name}.yaml") for name in grids]
    command = ["sweep", *plans, "--into", str(tmp_path / "anew")]
    assert cli.main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a.yaml: 0 runs done, 0 failed, 3 to make, about 4 min one after the other"  # 1, 2 and the median
    assert out[1] == "b.yaml: 0 runs done, 0 failed, 2 to make, about 8 min one after the other"
    assert not (tmp_path / "anew").exists()
    assert cli.main(command) == 0
    assert frame(tmp_path / "anew" / "a").y.tolist() != [0, 0]
    assert len(frame(tmp_path / "anew" / "b")) == len(frame(tmp_path / "b")) == 2
    assert cli.main(["sweep", plans[0], str(tmp_path / "no.yaml"), "--into", str(tmp_path / "late")]) == 2
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("folder", "options"), [("file", []), ("file/deep", []), ("good", ["--jobs", "0"]), ("good", ["--jobs", "9" * 40])]
)
def test_what_cannot_be_is_found_before_the_first_plans_runs(tmp_path, capsys, folder, options):
    (tmp_path / "runs.py").write_text(RUNS)
    (tmp_path / "file").touch()
    for name, place in (("a", "first"), ("b", folder)):
        (tmp_path / f"{name}.yaml").write_text(f"function: runs.py:square\ngrid: {{x: 1}}\nfolder: {place}\n")
    assert cli.main(["sweep", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list((tmp_path / "first").glob("*.json"))


def test_a_sweep_clears_the_drafts_of_killed_ones(tmp_path):
    dead = tmp_path / f".x.json.{'0' * 32}.lorakit.tmp"
    dead.mkdir()
    setting = {"x": 1, "seed": 0}
    sweep(square, setting, tmp_path, show=False)
    assert {path.name for path in tmp_path.iterdir()} == {".locks", record_path(tmp_path, setting).name}


@pytest.mark.long
def test_a_plan_may_take_runs_together_and_in_processes(tmp_path):
    plan = write_plan(
        tmp_path,
        "function: runs.py:squares\ngrid: {x: [1, 2, 3]}\nfolder: out\ntogether: [x]\nat_once: 2\njobs: 2\n",
    )
    assert cli.main(["sweep", plan]) == 0
    assert frame(tmp_path / "out").y.sum() == 14


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "mapping"),
        ("grid: {x: 1}", "function"),
        ("function: runs.py:square\ngrid: {x: 1}\nfoldr: out", "foldr"),
        ("function: runs.py:cube\ngrid: {x: 1}", "cube"),
        ("function: nothing.py:cube\ngrid: {x: 1}", "nothing.py"),
        ("function: square\ngrid: {x: 1}", "module:name"),
        ("function: no_such_module:f\ngrid: {x: 1}", "no_such_module"),
        ("function: runs.py:square\ngrid: {x: []}", "at least one value"),
        ("function: [", "YAML"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(tmp_path, capsys, text, word):
    assert cli.main(["sweep", write_plan(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["plan.yaml", "runs.py"]


# ---- processes ----

PROGRAM = """
import os, sys, time
from lorakit.experiments.sweep import sweep

def run(x):
    time.sleep(0.03)
    with open(sys.argv[2], "a") as log, open(f"{sys.argv[2]}.pids", "a") as pids:
        log.write(f"{x}\\n")
        pids.write(f"{os.getpid()}\\n")
    return {"y": x}

sweep(run, {"x": range(60)}, sys.argv[1], jobs=int(sys.argv[3]), show=False)
"""


def start(folder, log, jobs=1):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(log), str(jobs)], start_new_session=True)


@pytest.mark.slow
def test_killed_at_twenty_moments_it_loses_nothing_that_was_finished(tmp_path):
    log, folder, draw = tmp_path / "log", tmp_path / "records", random.Random(0)
    kept, kills = {}, 0
    for _ in range(20):
        process = start(folder, log)
        deadline = time.monotonic() + 60
        while not folder.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        before = len(list(folder.glob("*.json")))
        while len(list(folder.glob("*.json"))) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path, content in kept.items():
            assert path.read_bytes() == content
        kept = {path: path.read_bytes() for path in folder.glob("*.json")}
        assert all(read_record(path) for path in kept)
    assert kills == 20
    assert len(kept) < 60
    start(folder, log).wait(60)
    found = frame(folder)
    assert sorted(found.x) == list(range(60))
    assert len(log.read_text().splitlines()) <= 60 + kills  # at most the run in flight was made twice
    assert not survey(folder, expand({"x": range(60)})).damaged


@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_runs(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "records"
    both = [start(folder, log), start(folder, log)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(60))
    assert sorted(frame(folder).x) == list(range(60))


@pytest.mark.slow
def test_processes_of_joblib(tmp_path):
    log = tmp_path / "log"
    assert start(tmp_path / "records", log, jobs=2).wait(120) == 0
    assert sorted(map(int, log.read_text().split())) == list(range(60))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="asks for the parent")
def test_workers_end_with_a_sweep_that_is_killed(tmp_path):
    log = tmp_path / "log"
    process = start(tmp_path / "records", log, jobs=2)
    deadline = time.monotonic() + 60
    pids = Path(f"{log}.pids")
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = pids.read_text().split()
    workers = [each for each in psutil.Process(process.pid).children() if str(each.pid) in begun]
    process.kill()  # it alone, not its group
    process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=10)[1]


def slow_square(x, folder):
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(0.2)
    return {"y": x * x}


@pytest.mark.slow
def test_a_dask_cluster_whose_worker_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    pids = tmp_path / "pids"
    pids.mkdir()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask", n_jobs=2),
    ):
        import threading

        def kill_one():
            while not list(pids.glob("*.pid")):
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(int(next(pids.glob("*.pid")).stem), signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        found = sweep(slow_square, {"x": range(20), "folder": str(pids)}, tmp_path / "records", show=False)
        killer.join()
        assert client.status == "running"
    assert found.y.tolist() == [x * x for x in range(20)]
    assert len(list(pids.glob("*.pid"))) >= 3  # two workers, and the one that came for the dead one


@pytest.mark.slow
def test_the_cluster_leaves_no_settings_for_the_tests_after_it():
    assert os.environ.get("OMP_NUM_THREADS") == THREADS_AT_FIRST
