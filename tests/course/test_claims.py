"""A conclusion is asserted where it is claimed, and only told elsewhere; its flags are said."""

import pytest

from lorakit.course.claims import expect
from lorakit.experiments.tuning import Tuned
from lorakit.experiments.verdicts import compare, finding

LOW, HIGH = {seed: 0.5 + seed / 100 for seed in range(3)}, {seed: 0.9 - seed / 100 for seed in range(3)}
FEW = compare(HIGH, LOW, questions=256)  # three pairs


@pytest.mark.parametrize("holds", [True, False])
def test_elsewhere_a_sentence_says_whether_it_holds(holds, capsys):
    expect(holds, "ranks differ", here=False)
    assert capsys.readouterr().out == f"{'holds' if holds else 'does not hold'} with these settings: ranks differ\n"


def test_where_it_is_claimed_it_is_silent_or_stops(capsys):
    expect(True, "ranks differ", here=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="ranks differ"):
        expect(float("nan") > 1, "ranks differ", here=True)


def test_a_sentence_names_the_flags_on_which_it_rests(capsys):
    with pytest.raises(AssertionError, match=r"names its flags \(few seeds\).*few seeds: a ranking needs 5"):
        expect(FEW.says("higher"), "more rank stores more", here=True)
    expect(FEW.says("higher"), "in three seeds, too few seeds to rank, more rank stored more", here=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="expected with these settings"):
        expect(FEW.says("lower"), "too few seeds, less rank stores more", here=True)
    expect(FEW.says("higher"), "more rank stores more", here=False)  # elsewhere no cell fails
    assert capsys.readouterr().out.endswith("more rank stores more; few seeds: a ranking needs 5\n")


def test_all_of_several_must_hold_and_say_their_flags():
    expect([True, FEW.says("higher")], "few seeds, all of them higher", here=True)
    with pytest.raises(AssertionError, match="expected with these settings"):
        expect([False, FEW.says("higher")], "few seeds, all of them higher", here=True)
    edge = Tuned({0: 1.0, 1: 1.0}, {}, ({"lr": 0.1},), {"edge": "best lr, 0.1, is the highest tried"})
    with pytest.raises(AssertionError, match=r"names its flags \(edge\)"):
        expect(
            [FEW.says("higher"), finding(True, edge)],
            "few seeds, and as is common knowledge a rate of 0.1 is best",
            here=True,
        )


@pytest.mark.parametrize("evidence", [FEW, FEW.says("higher"), finding(True)])
def test_evidence_is_no_truth_value(evidence):
    with pytest.raises(ValueError, match=r"expected .* as a truth value"):
        assert evidence
    with pytest.raises(ValueError, match="expected one of higher"):
        FEW.says("better")


def test_a_verdict_itself_is_no_conclusion():
    with pytest.raises(ValueError, match=r"expected `verdict\.says"):
        expect(FEW, "few seeds", here=True)
