"""Settings chosen on one split, without the seed that is scored on another; ties, edges and what was not tuned."""

import math

import numpy as np
import pandas as pd
import pytest

from lorakit.experiments.tuning import tune


def runs(by, score=None, **columns):
    """One row for each setting and seed: by[setting][seed]; settings as named columns, score as `by` if not given."""
    rows = []
    for k, row in enumerate(by):
        for seed, value in enumerate(row):
            setting = {name: values[k] for name, values in columns.items()}
            rows.append({"arm": "LoRA", "seed": seed, "validation": value, "test": (score or by)[k][seed], **setting})
    return pd.DataFrame(rows)


def tuned(frame, axes=("lr",), **more):
    return tune(frame, "arm", axes, score="test", by="validation", **more)["LoRA"]


def test_a_setting_is_chosen_on_validation_by_the_other_seeds_and_scored_on_the_test():
    by, score = [[0.5, 0.6, 0.8], [0.9, 0.4, 0.5]], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    arm = tuned(runs(by, score, lr=[1e-3, 1e-2]))
    assert arm.choices == {0: {"lr": 1e-3}, 1: {"lr": 1e-2}, 2: {"lr": 1e-2}}  # 0.7 > 0.45, 0.65 < 0.7, 0.55 < 0.65
    assert arm.values == {0: 0.1, 1: 0.5, 2: 0.6}
    assert arm.best == ({"lr": 1e-3},)
    assert arm.flags == {"edge": "best lr, 0.001, is the lowest tried"}


def test_a_loss_is_best_where_it_is_low():
    arm = tuned(runs([[3.0, 3.1], [1.0, 1.1], [2.0, 2.1]], lr=[1, 2, 3]), lower_is_better=True)
    assert (arm.values, arm.best, arm.flags, arm.lower_is_better) == ({0: 1.0, 1: 1.1}, ({"lr": 2},), {}, True)


def test_settings_that_share_the_best_are_all_named():
    arm = tuned(runs([[0.1, 0.2], [1, 1], [1, 1], [0.3, 0.3]], lr=[1e-4, 1e-3, 3e-3, 1e-2]))
    assert arm.best == ({"lr": 1e-3}, {"lr": 3e-3})
    assert arm.flags == {"tie": "best is shared by lr 0.001 and lr 0.003"}
    assert str(arm) == "lr 0.001 or lr 0.003; tie: best is shared by lr 0.001 and lr 0.003"
    thirds = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 0.0, 0.0]]  # means that differ by rounding alone
    assert len(tuned(runs(thirds, lr=[2, 3, 1])).best) == 2


GRID = {"lr": [1, 1, 1, 2, 2, 2, 3, 3, 3], "alpha": [8, 16, 32] * 3}


@pytest.mark.parametrize(
    ("at", "flag"),
    [
        (4, None),
        (5, "best alpha, 32, is the highest tried"),
        (1, "best lr, 1, is the lowest tried"),
        (8, "best lr, 3, is the highest tried, best alpha, 32, is the highest tried"),
    ],
)
def test_an_edge_of_any_axis_is_one(at, flag):
    arm = tuned(runs([[0.9, 0.9] if k == at else [0.1, 0.1] for k in range(9)], **GRID), ("lr", "alpha"))
    assert arm.flags.get("edge") == flag


def test_a_plateau_that_reaches_inside_has_no_edge():
    arm = tuned(runs([[0.9, 0.9] if k in (4, 5) else [0.1, 0.1] for k in range(9)], **GRID), ("lr", "alpha"))
    assert list(arm.flags) == ["tie"]


def test_an_edge_among_the_settings_beside_it():
    """A ladder of rates that moves with alpha: inside all rates, and the highest that was tried with this alpha."""
    arm = tuned(
        runs([[0.1] * 2, [0.2] * 2, [0.9] * 2, [0.3] * 2, [0.1] * 2], lr=[4, 8, 2, 1, 0.5], alpha=[8, 8, 32, 32, 32]),
        ("lr", "alpha"),
    )
    assert arm.flags["edge"] == "best lr, 2, is the highest tried, best alpha, 32, is the highest tried"


def test_an_axis_with_one_value_is_not_tuned_and_names_have_no_edges():
    arm = tuned(runs([[0.1, 0.2], [0.3, 0.4]], lr=[1e-3, 1e-3], rule=["2r", "rsLoRA"]), ("lr", "rule"))
    assert arm.flags == {"untuned": "lr had one value"}
    assert str(arm) == "lr 0.001, rule rsLoRA; untuned: lr had one value"


def test_a_tuned_value_has_no_luck_in_it():
    """Twenty settings that are all worth 0: the best mean looks better, the tuned values do not."""
    rng, best, worth = np.random.default_rng(0), [], []
    for _ in range(200):
        values = rng.normal(size=(20, 5)).tolist()
        arm = tuned(runs(values, lr=list(range(20))))
        (setting,) = arm.best
        best.append(np.mean(values[setting["lr"]]))
        worth.extend(arm.values.values())
    assert np.mean(best) > 0.7
    assert abs(np.mean(worth)) < 0.1


def test_arms_stand_apart_in_the_order_of_their_rows():
    frame = runs([[0.5, 0.6], [0.9, 0.4]], lr=[1e-3, 1e-2])
    both = tune(pd.concat([frame.assign(arm=16), frame.assign(arm=4)]), "arm", ["lr"], "test", "validation")
    assert list(both) == [16, 4]
    assert both[16] == both[4]


FRAME = runs([[0.5, 0.6], [0.9, 0.4]], lr=[1e-3, 1e-2])


@pytest.mark.parametrize(
    ("frame", "axes", "message"),
    [
        (FRAME, ["alpha"], "expected columns of the frame, got alpha"),
        (FRAME, [], "expected at least one axis"),
        (FRAME, "lr", "expected a list of axes"),
        (FRAME[1:], ["lr"], "the same two or more seeds for each setting"),
        (FRAME[FRAME.seed == 0], ["lr"], "the same two or more seeds"),
        (pd.concat([FRAME, FRAME]), ["lr"], "expected one run for each setting and seed"),
        (FRAME.assign(test=math.nan), ["lr"], "expected finite validation and test"),
        (FRAME.assign(validation=math.inf), ["lr"], "expected finite validation and test"),
        (FRAME.assign(lr=math.nan), ["lr"], "expected a value on each axis"),
    ],
)
def test_what_cannot_be_tuned_is_refused(frame, axes, message):
    with pytest.raises(ValueError, match=message):
        tuned(frame, axes)
