"""Figures show the numbers that they are given, where their axes say."""

import matplotlib.pyplot as plt
import pytest

from lorakit.experiments.plots import plot_loss, plot_memory


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
