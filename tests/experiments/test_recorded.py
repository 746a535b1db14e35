"""Recorded runs: only the missing ones are made, and what ended is kept."""

import json
import os
import sys

import pytest

from lorakit.cost.memory import peak_bytes, resident_bytes
from lorakit.experiments.recorded import record_runs

GRID = [{"arm": arm, "seed": seed} for arm in ("a", "b") for seed in (0, 1)]


def test_runs_are_recorded_one_by_one_and_only_once(tmp_path, capsys):
    path, made = tmp_path / "results.json", []

    def run(arm, seed):
        made.append((arm, seed))
        if made == [("a", 0), ("a", 1), ("b", 0)]:
            raise KeyboardInterrupt
        return {"right": seed, "losses": [1.0, 0.5]}

    with pytest.raises(KeyboardInterrupt):
        record_runs(path, GRID, run, "python record.py", model="tiny")
    stored = json.loads(path.read_text())
    assert [(each["arm"], each["seed"]) for each in stored["runs"]] == [("a", 0), ("a", 1)]
    assert stored["command"] == "python record.py"
    assert stored["model"] == "tiny"
    assert {"python", "torch", "transformers", "peft"} == set(stored["versions"])
    assert stored["threads"] >= 1
    runs = record_runs(path, GRID, run, "python record.py")
    assert made == [("a", 0), ("a", 1), ("b", 0), ("b", 0), ("b", 1)]
    assert runs == json.loads(path.read_text())["runs"]
    assert json.loads(path.read_text())["model"] == "tiny"
    record_runs(path, GRID, run, "python record.py")
    assert len(made) == 5
    assert "losses" not in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) in (["results.json"], ["results.json", "results.json.lock"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_call_touches():
    grown = peak_bytes(lambda: bytearray(b"x") * 50_000_000)
    assert 45e6 < grown < 70e6
    assert peak_bytes(lambda: None) < 5e6
    assert resident_bytes() > 10e6
