"""Drawings show the sizes that they name."""

from itertools import pairwise

import matplotlib.pyplot as plt
import pytest

from lorakit.course.drawings import draw_lora, draw_merge


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(12, 10, 2), (4, 16, 1)])
def test_a_lora_layer_is_drawn_to_scale(d_in, d_out, rank):
    fig, ax = plt.subplots()
    draw_lora(ax, d_in, d_out, rank)
    shapes = [(patch.get_height(), patch.get_width()) for patch in ax.patches]
    assert shapes == [(d_in, 1), (d_out, d_in), (rank, d_in), (d_out, rank), (d_out, 1)]
    (low, high), bottoms = ax.get_ylim(), [patch.get_y() for patch in ax.patches]
    assert all(low < y and y + rows < high for y, (rows, _) in zip(bottoms, shapes, strict=True))
    plt.close(fig)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(12, 10, 2), (4, 16, 1)])
def test_a_merge_is_drawn_to_scale_and_without_overlap(d_in, d_out, rank):
    fig, ax = plt.subplots()
    draw_merge(ax, d_in, d_out, rank)
    shapes = [(patch.get_height(), patch.get_width()) for patch in ax.patches]
    assert shapes == [(d_out, d_in), (d_out, rank), (rank, d_in), (d_out, d_in)]
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert all(end < start for (_, end), (start, _) in pairwise(ends))
    plt.close(fig)
