"""Drawings show the sizes that they name."""

from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch

from lorakit.course.drawings import draw_dora, draw_lora, draw_merge, draw_sum
from lorakit.course.drawings_bits import draw_block, draw_codebooks
from lorakit.course.drawings_merging import draw_rounding, draw_routes, draw_ties_and_dare
from lorakit.layers import nf4


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


def test_a_matrix_is_drawn_as_the_sum_of_its_terms():
    torch.manual_seed(0)
    matrix = torch.randn(6, 9)
    fig, axes = plt.subplots(2, 4)
    draw_sum(axes[0, :3], axes[1], matrix)
    terms, sums = ([torch.tensor(ax.get_images()[0].get_array()) for ax in row] for row in (axes[0, :3], axes[1]))
    torch.testing.assert_close(sum(terms), sums[2])
    torch.testing.assert_close(sums[3], matrix)
    assert [torch.linalg.matrix_rank(each, rtol=1e-5).item() for each in (*terms, *sums)] == [1, 1, 1, 1, 2, 3, 6]
    assert len({ax.get_images()[0].get_clim() for ax in [*axes[0, :3], *axes[1]]}) == 1, "one scale for all"
    assert axes[1, 3].get_title().endswith("rank 6")
    plt.close(fig)


def test_a_row_is_drawn_with_the_length_that_dora_gives_it():
    fig, axes = plt.subplots(1, 2)
    draw_dora(*axes, row=(2.0, 0.6), update=(0.4, 1.2), length=1.5)
    tips = [[text.xy for text in ax.texts] for ax in axes]
    assert tips[0] == [pytest.approx(tip) for tip in ((2.0, 0.6), (2.4, 1.8), (2.4, 1.8))]
    assert tips[1][:3] == tips[0]
    (x, y), (arc,) = tips[1][3], axes[1].patches
    assert (x**2 + y**2) ** 0.5 == pytest.approx(1.5) == pytest.approx(arc.width / 2)
    assert y / x == pytest.approx(1.8 / 2.4), "the direction is that of the sum"
    plt.close(fig)


def test_the_numbers_of_formats_lie_where_absmax_puts_them():
    fig, ax = plt.subplots()
    draw_codebooks(ax, {"NF4": nf4.NF4, "two": (-1.0, 1.0)}, 2.5)
    marks = [list(line.get_xdata()) for line in ax.lines if line.get_marker() not in ("None", "")]
    assert marks == [[2.5 * number for number in nf4.NF4], [-2.5, 2.5]]
    plt.close(fig)


def test_a_block_is_drawn_with_what_four_bits_hold_of_it():
    block = torch.randn(64, generator=torch.Generator().manual_seed(0))
    fig, ax = plt.subplots()
    draw_block(ax, block, nf4.NF4)
    weights, back = (torch.tensor(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 64)
    assert torch.equal(weights, block)
    torch.testing.assert_close(back, nf4.dequantize(*nf4.quantize(block), block.shape))
    plt.close(fig)


def test_the_steps_of_a_route_stand_in_its_row_in_their_order():
    fig, ax = plt.subplots()
    routes = {"a": ["round", "add"], "b": ["add", "round"], "c": ["round", "add", "round"]}
    draw_routes(ax, routes)
    words = {"round": "to 4 bits", "add": "+ $\\Delta W$"}
    for row, steps in enumerate(routes.values()):
        boxes = sorted((text for text in ax.texts if text.get_bbox_patch() and text.get_position()[1] == -row),
                       key=lambda text: text.get_position()[0])  # fmt: skip
        assert [box.get_text() for box in boxes] == [words[step] for step in steps]
    plt.close(fig)


def test_a_push_ends_at_the_value_to_which_it_is_rounded():
    fig, ax = plt.subplots()
    draw_rounding(ax, [0.0, 1.0, 2.0, 4.0], held=[1.0], originals=[0.3, 1.4, 2.95], push=0.2)
    said = [text.get_text() for text in ax.texts if text.get_text() in ("next value", "as before")]
    assert said == ["as before", "as before", "next value", "next value"]
    plt.close(fig)


def test_the_bars_of_ties_and_dare_are_what_they_make():
    first, second = torch.tensor([3.0, -1.0, 0.2, 2.0]), torch.tensor([-4.0, -0.5, 1.0, 0.1])
    fig, axes = plt.subplots(1, 4)
    draw_ties_and_dare(axes, first, second, density=0.5)
    bars = [[bar.get_height() for bar in ax.patches] for ax in axes]
    assert bars[0] == pytest.approx([*first.tolist(), *second.tolist()])
    assert bars[1] == pytest.approx([3, 0, 0, 2, -4, 0, 1, 0])
    assert bars[2] == pytest.approx([-4, 0, 1, 2])
    assert all(any(x == pytest.approx(y, abs=1e-5) for y in (0, 2 * a, 2 * b, 2 * (a + b)))
               for x, a, b in zip(bars[3], first.tolist(), second.tolist(), strict=True))  # fmt: skip
    plt.close(fig)
