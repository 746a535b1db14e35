"""Intrinsic dimension: d90 read off by hand, runs that resume after a kill, and the recorded results and their card."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.studies import load_study
from hypothesis import given
from hypothesis import strategies as st

from lorakit import load_model
from lorakit.experiments import intrinsic
from lorakit.experiments.intrinsic import (
    PLANS,
    Arm,
    Plan,
    chosen,
    d90,
    d90_by_seed,
    next_run,
    read,
    record,
    results,
    run,
)
from lorakit.experiments.stats import mean_interval
from lorakit.layers.subspace import RandomSubspace

FILE = "results.json"
CARD = load_study("intrinsic")
ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "data" / "intrinsic"
SMALL = Plan(
    dimensions=(16, 64),
    subspace_steps=(1e-3, 3e-3),
    ranks=(1,),
    lora_lrs=(1e-2,),
    full_lrs=(1e-3,),
    seeds=(1, 2),
    n_facts=4,
    steps=2,
    batch_size=4,
)


# ---- d90 ----


def test_d90_lies_on_a_line_in_log_d():
    assert d90({10: 0.0, 1000: 0.9}, full=1.0) == pytest.approx(1000)
    assert d90({10: 0.0, 1000: 1.0}, full=0.5) == pytest.approx(10 ** (1 + 2 * 0.45))
    assert d90({1000: 1.0, 10: 0.8, 100: 0.8}, full=1.0) == pytest.approx(100 * math.sqrt(10))
    assert d90({16: 0.5, 32: 1.0}, full=1.0, share=0.75) == pytest.approx(16 * math.sqrt(2))


def test_d90_at_the_ends_of_the_grid():
    assert d90({16: 1.0, 64: 1.0}, full=1.0) == 16
    assert d90({16: 0.0, 64: 0.89}, full=1.0) == math.inf


def test_d90_is_the_first_crossing_of_a_curve_that_wavers():
    assert 16 < d90({16: 0.0, 32: 0.95, 64: 0.5, 128: 1.0}, full=1.0) < 32


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.1, 1))
def test_d90_stays_within_the_grid_and_falls_with_the_target(values, full):
    curve = {2**i: value for i, value in enumerate(values)}
    found = d90(curve, full)
    assert found == math.inf or 1 <= found <= 2 ** (len(values) - 1) * (1 + 1e-9)
    assert d90(curve, full / 2) <= found


@pytest.mark.parametrize(("recalls", "full"), [({}, 1.0), ({16: 0.5}, 0.0)])
def test_d90_of_nothing_is_refused(recalls, full):
    with pytest.raises(ValueError, match="expected recalls"):
        d90(recalls, full)


def test_the_interval_of_a_mean():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)
    for bad in ([1.0], [1.0, math.inf]):
        with pytest.raises(ValueError, match="at least two finite"):
            mean_interval(bad)


# ---- the runs ----


def test_a_step_moves_a_parameter_equally_in_every_subspace():
    for d in (16, 4096):
        model, _ = load_model("tiny")
        before = [p.detach().clone() for p in model.parameters()]
        size = sum(p.numel() for p in before)
        arm = Arm("subspace", d)
        trained, trainable = arm.prepare(model, seed=0)
        assert isinstance(trained, RandomSubspace)
        assert trainable == d
        with torch.no_grad():
            trained.z.add_(arm.peak_lr(1e-3, size))
            after = trained.theta().values()
        moved = torch.cat([(b - a).abs().flatten() for a, b in zip(before, after, strict=True)])
        assert moved.mean().item() == pytest.approx(1e-3, rel=0.02)


def test_a_run_is_a_function_of_its_seed():
    first, again, other = (run(Arm("subspace", 64), 3e-3, seed, SMALL) for seed in (1, 1, 2))
    steady = {key: value for key, value in first.items() if key != "cpu_seconds"}
    assert steady == {key: value for key, value in again.items() if key != "cpu_seconds"}
    assert first["loss"] != other["loss"]
    assert {"recall", "loss", "versions", "device", "command", "lr", "seed", "size"} <= set(first)


def fake_run(arm, lr, seed, plan):
    """More dimensions and the larger rate are better; instant."""
    recall = min(1.0, arm.size / 64) * (1.0 if lr > 2e-3 else 0.5) if arm.kind == "subspace" else 1.0
    return asdict(arm) | {"seed": seed, "lr": lr, "recall": recall, "loss": 1 - recall, "known_recall": 0.1} | {
        "trainable": max(arm.size, 1), "cpu_seconds": 1.0, "device": "none", "versions": {"torch": "0"}, "command": ""
    }  # fmt: skip


def test_missing_runs_alone_are_done_and_in_order(tmp_path, monkeypatch):
    calls = []

    def dying(*args):
        calls.append(args[:3])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fake_run(*args)

    monkeypatch.setattr(intrinsic, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, FILE, SMALL, show=False)
    assert read(tmp_path)[0] == SMALL
    assert len(read(tmp_path)[1]) == 4
    runs = record(tmp_path, FILE, SMALL, show=False)
    total = (1 + 2) + 2 * (2 + 2) + (1 + 2)
    assert len(runs) == total
    assert len(calls) == total + 1, "one was tried twice"
    assert len(set(calls)) == total
    assert record(tmp_path, FILE, SMALL, show=False) == runs
    assert len(calls) == total + 1, "a complete record is not run again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]
    assert chosen(SMALL, runs, Arm("subspace", 64))["lr"] == 3e-3
    assert [each["seed"] for each in results(SMALL, runs, Arm("subspace", 64))] == [1, 2]
    assert d90_by_seed(SMALL, runs) == pytest.approx({seed: 16 * 4 ** (0.65 / 0.75) for seed in (1, 2)})
    CARD.write(tmp_path, [FILE])
    assert "(edge)" in (tmp_path / "README.md").read_text()


def test_the_card_waits_for_the_last_run(tmp_path, monkeypatch):
    monkeypatch.setattr(intrinsic, "run", fake_run)
    record(tmp_path, FILE, SMALL, show=False)
    stored = json.loads((tmp_path / "results.json").read_text())
    stored["runs"].pop()
    (tmp_path / "results.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="to be complete, got 13 runs"):
        CARD.write(tmp_path, [FILE])


def test_another_plan_or_base_does_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(intrinsic, "run", fake_run)
    record(tmp_path, FILE, SMALL, show=False)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="got others"):
        record(tmp_path, FILE, replace(SMALL, steps=3), show=False)
    monkeypatch.setattr(intrinsic, "sha256", lambda path: "another")
    with pytest.raises(ValueError, match="got others"):
        record(tmp_path, FILE, SMALL, show=False)
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.long
def test_a_killed_process_loses_one_run_at_most(tmp_path):
    code = f"""
from lorakit.experiments.intrinsic import Plan, record
record({str(tmp_path)!r}, {FILE!r}, Plan(**{asdict(SMALL)!r}), show=False)
"""
    file = tmp_path / "results.json"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and len(read(tmp_path)[1]) >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read(tmp_path)[1]
    assert 2 <= len(before) < 14, "killed too late"
    runs = record(tmp_path, FILE, SMALL, show=False)
    assert runs[: len(before)] == before
    assert next_run(SMALL, runs) is None


# ---- what is recorded ----


def test_the_records_are_complete_and_their_card_is_computed_from_them(tmp_path):
    for file, plan in PLANS.items():
        stored, runs = read(RECORDED, file)
        assert stored == plan
        assert next_run(plan, runs) is None
        (tmp_path / file).write_bytes((RECORDED / file).read_bytes())
    CARD.write(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (RECORDED / "README.md").read_bytes()


@pytest.mark.parametrize("file", PLANS)
def test_a_record_is_that_of_the_committed_base(file):
    stored = json.loads((RECORDED / file).read_text())
    manifest = json.loads((ROOT / "data" / "tiny" / "lorakit_manifest.json").read_text())
    assert stored["base_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
