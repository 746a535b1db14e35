"""Drawings show the sizes that they name."""

import matplotlib.pyplot as plt
import pytest

from lorakit.course.drawings import draw_lora


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(12, 10, 2), (4, 16, 1)])
def test_a_lora_layer_is_drawn_to_scale(d_in, d_out, rank):
    fig, ax = plt.subplots()
    draw_lora(ax, d_in, d_out, rank)
    shapes = [(patch.get_height(), patch.get_width()) for patch in ax.patches]
    assert shapes == [(d_in, 1), (d_out, d_in), (rank, d_in), (d_out, rank), (d_out, 1)]
    (low, high), bottoms = ax.get_ylim(), [patch.get_y() for patch in ax.patches]
    assert all(low < y and y + rows < high for y, (rows, _) in zip(bottoms, shapes, strict=True))
    plt.close(fig)
