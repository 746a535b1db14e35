"""Intrinsic dimension: d90 read off by hand, runs that resume after a kill, and the recorded results and their card."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.studies import load_study
from hypothesis import given
from hypothesis import strategies as st

from lorakit import load_model
from lorakit.experiments.intrinsic import Arm, at_tuned_rate, d90, d90_by_seed, tuned_rates
from lorakit.experiments.records import frame
from lorakit.experiments.stats import mean_interval
from lorakit.layers.subspace import RandomSubspace
from lorakit.models.manifest import sha256

STUDY = load_study("intrinsic")
ROOT = Path(__file__).resolve().parents[2]
SMALL = STUDY.Plan(
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
TOTAL = (1 + 2) + 2 * (2 + 2) + (1 + 2)


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
    setting = next(each for each in SMALL.tuning() if each["kind"] == "subspace")
    first, again, other = (STUDY.run(**setting | {"seed": seed}) for seed in (1, 1, 2))
    assert {**first, "cpu_seconds": 0} == {**again, "cpu_seconds": 0}
    assert first["loss"] != other["loss"]
    assert first["trainable"] == 16


def test_the_tuning_seed_chooses_and_does_not_count():
    rows = [
        ("a", 1, 0.1, 0, 0.5, 1.0),
        ("a", 1, 0.2, 0, 0.5, 0.9),  # as good, at a lower loss
        ("a", 1, 0.3, 0, 0.4, 0.1),
        ("a", 1, 0.2, 1, 0.7, 0.0),
        ("a", 1, 0.3, 1, 0.9, 0.0),
        ("b", 1, 0.3, 0, 1.0, 0.0),
        ("b", 1, 0.3, 2, 0.8, 0.0),
    ]
    runs = pd.DataFrame(rows, columns=["kind", "size", "lr", "seed", "recall", "loss"])
    assert tuned_rates(runs[runs.seed == 0]).set_index("kind").lr.to_dict() == {"a": 0.2, "b": 0.3}
    assert at_tuned_rate(runs)[["kind", "seed", "recall"]].values.tolist() == [["a", 1, 0.7], ["b", 2, 0.8]]


def fake_run(kind, size, lr, seed, **how):
    """More dimensions and the larger rate are better; instant."""
    recall = min(1.0, size / 64) * (1.0 if lr > 2e-3 else 0.5) if kind == "subspace" else 1.0
    return {"recall": recall, "loss": 1 - recall, "known_recall": 0.1, "trainable": max(size, 1), "cpu_seconds": 1.0}


def test_arms_are_tuned_then_repeated_and_only_what_is_missing_is_made(tmp_path, monkeypatch):
    calls, folder = [], tmp_path / "trainings"

    def dying(**setting):
        calls.append(tuple(setting.values()))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fake_run(**setting)

    monkeypatch.setattr(STUDY, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        STUDY.record(folder, SMALL, show=False)
    assert len(frame(folder)) == 4
    with pytest.raises(ValueError, match="expected 6 tuning runs of 4 facts, got 4"):
        STUDY.read(folder, SMALL)
    runs = STUDY.record(folder, SMALL, show=False)
    assert len(runs) == TOTAL
    assert len(calls) == TOTAL + 1, "one was tried twice"
    assert len(set(calls)) == TOTAL
    assert STUDY.record(folder, SMALL, show=False).equals(runs)
    assert len(calls) == TOTAL + 1, "a complete record is not run again"
    tuned = at_tuned_rate(STUDY.read(folder, SMALL))
    of_64 = tuned[(tuned.kind == "subspace") & (tuned["size"] == 64)]
    assert of_64[["lr", "seed"]].values.tolist() == [[3e-3, 1], [3e-3, 2]]
    assert d90_by_seed(tuned) == pytest.approx({seed: 16 * 4 ** (0.65 / 0.75) for seed in (1, 2)})
    STUDY.write(folder, tmp_path / "README.md", [SMALL])
    assert "(edge)" in (tmp_path / "README.md").read_text()
    next(folder.glob("*.json")).unlink()
    with pytest.raises(ValueError, match=r"runs of 4 facts, got"):
        STUDY.write(folder, tmp_path / "README.md", [SMALL])


def test_another_plan_or_base_does_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(STUDY, "run", fake_run)
    STUDY.record(tmp_path, SMALL, show=False)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(STUDY.record(tmp_path, replace(SMALL, steps=3), show=False)) == TOTAL
    monkeypatch.setattr(STUDY, "sha256", lambda path: "another")
    with pytest.raises(ValueError, match="got 0"):
        STUDY.read(tmp_path, SMALL)
    assert len(STUDY.record(tmp_path, SMALL, show=False)) == TOTAL
    assert len(list(tmp_path.glob("*.json"))) == 3 * TOTAL
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_killed_process_loses_one_run_at_most(tmp_path):
    code = f"""
from helpers.studies import load_study
study = load_study("intrinsic")
study.record({str(tmp_path)!r}, study.Plan(**{asdict(SMALL)!r}), show=False)
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(tmp_path.glob("*.json"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert 2 <= len(before) < TOTAL, "killed too late"
    assert len(STUDY.record(tmp_path, SMALL, show=False)) == TOTAL
    assert all(path.read_bytes() == content for path, content in before.items())


# ---- what is recorded ----


def test_the_records_are_complete_and_their_card_is_computed_from_them(tmp_path):
    STUDY.write(STUDY.FOLDER, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_bytes() == (STUDY.FOLDER.parent / "README.md").read_bytes()


def test_the_records_are_those_of_the_committed_base():
    assert set(frame(STUDY.FOLDER).base_sha256) == {sha256(ROOT / "data" / "tiny" / "model.safetensors")}
