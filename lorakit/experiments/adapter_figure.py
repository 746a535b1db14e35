"""A saved adapter as a figure: how large each layer's update is, and in how many directions it points."""

import math
import os
import re
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from lorakit._atomic import write_atomically
from lorakit.experiments.plots import plot_by_depth
from lorakit.merging.inspection import Inspection


def draw_adapter(found: Inspection) -> Figure:
    """Norm and effective rank of each layer's update against the block that the layer is in.

    Of a block's experts the norm of all together, and the mean rank.

    Raises:
        ValueError: the adapter has no layers that `inspect_adapter` takes apart.
    """
    alike: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for layer in found.layers:
        number = re.search(r"\.(\d+)\.", f".{layer.name}.")  # the first number in a name, as PEFT counts blocks
        if layer.norm is not None and layer.effective_rank is not None:
            depth = int(number[1]) if number else 0
            alike.setdefault((layer.kind, depth), []).append((layer.norm, layer.effective_rank))
    norms: dict[str, dict[int, float]] = {}
    ranks: dict[str, dict[int, float]] = {}
    for (kind, depth), pairs in alike.items():
        norms.setdefault(kind, {})[depth] = math.hypot(*(norm for norm, _ in pairs))
        ranks.setdefault(kind, {})[depth] = mean(rank for _, rank in pairs)
    if not norms:
        raise ValueError(f"expected an adapter with LoRA layers for a figure, got {found.method} in {found.folder}")
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    plot_by_depth(norms, upper, "How large is each update?", "Frobenius norm of s B A")
    plot_by_depth(ranks, lower, "In how many directions does it point?", "effective rank of s B A")
    upper.set_xlabel("")
    lower.get_legend().remove()
    return figure


def save_figure(found: Inspection, path: str | os.PathLike) -> Path:
    """Writes the figure as a PNG; ValueError for another ending, or as `draw_adapter`."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a name that ends in .png, got {path.name!r}")
    figure = draw_adapter(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: lambda draft: figure.savefig(draft, format="png", dpi=150)})
    return path
