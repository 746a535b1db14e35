"""Lesson 07's drawings: the routes of a merge, a small update on a grid, and how TIES and DARE combine two updates."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from lorakit.experiments.plots import COLOURS, GREY, INK, style
from lorakit.merging.arithmetic import dare, ties
from lorakit.merging.updates import Update


def draw_routes(ax: Axes, routes: Mapping[str, Sequence[str]]) -> Axes:
    """Draws what happens to a weight on its way to being served, a row per route.

    Args:
        ax: where to draw.
        routes: label -> its steps in order, each "round" (to the values of the grid) or "add" (the update).
    """
    places = {"weight": 0.0, "round": 1.6, "add": 3.2, "again": 4.8, "served": 6.4}
    words = {"round": "to 4 bits", "add": "+ $\\Delta W$", "again": "to 4 bits"}
    colours = {"round": COLOURS[3], "add": COLOURS[1], "again": COLOURS[3]}
    for row, (label, steps) in enumerate(routes.items()):
        ax.text(-0.7, -row, label, ha="right", va="center")
        ax.annotate("", (places["served"] - 0.5, -row), (0.25, -row), arrowprops={"arrowstyle": "->", "color": INK})
        ax.text(places["weight"], -row, "$W$", ha="center", va="center", fontsize=12)
        ax.text(places["served"], -row, "served", ha="center", va="center")
        seen_update = False
        for step in steps:
            place = "again" if step == "round" and seen_update else step
            seen_update |= step == "add"
            box = {"boxstyle": "round,pad=0.35", "facecolor": colours[place], "edgecolor": INK}
            ax.text(places[place], -row, words[place], ha="center", va="center", color="black", bbox=box)
    ax.set_xlim(-4.2, 7.1)
    ax.set_ylim(-len(routes) + 0.4, 0.6)
    ax.axis("off")
    return ax


def draw_rounding(
    ax: Axes, values: Sequence[float], held: Sequence[float], originals: Sequence[float], push: float
) -> Axes:
    """Draws the same small push on weights that lie on a grid's values, and on weights that lie anywhere.

    Args:
        ax: where to draw.
        values: of the grid, ascending.
        held: weights that are some of these values.
        originals: weights before they were rounded.
        push: what is added to each.
    """
    grid = torch.tensor(values, dtype=torch.float32)

    def near(x: float) -> float:
        return grid[(grid - x).abs().argmin()].item()

    for height, weights in ((1.0, held), (0.0, originals)):
        ax.axhline(height, color=INK, lw=0.8)
        for value in values:
            ax.plot([value] * 2, [height - 0.12, height + 0.12], color=INK, lw=1.5)
        for middle in ((grid[1:] + grid[:-1]) / 2).tolist():
            ax.plot([middle] * 2, [height - 0.3, height + 0.3], ":", color=GREY, lw=1.2)
        for start in weights:
            end, before = near(start + push), near(start)
            moved = end != before
            colour = COLOURS[2] if moved else COLOURS[1]
            ax.plot(start, height, "o", color=COLOURS[0], ms=7, zorder=3)
            ax.annotate("", (start + push, height + 0.22), (start, height + 0.22), arrowprops={"arrowstyle": "->"})
            curve = {"arrowstyle": "->", "color": colour, "lw": 1.6, "connectionstyle": "arc3,rad=-0.5"}
            shift = 0.0 if end != start else -0.012
            ax.annotate("", (end + shift, height - 0.08), (start + push, height - 0.02), arrowprops=curve)
            ax.text(
                start + push / 2, height - 0.52, "next value" if moved else "as before", color=colour, ha="center",
                fontsize=9,
            )  # fmt: skip
    edge = (values[-1] - values[0]) * 0.04
    for height, label in ((1.0, "already in\nfour bits"), (0.0, "original")):
        ax.text(values[0] - 2 * edge, height, label, ha="right", va="center")
    ax.set_xlim(values[0] - edge, values[-1] + edge)
    ax.set_ylim(-0.75, 1.5)
    style(ax, "", "weight, as a share of its block's largest").grid(visible=False)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    return ax


def draw_ties_and_dare(axes: Iterable[Axes], first: Tensor, second: Tensor, density: float, seed: int = 0) -> None:
    """Draws two updates entry by entry, what TIES keeps of each, what it makes of both, and what DARE makes of them.

    Args:
        axes: four.
        first, second: entries of two updates, (n).
        density: share of the entries that stays.
        seed: of DARE's choice.
    """
    both = [first, second]
    pair = [{"w": Update(each[None], torch.eye(len(each), dtype=each.dtype))} for each in both]

    panels = [
        (both, "two updates"),
        ([ties([each], [1.0], density, None)["w"].matrix[0] for each in pair], f"TIES trims: {density:.0%} stay"),
        ([ties(pair, [1.0, 1.0], density, None)["w"].matrix[0]], "one sign wins: their mean"),
        ([dare(pair, [1.0, 1.0], density, None, seed)["w"].matrix[0]], f"DARE: ÷ {density:g}, summed"),
    ]
    looks = [(COLOURS[0], ""), (COLOURS[1], "//"), (COLOURS[2], "..")]
    for k, (ax, (rows, title)) in enumerate(zip(axes, panels, strict=True)):
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            colour, hatch = looks[i] if len(rows) > 1 else looks[2]
            where = [k + (i - (len(rows) - 1) / 2) * width for k in range(len(row))]
            ax.bar(where, row.tolist(), width, color=colour, hatch=hatch, edgecolor="white")
        ax.axhline(0, color=INK, lw=0.8)
        style(ax, title, "entry", "" if k else "change of the weight")
        ax.set_xticks(range(len(first)), [str(entry) for entry in range(1, len(first) + 1)])
