"""Figures show the numbers that they are given, where their axes say, and can be read without colours."""

import matplotlib.pyplot as plt
import pytest

from lorakit.experiments.plots import (
    plot_against,
    plot_energy,
    plot_loss,
    plot_memory,
    plot_numbers,
    plot_plane,
    plot_seeds,
    plot_similarity,
)


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_bytes_are_stacked_in_megabytes_with_their_sum(ax):
    arms = {"full": {"weights": 4e6, "gradients": 4e6}, "LoRA": {"weights": 5e6, "gradients": 1e6}}
    plot_memory(arms, ax, "?")
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 4), (0, 5), (4, 4), (5, 1)]
    assert [text.get_text().strip() for text in ax.texts] == ["8", "6"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["weights", "gradients"]


def test_a_held_out_loss_stands_at_the_steps_where_it_was_taken(ax):
    plot_loss({"training": [3.0, 2.0, 1.0]}, ax, held_out=[(0, 3.5), (3, 1.5)])
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3], [0, 3]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held out"]


def test_one_line_needs_no_legend(ax):
    assert plot_loss({"training": [1.0]}, ax).get_legend() is None


INTERVALS = {size: (0.5, 0.4, 0.6) for size in (1, 8, 64)}
LINES = {
    plot_energy: [0.2, 0.7, 1.0],
    plot_against: INTERVALS,
    plot_numbers: {1: 0.01, 2: 0.1, 4: 1.0},
    plot_plane: [(0.1, 0.9), (0.5, 0.5)],
}
SHARES = {300: [0.2, 0.4], 600: [0.5, 0.7]}


@pytest.mark.parametrize(("plot", "line"), LINES.items(), ids=[plot.__name__ for plot in LINES])
def test_lines_differ_in_more_than_their_colour(plot, line, ax):
    plot({name: line for name in "abcd"}, ax)
    looks = [(each.get_linestyle(), each.get_marker()) for each in ax.get_lines()]
    assert len(set(looks)) == len(looks) == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list("abcd")


def test_numbers_stand_at_their_sizes_or_names_in_the_order_given(ax):
    plot_numbers({"a": {1: 3.0, 4: 30.0}, "b": {4: 5.0}}, ax, xlabel="k", ylabel="answers")
    assert [each.get_xydata().tolist() for each in ax.get_lines()] == [[[1, 3], [4, 30]], [[4, 5]]]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "log", "k", "answers")
    ax.clear()
    plot_numbers({"a": {"large": 3.0, "small": 1.0}}, ax)
    assert [list(each.get_xdata(orig=True)) for each in ax.get_lines()] == [["large", "small"]]
    assert ax.get_lines()[0].get_linestyle() == "None", "between two names there is nothing to connect"


def test_a_small_similarity_is_not_drawn_white(ax):
    shade = {}
    for least in (0.0, 0.01):
        ax.clear()
        plot_similarity([[0.01, 0.05], [0.002, 1.0]], ax, least=least)
        image = ax.get_images()[0]
        shade[least] = [float(image.norm(value)) for value in (0.01, 0.05, 0.002, 1.0)]
    assert shade[0.0] == pytest.approx([0.01, 0.05, 0.002, 1.0])
    assert shade[0.01] == pytest.approx([0.0, 0.349, 0.0, 1.0], abs=0.001)


@pytest.mark.parametrize("arms", [1, 2, 7])
def test_means_of_seeds_stand_at_their_setting_and_dots_beside_it(arms, ax):
    plot_seeds({f"arm {i}": SHARES for i in range(arms)}, ax)
    means = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_xydata().tolist() for line in means] == [
        [[300, pytest.approx(30)], [600, pytest.approx(60)]]
    ] * arms
    assert len({(line.get_linestyle(), line.get_marker()) for line in means}) == arms
    dots = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "."]
    assert len({round(x, 6) for x in dots}) == len(dots) == 2 * arms
    assert all(min(abs(x / 300 - 1), abs(x / 600 - 1)) < 0.07 for x in dots)


def test_pairs_of_seeds_are_joined_from_name_to_name(ax):
    plot_seeds({"": {"one": [0.2, 0.4], "other": [0.5, 0.3]}}, ax, paired=True)
    thin = [line.get_xydata().tolist() for line in ax.get_lines() if line.get_linewidth() < 1]
    assert thin == [[[0, 20], [1, 50]], [[0, 40], [1, 30]]]


def test_an_interval_of_shares_does_not_leave_them(ax):
    plot_seeds({"": {"all": [1.0, 1.0, 1.0]}}, ax, questions=50)
    (ends,) = (line.get_ydata() for line in ax.get_lines() if line.get_linewidth() == 5)
    assert 97 < ends[0] < 98.5
    assert ends[1] == 100, "three seeds that agree are not certain"
