"""Pictures of four bits: the numbers of a format under the bell curve, and a block that is rounded to them."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from lorakit.experiments.plots import COLOURS, INK, MARKERS, style
from lorakit.layers import nf4


def draw_codebooks(ax: Axes, codebooks: Mapping[str, Sequence[float]], absmax: float, title: str = "") -> Axes:
    """Draws the numbers of each format on a line of its own, under the normal distribution of the weights.

    Args:
        ax: where to draw.
        codebooks: format -> its numbers, in units of absmax.
        absmax: that of a block, in standard deviations of the weights.
        title: the question that the figure answers.
    """
    x = torch.linspace(-3.4, 3.4, 301, dtype=torch.float32)
    height = 0.55 * len(codebooks)
    bell = height * (-(x**2) / 2).exp()
    ax.fill_between(x, bell, color=INK, alpha=0.12, lw=0)
    ax.plot(x, bell, color=INK, lw=1.5)
    for row, ((name, numbers), colour, marker) in enumerate(zip(codebooks.items(), COLOURS, MARKERS, strict=False)):
        y = -0.6 - 0.7 * row
        ax.plot([-absmax, absmax], [y, y], color=colour, lw=1, zorder=1)
        ax.plot([absmax * number for number in numbers], [y] * len(numbers), marker, color=colour, ms=7)
        ax.text(-3.4, y, name, va="center", color=INK)
    for side in (-absmax, absmax):
        ax.plot([side, side], [-0.3 - 0.7 * len(codebooks), height], ":", color=INK, lw=1)
    ax.text(absmax, height, " absmax", va="top", color=INK)
    ax.set_yticks([])
    style(ax, title, "weight (standard deviations)").spines["left"].set_visible(False)
    return ax


def draw_block(ax: Axes, block: Tensor, codebook: Sequence[float], title: str = "") -> Axes:
    """Draws the weights of a block, the lines that they may lie on, and the line that each is moved to.

    Args:
        ax: where to draw.
        block: (n), the weights that share an absmax; n is even.
        codebook: the numbers of the format, in units of absmax.
        title: the question that the figure answers.
    """
    book, largest = tuple(codebook), int(block.abs().argmax())
    back = nf4.dequantize(*nf4.quantize(block, book, len(block)), block.shape, codebook=book, block_size=len(block))
    for number in book:
        ax.axhline(block[largest].abs().item() * number, color=COLOURS[0], lw=0.6, alpha=0.6, zorder=0)
    places = range(len(block))
    ax.vlines(places, block, back, color=INK, lw=1.2)
    ax.plot(places, block, "o", color=INK, mfc="white", ms=5, label="weight")
    ax.plot(places, back, "_", color=COLOURS[0], ms=8, mew=2.5, label="what four bits hold")
    text = ax.annotate("absmax: no error", (largest, block[largest]), (12, 0), textcoords="offset points", va="center")
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    style(ax, title, "place in the block", "weight").grid(visible=False)
    return ax
