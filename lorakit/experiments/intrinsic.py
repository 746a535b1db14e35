"""How many dimensions a task needs: training in random subspaces, with LoRA and in full, and d90 read off the results.

Sources: Li et al. 2018 (arXiv:1804.08838), who name d90; Aghajanyan et al. 2020 (arXiv:2012.13255), for fine-tuning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit._random import seeded
from lorakit.layers.subspace import RandomSubspace
from lorakit.models.inject import count, inject
from lorakit.training.batch import Example
from lorakit.training.fit import fit

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Arm:
    """One way to train: `"subspace"` of `size` dimensions, `"lora"` of rank `size`, or `"full"` with size 0."""

    kind: str
    size: int

    def prepare(self, model: nn.Module, seed: int) -> tuple[nn.Module, int]:
        """Makes the model trainable in this way; returns what `fit` trains and the number of trainable parameters."""
        if self.kind == "subspace":
            return RandomSubspace(model, self.size, seed), self.size
        if self.kind == "lora":
            with seeded(seed):
                inject(model, rank=self.size, alpha=2 * self.size)
        return model, count(model).trainable

    def peak_lr(self, step: float, parameters: int) -> float:
        """AdamW's learning rate: in a subspace such that each of the D parameters moves by about `step` a step.

        An entry of P is `sqrt(d / D)` in size, so that z must move by `step sqrt(D / d)`.
        """
        return step * math.sqrt(parameters / self.size) if self.kind == "subspace" else step

    def fit(
        self, model: nn.Module, examples: Sequence[Example], lr: float, seed: int = 0, **recipe: Any
    ) -> tuple[nn.Module, int]:
        """Trains a model in this way.

        Args:
            model: as it was loaded.
            examples: of the task.
            lr: peak learning rate, or the step of a parameter in a subspace, see `peak_lr`.
            seed: of the subspace or LoRA's start, and of the order.
            recipe: `steps`, `batch_size` and what else `fit` takes.

        Returns:
            what was trained, to be tested in place of the model, and the number of trainable parameters.
        """
        parameters = count(model).total
        trained, trainable = self.prepare(model, seed)
        fit(trained, examples, lr=self.peak_lr(lr, parameters), seed=seed, show=False, **recipe)
        return trained, trainable


def tuned_rates(tuning: "pd.DataFrame", by: Sequence[str] = ("kind", "size")) -> "pd.DataFrame":
    """The learning rate of each arm whose run has the highest recall, of equals the lowest loss.

    Args:
        tuning: one row a run of one seed: the columns of `by`, `lr`, `recall` and `loss`.
        by: the columns that name an arm.

    Returns:
        the columns of `by`, and `lr`.
    """
    ranked = tuning.sort_values(["recall", "loss"], ascending=[False, True], kind="stable")
    return ranked.drop_duplicates(list(by))[[*by, "lr"]]


def at_tuned_rate(runs: "pd.DataFrame", by: Sequence[str] = ("kind", "size"), tuning_seed: int = 0) -> "pd.DataFrame":
    """The runs of each arm at the learning rate that one seed has chosen, without those of that seed.

    Args:
        runs: as for `tuned_rates`, of all seeds.
        by: the columns that name an arm.
        tuning_seed: whose runs decide.
    """
    rates = tuned_rates(runs[runs.seed == tuning_seed], by)
    return runs[runs.seed != tuning_seed].merge(rates, on=[*by, "lr"])


def d90(recalls: Mapping[int, float], full: float, share: float = 0.9) -> float:
    """The smallest d at which recall reaches `share` of full fine-tuning's, on lines between points in log d.

    Args:
        recalls: d -> recall in [0, 1], of one seed.
        full: recall of full fine-tuning with the same seed.
        share: 0.9 for d90.

    Returns:
        A real number of dimensions; the smallest d if that is enough already, infinity if none is.

    Raises:
        ValueError: no points, or full fine-tuning has learnt nothing.
    """
    if not recalls or not full > 0:
        raise ValueError(f"expected recalls and a full recall above 0, got {len(recalls)} and {full}")
    points, target = sorted(recalls.items()), share * full
    if points[0][1] >= target:
        return float(points[0][0])
    for (d0, low), (d1, high) in pairwise(points):
        if high >= target:
            return d0 * (d1 / d0) ** ((target - low) / (high - low))
    return math.inf


def d90_by_seed(runs: "pd.DataFrame") -> dict[int, float]:
    """d90 of each seed, against full fine-tuning with the same seed.

    Args:
        runs: one row for each seed and arm, as `at_tuned_rate` returns them: `kind`, `size`, `seed`, `recall`.
    """
    full = runs[runs.kind == "full"].set_index("seed").recall
    return {
        int(seed): d90(dict(zip(group["size"].tolist(), group.recall.tolist(), strict=True)), full[seed])
        for seed, group in runs[runs.kind == "subspace"].groupby("seed")
    }
