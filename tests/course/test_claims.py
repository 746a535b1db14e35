"""A conclusion is asserted where it is claimed, and only told elsewhere."""

import pytest

from lorakit.course.claims import expect


@pytest.mark.parametrize("holds", [True, False])
def test_elsewhere_a_sentence_says_whether_it_holds(holds, capsys):
    expect(holds, "ranks differ", here=False)
    assert capsys.readouterr().out == f"{'holds' if holds else 'does not hold'} with these settings: ranks differ\n"


def test_where_it_is_claimed_it_is_silent_or_stops(capsys):
    expect(True, "ranks differ", here=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="ranks differ"):
        expect(float("nan") > 1, "ranks differ", here=True)
