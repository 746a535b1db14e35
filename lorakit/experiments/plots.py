"""The course's figures: each function draws on an axis and returns it."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from lorakit.experiments.stats import mean_interval, share_interval

# Paul Tol's "bright" scheme, safe for the colour-blind
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
GREY = "#bbbbbb"
INK = "#333333"  # of outlines, arrows and what belongs to no arm
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dvx"  # lines are told apart without their colours, too


def style(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
    """Gives an axis its title and labels, a light grid and no box."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return ax


def plot_loss(
    losses: Mapping[str, Sequence[float]], ax: Axes, title: str = "", held_out: Sequence[tuple[int, float]] = ()
) -> Axes:
    """Draws training losses, in nats per labelled token, against the step, one line a run.

    Args:
        losses: label -> the loss of every step.
        ax: where to draw.
        title: the question that the figure answers.
        held_out: (steps done, loss on held-out examples), as in `History.validation`; drawn as dots, joined by a line.
    """
    for (label, values), colour in zip(losses.items(), COLOURS, strict=False):
        ax.plot(range(1, len(values) + 1), values, color=colour, label=label)
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o--", color=INK, ms=5, label="held out")
    ax.set_ylim(bottom=0)
    if len(ax.lines) > 1:
        ax.legend(frameon=False)
    return style(ax, title, "optimiser step", "loss (nats per token)")


def plot_memory(arms: Mapping[str, Mapping[str, float]], ax: Axes, title: str = "") -> Axes:
    """Draws bytes as bars, an arm each, stacked by kind.

    Args:
        arms: arm -> kind -> bytes; all arms have the same kinds.
        ax: where to draw.
        title: the question that the figure answers.
    """
    kinds = list(next(iter(arms.values())))
    ends = [0.0] * len(arms)
    for kind, colour, hatch in zip(kinds, (GREY, *COLOURS), ("", "//", "..", "\\\\", "xx", "++", "oo"), strict=False):
        sizes = [arm[kind] / 1e6 for arm in arms.values()]
        ax.barh(list(arms), sizes, left=ends, color=colour, hatch=hatch, edgecolor="white", label=kind)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, end in enumerate(ends):
        ax.text(end, place, f" {end:,.0f}", va="center")
    ax.set_xlim(0, 1.12 * max(ends))
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    style(ax, title, "memory (MB)").grid(visible=False)
    return ax


def plot_accuracy(arms: Mapping[str, Mapping[str, tuple[float, float, float]]], ax: Axes, title: str = "") -> Axes:
    """Draws accuracies with their intervals, one group of bars a split and one colour an arm.

    Args:
        arms: arm -> split -> (share, low, high), as `stats.accuracy_interval` returns it.
        ax: where to draw.
        title: the question that the figure answers.
    """
    width = 0.8 / len(arms)
    for i, ((label, splits), colour) in enumerate(zip(arms.items(), COLOURS, strict=False)):
        places = [k + (i - (len(arms) - 1) / 2) * width for k in range(len(splits))]
        share, low, high = ([100 * values[k] for values in splits.values()] for k in range(3))
        errors = [[s - lo for s, lo in zip(share, low, strict=True)], [h - s for s, h in zip(share, high, strict=True)]]
        ax.bar(places, share, 0.92 * width, yerr=errors, capsize=3, color=colour, ecolor=INK, label=label)
        for place, value, top in zip(places, share, high, strict=True):
            ax.text(place, top + 1.5, f"{value:.0f}", ha="center")
    ax.set_xticks(range(len(splits)), list(splits))
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, "", "right answers (%), 95 % interval")


def plot_energy(spectra: Mapping[str, Sequence[float]], ax: Axes, title: str = "") -> Axes:
    """Draws the share of a matrix's energy in its k largest singular directions against k, one line a matrix.

    Args:
        spectra: label -> captured energy, in [0, 1], of 1, 2, 3, ... directions.
        ax: where to draw.
        title: the question that the figure answers.
    """
    for i, (label, shares) in enumerate(spectra.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        ax.plot(range(1, len(shares) + 1), [100 * share for share in shares], dash, color=colour, label=label, lw=2)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_ylim(0, 104)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, "directions kept, k", "captured energy (%)")


def plot_by_depth(values: Mapping[str, Mapping[int, float]], ax: Axes, title: str = "", ylabel: str = "") -> Axes:
    """Draws a number of every layer against its depth in the model, one line a kind of layer.

    Args:
        values: kind -> depth -> the number; kinds beyond the colours get another dash.
        ax: where to draw.
        title: the question that the figure answers.
        ylabel: the number, with its unit.
    """
    for i, (label, points) in enumerate(values.items()):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        depths = sorted(points)
        heights = [points[depth] for depth in depths]
        ax.plot(depths, heights, dash, marker=".", color=COLOURS[i % len(COLOURS)], label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, "block", ylabel)


def plot_against(
    arms: Mapping[str, Mapping[int, tuple[float, float, float]]], ax: Axes, title: str = "", xlabel: str = "rank k"
) -> Axes:
    """Draws accuracies with their intervals against a size on a logarithmic axis, one line an arm.

    Args:
        arms: arm -> size -> (share, low, high), as `stats.accuracy_interval` returns it.
        ax: where to draw.
        title: the question that the figure answers.
        xlabel: the size, with its unit.
    """
    for (label, points), colour, dash, marker in zip(arms.items(), COLOURS, cycle(DASHES), MARKERS, strict=False):
        sizes = sorted(points)
        share, low, high = ([100 * points[size][k] for size in sizes] for k in range(3))
        ax.plot(sizes, share, marker=marker, ls=dash, color=colour, label=label, lw=2)
        ax.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_ylim(-3, 103)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, xlabel, "right answers (%), 95 % interval")


def plot_numbers(
    arms: Mapping[str, Mapping[Any, float]], ax: Axes, title: str = "", xlabel: str = "", ylabel: str = ""
) -> Axes:
    """Draws positive numbers on a logarithmic axis, one line an arm: against a size, or at a name's place without it.

    Args:
        arms: arm -> size or name -> number. Sizes get a logarithmic axis.
        ax: where to draw.
        title: the question that the figure answers.
        xlabel: the size, with its unit.
        ylabel: the number, with its unit.
    """
    named = any(isinstance(place, str) for points in arms.values() for place in points)
    looks = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    for (label, points), (colour, dash, marker) in zip(arms.items(), looks, strict=False):
        ax.plot(list(points), list(points.values()), ls="" if named else dash, marker=marker, color=colour, label=label)
    ax.set_yscale("log")
    if not named:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, xlabel, ylabel)


def plot_similarity(
    grid: Sequence[Sequence[float]],
    ax: Axes,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    most: float = 1.0,
    least: float = 0.0,
) -> Axes:
    """Draws subspace similarities as a map: entry (i - 1, j - 1) compares the first i with the first j directions.

    Args:
        grid: similarities, in [0, 1]: 0 for orthogonal subspaces, 1 if one holds the other.
        ax: where to draw.
        title: the question that the figure answers.
        xlabel: whose directions j counts.
        ylabel: whose directions i counts.
        most: the similarity that is drawn darkest.
        least: the one that is drawn white. Above 0 the scale is logarithmic, and shows small ones, too.
    """
    scale = {"norm": LogNorm(least, most, clip=True)} if least else {"vmin": 0, "vmax": most}
    image = ax.imshow(grid, cmap="Blues", aspect="auto", origin="lower", **scale)
    rows, columns = len(grid), len(grid[0])
    ax.set_yticks(range(rows), [str(i) for i in range(1, rows + 1)])
    ax.set_xticks(range(columns), [str(j) for j in range(1, columns + 1)])
    ax.figure.colorbar(image, ax=ax, label="similarity")
    style(ax, title, xlabel, ylabel).grid(visible=False)
    return ax


def plot_seeds(
    arms: Mapping[str, Mapping[float | str, Sequence[float]]],
    ax: Axes,
    title: str = "",
    xlabel: str = "",
    questions: int | None = None,
    paired: bool = False,
) -> Axes:
    """Draws every run as a dot, with the mean of each setting and its 95 % interval, one colour an arm.

    Means are drawn, and joined, at their settings; the dots of several arms stand a little beside, so that none hides
    another, and at numbers nowhere more than a twelfth of the way to the next setting.

    Args:
        arms: arm -> setting -> shares in [0, 1], one a seed. Settings that are numbers get a logarithmic axis, names
            one place each.
        ax: where to draw.
        title: the question that the figure answers.
        xlabel: what the settings are.
        questions: how many each share is of, for the interval of `share_interval`; None for Student's, cut at 0 and 1.
        paired: whether to join each seed's dots from setting to setting, which have the seeds in one order.
    """
    settings: list[Any] = list(dict.fromkeys(setting for points in arms.values() for setting in points))
    named = any(isinstance(setting, str) for setting in settings)
    settings = settings if named else sorted(settings)
    gap = 1.0 if named else min((math.log2(b / a) for a, b in pairwise(settings)), default=1.0)
    width = gap * min(0.2 * (len(arms) - 1), 0.6 if named else 1 / 6)  # from the first arm to the last
    looks = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    for i, ((label, points), (colour, dash, marker)) in enumerate(zip(arms.items(), looks, strict=False)):
        aside = width * (i / (len(arms) - 1) - 0.5) if len(arms) > 1 else 0.0
        order = [setting for setting in settings if setting in points]
        where = [settings.index(s) + aside if named else s * 2**aside for s in order]
        for place, setting in zip(where, order, strict=True):
            shares = points[setting]
            ax.plot([place] * len(shares), [100 * share for share in shares], ".", color=colour, alpha=0.6, ms=5)
            if len(shares) > 1:
                _, low, high = share_interval(shares, questions) if questions else mean_interval(shares)
                ends = [100 * max(low, 0), 100 * min(high, 1)]
                ax.plot([place] * 2, ends, color=colour, lw=5, alpha=0.25, solid_capstyle="butt")
        for seed in zip(*(points[setting] for setting in order), strict=True) if paired else ():
            ax.plot(where, [100 * share for share in seed], color=colour, lw=0.6, alpha=0.5)
        means = [100 * fmean(points[setting]) for setting in order]
        if named:
            ax.plot(where, means, "_", color=colour, label=label, ms=14, mew=2)
        else:
            ax.plot(order, means, dash, marker=marker, color=colour, label=label, lw=1.5, ms=4)
    if named:
        ax.set_xticks(range(len(settings)), settings)
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(settings, [f"{setting:g}" for setting in settings])
        ax.minorticks_off()
    ax.set_ylim(-3, 103)
    if len(arms) > 1:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, xlabel, "right answers (%), 95 % interval")


def plot_plane(
    paths: Mapping[str, Sequence[tuple[float, float]]], ax: Axes, title: str = "", xlabel: str = "", ylabel: str = ""
) -> Axes:
    """Draws two shares against each other, a dot per setting, those of one path joined in their order.

    Args:
        paths: label -> (share, share), both in [0, 1].
        ax: where to draw.
        title: the question that the figure answers.
        xlabel, ylabel: what the shares are of, with their unit.
    """
    looks = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS + "P*"), strict=False)
    for (label, points), (colour, dash, marker) in zip(paths.items(), looks, strict=False):
        x, y = ([100 * point[k] for point in points] for k in (0, 1))
        ax.plot(x, y, dash if len(points) > 1 else "", marker=marker, color=colour, label=label, ms=7, alpha=0.9)
    top = 110 * max(share for points in paths.values() for point in points for share in point) + 1
    ax.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top), aspect="equal")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return style(ax, title, xlabel, ylabel)
