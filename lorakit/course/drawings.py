"""The course's drawings: pictures of an idea, to scale, where `experiments.plots` draws measurements."""

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lorakit.experiments.plots import COLOURS, GREY


def draw_lora(ax: Axes, d_in: int, d_out: int, rank: int) -> Axes:
    """Draws a LoRA layer (Hu et al. 2021, figure 1): the frozen W above, A and B below, a unit per row and column."""
    above, below = d_out / 2 + rank, -d_out / 2 - rank
    left, gap = 3.0, 5.5
    end = left + d_in + gap + rank + gap

    def block(x: float, y: float, columns: float, rows: float, colour: str, label: str) -> None:
        ax.add_patch(Rectangle((x, y - rows / 2), columns, rows, facecolor=colour, edgecolor="#333333"))
        ax.text(x + columns / 2, y + rows / 2 + 0.4, label, ha="center", va="bottom")

    def arrow(*points: tuple[float, float]) -> None:
        ax.plot(*zip(*points[:-1], strict=True), color="#333333", lw=1)
        ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "color": "#333333"})

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
