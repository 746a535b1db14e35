"""The course's drawings: pictures of an idea, to scale, where `experiments.plots` draws measurements."""

from collections.abc import Iterable
from math import hypot

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Arc, Rectangle
from torch import Tensor

from lorakit.experiments.plots import COLOURS, GREY, INK
from lorakit.layers.lowrank import captured_energy, truncated_svd


def draw_lora(ax: Axes, d_in: int, d_out: int, rank: int) -> Axes:
    """Draws a LoRA layer (Hu et al. 2021, figure 1): the frozen W above, A and B below, a unit per row and column."""
    above, below = d_out / 2 + rank, -d_out / 2 - rank
    left, gap = 3.0, 5.5
    end = left + d_in + gap + rank + gap

    def block(x: float, y: float, columns: float, rows: float, colour: str, label: str) -> None:
        ax.add_patch(Rectangle((x, y - rows / 2), columns, rows, facecolor=colour, edgecolor=INK))
        ax.text(x + columns / 2, y + rows / 2 + 0.4, label, ha="center", va="bottom")

    def arrow(*points: tuple[float, float]) -> None:
        ax.plot(*zip(*points[:-1], strict=True), color=INK, lw=1)
        ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "color": INK})

    block(-1, 0, 1, d_in, COLOURS[4], f"x\n({d_in})")
    block(left, above, d_in, d_out, GREY, f"W, frozen ({d_out}, {d_in})")
    block(left, below, d_in, rank, COLOURS[1], f"A, trained ({rank}, {d_in})")
    block(left + d_in + gap, below, rank, d_out, COLOURS[1], f"B, trained ({d_out}, {rank})")
    block(end + 3, 0, 1, d_out, COLOURS[4], f"y\n({d_out})")
    ax.text(end + 0.9, 0, "+", ha="center", va="center", fontsize=14)
    for y in (above, below):
        arrow((0.2, 0), (1.4, 0), (1.4, y), (left - 0.2, y))
    arrow((left + d_in + 0.2, above), (end + 0.9, above), (end + 0.9, 1.1))
    arrow((left + d_in + 0.2, below), (left + d_in + gap - 0.2, below))
    ax.text(left + d_in + gap / 2, below + 0.4, f"{rank}\nnumbers", ha="center", va="bottom", fontsize=8)
    arrow((left + d_in + gap + rank + 0.2, below), (end + 0.9, below), (end + 0.9, -1.1))
    ax.text(end + 1.3, below, "× s", va="center")
    arrow((end + 1.5, 0), (end + 2.8, 0))
    ax.set_xlim(-2, end + 5)
    ax.set_ylim(below - d_out / 2 - 1, above + d_out / 2 + 3)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def draw_merge(ax: Axes, d_in: int, d_out: int, rank: int) -> Axes:
    """Draws what merging does to a layer: B A, of the shape of W, is added to it; a unit per row and column."""
    x, gap = 0.0, 2.6

    def block(columns: float, rows: float, colour: str, label: str, sign: str, hatch: str = "") -> None:
        nonlocal x
        where = (x, -rows / 2)
        ax.add_patch(Rectangle(where, columns, rows, facecolor=colour, edgecolor=INK, hatch=hatch))
        ax.text(x + columns / 2, d_out / 2 + 0.5, label, ha="center", va="bottom")
        ax.text(x + columns + gap / 2, 0, sign, ha="center", va="center", fontsize=13)
        x += columns + gap

    block(d_in, d_out, GREY, f"W ({d_out}, {d_in})", "+ s")
    block(rank, d_out, COLOURS[1], f"B ({d_out}, {rank})", "×")
    block(d_in, rank, COLOURS[1], f"A ({rank}, {d_in})", "=")
    block(d_in, d_out, "#d6949e", f"merged ({d_out}, {d_in})", "", hatch="..")
    ax.set_xlim(-0.5, x - gap + 0.5)
    ax.set_ylim(-d_out / 2 - 0.5, d_out / 2 + 2.2)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def draw_sum(above: Iterable[Axes], below: Iterable[Axes], matrix: Tensor) -> None:
    """Draws a matrix as a sum of outer products: each term of its SVD above, the sum of the first k below.

    Args:
        above, below: as many axes as terms are to be drawn, and one more, for the whole matrix, below.
        matrix: with that many terms at least. All panels have one scale, white is the smallest entry.
    """
    above, (U, S, Vh) = list(above), truncated_svd(matrix, min(matrix.shape))
    terms = [S[i] * torch.outer(U[:, i], Vh[i]) for i in range(len(above))]
    sums = list(torch.stack(terms).cumsum(0))
    low, high = (extreme.item() for extreme in torch.stack([*terms, *sums, matrix]).aminmax())
    above_titles = [f"$\\sigma_{{{i}}} u_{{{i}}} v_{{{i}}}^\\top$" for i in range(1, len(terms) + 1)]
    below_titles = [f"$M_{{{k}}}$: {captured_energy(S, k):.1%} of the energy" for k in range(1, len(terms) + 1)]
    panels = [*zip(above, terms, above_titles, strict=True)]
    panels += zip(below, [*sums, matrix], [*below_titles, f"$M$, rank {torch.linalg.matrix_rank(matrix)}"], strict=True)
    for ax, values, title in panels:
        ax.imshow(values.numpy(), cmap="Greys", vmin=low, vmax=high)
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])


def draw_dora(plain: Axes, dora: Axes, row: tuple[float, float], update: tuple[float, float], length: float) -> None:
    """Draws one row of a weight, with two inputs, as an arrow: what LoRA makes of it, and what DoRA does.

    Args:
        plain: where LoRA's step is drawn: the row, the update s B A, and their sum.
        dora: the same axes' neighbour: the sum's direction at the length m, with m's circle.
        row: of W.
        update: of s B A.
        length: m of this row.
    """
    total = row[0] + update[0], row[1] + update[1]
    size = hypot(*total)
    turned = total[0] * length / size, total[1] * length / size
    for ax, title in (
        (plain, "LoRA: one update turns and stretches"),
        (dora, "DoRA: the length is m, whatever the turn"),
    ):
        looks = [(row, (0, 0), GREY, "-", "$W_{i:}$"), (update, row, COLOURS[1], ":", "$s\\,B_{i:}A$")]
        looks += [(total, (0, 0), COLOURS[0], "-" if ax is plain else "--", "$W_{i:} + s\\,B_{i:}A$")]
        looks += [] if ax is plain else [(turned, (0, 0), COLOURS[2], "-", "applied")]
        for (x, y), (left, low), colour, dash, label in looks:
            ax.annotate(
                "",
                (left + x, low + y),
                (left, low),
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": dash},
            )
            ax.plot([], [], dash, color=colour, lw=2, label=label)
        if ax is dora:
            ax.add_patch(Arc((0, 0), 2 * length, 2 * length, theta2=90, color=COLOURS[2], ls=":"))
        most = 1.1 * max(*row, *total, *turned)
        ax.set(xlim=(0, most), ylim=(0, most), title=title, xlabel="weight of input 1", ylabel="weight of input 2")
        ax.set_aspect("equal")
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        ax.spines[["top", "right"]].set_visible(False)
