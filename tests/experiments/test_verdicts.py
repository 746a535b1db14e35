"""The rule for comparisons: against scipy, by its flags, and by how often it is wrong on records that were made up."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
from helpers.planted import Plant, at_most, by_seed
from scipy import stats as scipy_stats

from lorakit.experiments.stats import difference, share_interval
from lorakit.experiments.tuning import Tuned, tune
from lorakit.experiments.verdicts import compare, compare_all

A, B = by_seed([0.90, 0.94, 0.92, 0.95, 0.93]), by_seed([0.80, 0.86, 0.83, 0.83, 0.81])
UNDECIDED = "cannot be separated"


# ---- what it computes ----


def test_without_bounds_it_is_students_interval_of_the_pairs():
    expected = scipy_stats.ttest_rel(list(A.values()), list(B.values())).confidence_interval(0.9)
    found = compare(A, B, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.outcome, found.decided, found.flags) == ("higher", True, {})
    assert compare(B, A).outcome == "lower"


def test_pairs_are_found_by_their_seed():
    shuffled = {seed: B[seed] for seed in (3, 1, 4, 0, 2)}
    assert compare(A, shuffled) == compare(A, B) == compare(pd.Series(A), B)
    assert compare(A | {7: 0.1}, B | {9: 0.9}) == compare(A, B)


def test_arms_of_one_question_are_averaged_within_a_seed():
    """Three arms whose seeds fall and rise together tell hardly more than one; as runs they looked decided."""
    seeds = [0.95, 0.8, 0.9, 0.86, 0.74]
    control, arms = by_seed([0.94, 0.95, 0.93, 0.96, 0.94]), [[s + k / 100 for s in seeds] for k in (-1, 0, 1)]
    pooled = difference([share for arm in arms for share in arm], list(control.values()) * 3)
    whole = compare([by_seed(arm) for arm in arms], control, 128)
    assert (pooled.verdict, whole.outcome, whole.pairs) == ("lower", UNDECIDED, 5)
    assert whole.mean == pytest.approx(pooled.mean)
    assert (whole.low, whole.high) == pytest.approx(
        [getattr(compare(by_seed(seeds), control, 128), end) for end in ("low", "high")]
    )


def test_shares_stay_inside_their_bounds():
    scattered, high = by_seed([0.0, 0.05, 0.9, 0.1, 0.0]), by_seed([1.0, 1.0, 0.98, 1.0, 1.0])
    assert difference(list(scattered.values()), list(high.values()), paired=True).low < -1
    for found in (compare(scattered, high, 64), compare(by_seed([0] * 5), by_seed([1] * 5), 64)):
        assert -1 <= found.low <= found.mean <= found.high <= 1
        assert found.smallest <= 1
    for shares in ([0.0, 0.05, 0.9], [1.0, 1.0, 0.97], [1.0, 1.0], [0.0, 0.0]):
        mean, low, high = share_interval(shares, 64)
        assert 0 <= low <= mean <= high <= 1
        assert low < high
    assert compare(by_seed([0.5, 0.52, 0.49, 0.5, 0.53]), by_seed([0.4, 0.41, 0.43, 0.42, 0.4]), 10**6).low == (
        pytest.approx(
            compare(by_seed([0.5, 0.52, 0.49, 0.5, 0.53]), by_seed([0.4, 0.41, 0.43, 0.42, 0.4])).low, abs=2e-3
        )
    )


def test_seeds_that_agree_decide_nothing_by_it():
    """Five times one answer of 64 more: Student's interval has no width, 64 questions cannot say so much."""
    a, b = by_seed([33 / 64] * 5), by_seed([32 / 64] * 5)
    assert compare(a, b).outcome == "higher"
    assert compare(a, b, questions=64).outcome == UNDECIDED
    assert compare(by_seed([0.9] * 5), b, questions=64).decided
    assert share_interval([0.5] * 5, 64)[1] == pytest.approx(0.4456, abs=1e-3)  # Wilson's of 160 in 320


def test_rounding_decides_nothing():
    assert compare(by_seed([0.1 + 0.2] * 5), by_seed([0.3] * 5)).outcome == UNDECIDED


def test_many_arms_get_wider_intervals():
    arms = {"a": A} | {str(k): {seed: B[seed] + 0.001 * (k + seed * k % 5) for seed in B} for k in range(12)}
    many, one = compare_all(arms, B), compare(A, B)
    assert list(many) == list(arms)
    assert many["a"].mean == one.mean
    assert many["a"].low < one.low < one.high < many["a"].high
    assert many["1"].outcome == UNDECIDED


def test_arms_that_scatter_alike_lend_each_other_degrees_of_freedom():
    rng = np.random.default_rng(0)
    gaps = {str(k): rng.permutation([-2.0, -1, 0, 1, 2]) for k in range(6)}  # six equal variances of 2.5
    zero = by_seed([0.0] * 5)
    alike = compare_all({name: by_seed(gap) for name, gap in gaps.items()}, zero)
    alone = scipy_stats.t.ppf(1 - 0.05 / 14, 4) * math.sqrt(2.5 / 5)  # half an interval: seven comparisons, five seeds
    assert all(0.5 * alone < each.high < 0.9 * alone for each in alike.values())
    unlike = compare_all({name: by_seed(gap * (40 if name == "0" else 1)) for name, gap in gaps.items()}, zero)
    assert [unlike[name].high for name in "012345"] == pytest.approx([40 * alone, *[alone] * 5])


# ---- flags ----


def test_fewer_than_five_pairs_rank_nothing():
    found = compare({seed: A[seed] for seed in range(4)}, B)
    assert (found.outcome, found.decided, found.pairs) == ("higher", False, 4)
    assert found.flags == {"few seeds": "a ranking needs 5"}
    assert str(found).endswith("4 pairs: higher, but no ranking; few seeds: a ranking needs 5")


def test_a_verdict_is_one_line():
    assert str(compare(A, B, 256)) == "+10.2 points [+7.7, +12.7], 5 pairs: higher"
    found = compare(by_seed([2.0, 2.5, 2.2, 2.4, 2.0]), by_seed([2.1, 2.3, 2.3, 2.2, 2.2]), unit="nats")
    assert str(found) == "+0 nats [-0.232, +0.232], 5 pairs: cannot be separated; 0.315 nats would have been seen"


@pytest.mark.parametrize(
    ("control", "flag", "room"),
    [([0.98, 1, 0.97, 1, 0.98], "ceiling", "1.4"), ([0.02, 0, 0.03, 0, 0.02], "floor", "1.4")],
)
def test_a_control_that_leaves_no_room_is_said(control, flag, room):
    found = compare(
        by_seed([0.99, 0.95, 1, 0.98, 0.99] if flag == "ceiling" else [0.01, 0.05, 0, 0, 0.0]), by_seed(control), 96
    )
    assert found.outcome == UNDECIDED
    assert list(found.flags) == [flag]
    assert found.flags[flag].startswith(f"{room} points of room")
    assert float(room) / 100 < found.smallest
    assert f"{100 * found.smallest:.1f} points would have been seen; {flag}: " in str(found)


def test_where_there_is_room_nothing_is_flagged():
    middle = by_seed([0.5, 0.55, 0.52, 0.49, 0.5])
    assert compare(middle, by_seed([0.51, 0.53, 0.5, 0.5, 0.53]), 256).flags == {}
    assert compare(middle, by_seed([1.0, 1.0, 0.99, 1.0, 1.0]), 256).flags == {}  # decided: no ceiling in the way
    wide = compare(by_seed([0.2, 0.9, 0.5, 0.8, 0.6]), by_seed([0.9, 0.4, 0.8, 0.7, 0.9]), 256)
    assert (wide.flags, wide.smallest > 0.3) == ({}, True)  # 26 points of room do not suffice, but more seeds would


def tuned(values, **flags):
    return Tuned(values, {}, ({"lr": 0.01},), flags)


def test_an_edge_forbids_to_rank_the_arm_that_is_behind():
    """Outside its sweep the better arm can only be better still; the worse one might overtake."""
    edge = {"edge": "best lr, 0.01, is the highest tried"}
    ahead, behind = compare(tuned(A, **edge), tuned(B)), compare(tuned(A), tuned(B, **edge))
    assert (ahead.decided, behind.decided) == (True, False)
    assert ahead.flags == {"edge": "the arm's best lr, 0.01, is the highest tried"}
    assert behind.flags == {"edge": "the control's best lr, 0.01, is the highest tried"}
    assert compare(tuned(B, **edge), A).decided is False
    assert compare(tuned(B, **edge), A).flags.keys() == {"edge"}
    assert compare([tuned(A), tuned(A)], [B, tuned(B, **edge)]).decided is False
    both = compare(tuned(A, **edge), tuned(B, **edge))
    assert both.flags["edge"].count("the highest tried") == 2


def test_of_losses_the_higher_one_is_behind():
    loss = Tuned(A, {}, (), {"edge": "best lr, 1, is the lowest tried"}, lower_is_better=True)
    assert compare(loss, B).decided is False
    assert compare(B, loss).decided is False
    assert compare(loss, by_seed([2.0] * 5)).decided is True


def test_an_untuned_axis_forbids_and_a_tie_is_said():
    assert compare(tuned(A), tuned(B, untuned="alpha had one value")).decided is False
    tie = compare(tuned(A, tie="best is shared by lr 1 and lr 2"), B)
    assert (tie.decided, tie.flags) == (True, {"tie": "the arm's best is shared by lr 1 and lr 2"})


@pytest.mark.parametrize(
    "call",
    [
        lambda: compare([0.1, 0.2], [0.1, 0.3]),
        lambda: compare({0: 0.1, 1: 0.2}, {5: 0.1, 6: 0.2}),
        lambda: compare({0: 0.1, 1: math.nan}, {0: 0.1, 1: 0.2}),
        lambda: compare({0: 0.1, 1: 1.2}, {0: 0.1, 1: 0.2}, questions=64),
        lambda: compare(pd.Series([0.1, 0.2, 0.3], index=[0, 0, 1]), {0: 0.1, 1: 0.2}),
        lambda: compare(A, B, questions=0),
        lambda: compare(A, B, confidence=95),
        lambda: compare("A", B),
        lambda: compare([], B),
        lambda: compare_all({}, B),
        lambda: share_interval([0.5, 1.5], 64),
        lambda: share_interval([0.5], 64),
    ],
)
def test_what_cannot_be_compared_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


# ---- how often it is wrong, on planted records ----


def verdict(plant, shares):
    return compare(by_seed(shares[1]), by_seed(shares[0]), plant.questions)


def any_separated(plant, shares):
    arms = {str(k): by_seed(row) for k, row in enumerate(shares[1:])}
    return any(each.outcome != UNDECIDED for each in compare_all(arms, by_seed(shares[0]), plant.questions).values())


ZERO = {
    "no scatter": Plant((0.5, 0.5), (0, 0)),
    "scatter": Plant((0.5, 0.5), (0.1, 0.1)),
    "apart": Plant((0.7, 0.7), (0.1, 0.1), shared=0),
    "three times the scatter": Plant((0.5, 0.5), (0.04, 0.12)),
    "three times the control's": Plant((0.5, 0.5), (0.12, 0.04), questions=256),
    "ceiling": Plant((0.97, 0.97), (0.02, 0.02), questions=64),
    "floor": Plant((0.01, 0.01), (0.01, 0.01), questions=64),
    "ten seeds": Plant((0.6, 0.6), (0.1, 0.1), seeds=10, questions=256),
    "ten seeds, ceiling": Plant((0.99, 0.99), (0.01, 0.01), seeds=10, questions=64),
    "three seeds": Plant((0.6, 0.6), (0.1, 0.1), seeds=3),
}
MANY = {
    "six alike": Plant((0.6,) * 7, (0.08,) * 7),
    "six, one unlike": Plant((0.5,) * 7, (0.04,) * 6 + (0.12,)),
    "six, the control unlike": Plant((0.5,) * 7, (0.12,) + (0.04,) * 6),
    "fourteen at the ceiling": Plant((0.95,) * 15, (0.03,) * 15, questions=96),
    "three, ten seeds": Plant((0.5,) * 4, (0.04, 0.04, 0.08, 0.08), seeds=10),
}


@pytest.mark.parametrize("name", ZERO)
def test_of_true_zeros_at_most_one_in_twenty_is_separated(name):
    found = ZERO[name].judged(verdict, 400)
    assert sum(each.outcome != UNDECIDED for each in found) <= at_most(0.05, 400)
    if ZERO[name].seeds < 5:
        assert not any(each.decided for each in found)
    if "ceiling" in name or "floor" in name:
        assert sum(not each.flags for each in found) <= at_most(0.05, 400)


@pytest.mark.parametrize("name", MANY)
def test_of_many_arms_any_is_separated_once_in_twenty(name):
    assert sum(MANY[name].judged(any_separated, 200)) <= at_most(0.05, 200)


def test_arms_averaged_by_seed_err_once_in_twenty_and_pooled_ones_far_more_often():
    """Three arms on each side that fall and rise together with their seeds, and no true difference."""
    rng, averaged, pooled = np.random.default_rng(0), 0, 0
    for _ in range(300):
        sides = rng.normal(size=(2, 1, 5)) + 0.5 * rng.normal(size=(2, 3, 5))
        averaged += compare(*([by_seed(row) for row in side] for side in sides)).outcome != UNDECIDED
        pooled += difference(*(side.ravel().tolist() for side in sides)).verdict != UNDECIDED
    assert averaged <= at_most(0.05, 300) < 0.15 * 300 < pooled


@pytest.mark.parametrize(("shift", "least"), [(0.2, 0.6), (0.4, 0.99)])
def test_what_is_there_is_seen_and_never_the_other_way_round(shift, least):
    plant = Plant((0.5, 0.5 + shift), (0.1, 0.1))
    found = [each.outcome for each in plant.judged(verdict, 300)]
    assert found.count("higher") >= least * 300
    assert "lower" not in found


def test_the_smallest_difference_is_seen_four_times_in_five():
    """A difference as large as the one that is printed on average."""
    plant = Plant((0.4, 0.4), (0.05, 0.05), questions=256)
    smallest = fmean(each.smallest for each in plant.judged(verdict, 300))
    found = replace(plant, means=(0.4, 0.4 + smallest)).judged(verdict, 300, seed=1)
    assert 0.7 < sum(each.outcome == "higher" for each in found) / 300 < 0.9


@pytest.mark.long
@pytest.mark.parametrize("questions", [64, 256])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_over_all_plants_at_most_one_in_twenty_is_separated(seeds, questions):
    plants = [replace(plant, seeds=seeds, questions=questions) for plant in ZERO.values()]
    wrong = [sum(each.outcome != UNDECIDED for each in plant.judged(verdict, 500, seed=1)) for plant in plants]
    assert max(wrong) <= at_most(0.05, 500, doubt=1e-4)
    assert sum(wrong) <= 0.05 * 500 * len(plants)


@pytest.mark.long
def test_beside_a_bound_unequal_scatter_errs_more_often_as_the_docstring_says():
    for means, scatters in (((0.93, 0.93), (0.02, 0.06)), ((0.05, 0.05), (0.01, 0.05))):
        found = Plant(means, scatters, questions=256).judged(verdict, 500)
        assert sum(each.outcome != UNDECIDED for each in found) <= at_most(0.1, 500)


def tuned_arm(rng, level, rates):
    """An arm with several rates that are all worth the same, over five seeds, tuned on one split, scored on another."""
    truth = np.clip(level + rng.normal(0, 0.05, size=(rates, 5)), 0, 1)
    rows = [
        {"arm": "", "lr": lr, "seed": seed, "validation": rng.binomial(96, q) / 96, "test": rng.binomial(128, q) / 128}
        for lr, row in enumerate(truth)
        for seed, q in enumerate(row)
    ]
    return tune(pd.DataFrame(rows), "arm", ["lr"], score="test", by="validation")[""]


@pytest.mark.long
def test_an_arm_with_more_rates_is_not_ahead_by_that():
    """Eight rates against one: the best of eight would look better, and on seeds that did not choose it does not."""
    rng = np.random.default_rng(0)
    found = [compare(tuned_arm(rng, 0.6, 8), tuned_arm(rng, 0.6, 1), 128) for _ in range(200)]
    assert sum(each.outcome != UNDECIDED for each in found) <= at_most(0.05, 200)
    assert all("untuned" in each.flags for each in found)
    assert abs(fmean(each.mean for each in found)) < 0.01
    assert not any(each.decided for each in found if each.outcome == "higher")  # the one with one rate is behind
