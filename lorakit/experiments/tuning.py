"""What an arm is worth at settings that were chosen without the seed that is scored."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorakit._numbers import check_list, is_number
from lorakit._words import short

if TYPE_CHECKING:
    import pandas as pd

Setting = dict[str, Any]  # axis, such as lr -> the value tried


@dataclass(frozen=True)
class Tuned:
    """An arm of an ablation after its own tuning, and what its sweep leaves open."""

    values: Mapping[Hashable, float]  # seed -> the score at the setting that the other seeds chose
    choices: Mapping[Hashable, Setting]  # seed -> that setting
    best: tuple[Setting, ...]  # the setting that all seeds choose together; more than one if they share the best
    flags: Mapping[str, str]  # "tie", "edge", "untuned" -> what is the matter
    lower_is_better: bool = False

    def __str__(self) -> str:
        return " or ".join(map(_name, self.best)) + "".join(f"; {flag}: {why}" for flag, why in self.flags.items())


def _name(setting: Setting) -> str:
    return ", ".join(f"{axis} {value:g}" if is_number(value) else f"{axis} {value}" for axis, value in setting.items())


def tune(
    frame: "pd.DataFrame",
    arm: str,
    axes: Sequence[str],
    score: str,
    by: str,
    seed: str = "seed",
    lower_is_better: bool = False,
) -> dict[Any, Tuned]:
    """The settings of each arm chosen on one split and scored on another, every seed where the *others* are best.

    The best mean of a sweep is too good, as a maximum over noise, and the more settings, the better it looks. Leaving
    the scored seed out of the choice takes this advantage away (cross-validation over seeds, Stone 1974, J. R. Stat.
    Soc. B 36, 111-147). Of settings that share the best, the one that comes first in the frame is taken.

    The flags are about the setting that all seeds choose together. "tie": several share the best, so that none of them
    may be called it. "edge": on some axis of numbers the best is the first or the last that was tried, among all
    settings or among those that are equal to it on the other axes, so that a better one may lie outside. "untuned": an
    axis has one value, so that it was not tuned at all. An axis of names has no order, and no edges.

    Args:
        frame: one row a run, as `sweep` returns it; every arm has every seed at each of its settings once. The settings
            need not be a full grid.
        arm: the column that names the arms.
        axes: the columns that are tuned, all of them: learning rate, alpha, steps, ...
        score: the column that is reported, such as the share of right answers of a test.
        by: the column that chooses, of the split `validation`.
        seed: the column of seeds.
        lower_is_better: of both columns, as of a loss.

    Returns:
        arm -> `Tuned`, in order of appearance.

    Raises:
        ValueError: there is no such column; a run is missing, failed or there twice; fewer than two seeds. What a run
            that diverged is worth, you say before: `frame.fillna({"correct": 0})`.
    """
    check_list("axes", axes)
    if missing := [name for name in (arm, *axes, score, by, seed) if name not in frame]:
        raise ValueError(f"expected columns of the frame, got {', '.join(map(str, missing))}")
    if not len(axes):
        raise ValueError("expected at least one axis that is tuned, got none")
    sign = -1.0 if lower_is_better else 1.0
    found = {}
    for name, group in frame.groupby(arm, sort=False):
        chosen: dict[tuple, dict[Hashable, float]] = {}  # setting -> seed -> how good it is where settings are chosen
        scored: dict[tuple, dict[Hashable, float]] = {}
        columns = (group[column].tolist() for column in (seed, by, score))
        settings = zip(*(group[axis] for axis in axes), strict=True)
        for setting, one, choose, value in zip(settings, *columns, strict=True):
            if any(each != each for each in setting):
                raise ValueError(f"expected a value on each axis, got {short(list(setting))} for {arm} {name!r}")
            if one in chosen.setdefault(setting, {}):
                raise ValueError(f"expected one run for each setting and seed, got more for {arm} {name!r}")
            if not all(is_number(each) and math.isfinite(each) for each in (choose, value)):
                raise ValueError(f"expected finite {by} and {score}, got {short([choose, value])} for {arm} {name!r}")
            chosen[setting][one], scored.setdefault(setting, {})[one] = sign * choose, value
        found[name] = _tuned(chosen, scored, tuple(axes), f"{arm} {name!r}", lower_is_better)
    return found


def _tuned(
    chosen: dict[tuple, dict[Hashable, float]],
    scored: dict[tuple, dict[Hashable, float]],
    axes: tuple[str, ...],
    where: str,
    lower_is_better: bool,
) -> Tuned:
    seeds = sorted(next(iter(chosen.values())), key=lambda one: (str(type(one)), one))
    if len(seeds) < 2 or any(set(row) != set(seeds) for row in chosen.values()):
        raise ValueError(f"expected the same two or more seeds for each setting, some are missing for {where}")
    others = {one: [other for other in seeds if other != one] for one in seeds}
    choices = {one: _best(chosen, rest)[0] for one, rest in others.items()}
    best = _best(chosen, seeds)
    flags = {}
    if len(best) > 1:
        names = (_name(dict(zip(axes, setting, strict=True))) for setting in best)
        flags["tie"] = f"best is shared by {' and '.join(names)}"
    edges = [text for k, axis in enumerate(axes) if (text := _edge(k, axis, best, list(chosen)))]
    flags |= {"edge": ", ".join(edges)} if edges else {}
    fixed = [axis for k, axis in enumerate(axes) if len({setting[k] for setting in chosen}) == 1]
    flags |= {"untuned": f"{' and '.join(fixed)} had one value"} if fixed else {}
    return Tuned(
        {one: scored[setting][one] for one, setting in choices.items()},
        {one: dict(zip(axes, setting, strict=True)) for one, setting in choices.items()},
        tuple(dict(zip(axes, setting, strict=True)) for setting in best),
        flags,
        lower_is_better,
    )


def _best(chosen: dict[tuple, dict[Hashable, float]], seeds: Sequence[Hashable]) -> list[tuple]:
    """The settings whose means over these seeds are the largest, but for what rounding makes of equal ones."""
    means = {setting: fmean(row[one] for one in seeds) for setting, row in chosen.items()}
    top = max(means.values())
    return [setting for setting, mean in means.items() if math.isclose(mean, top, rel_tol=1e-9, abs_tol=1e-12)]


def _edge(k: int, axis: str, best: list[tuple], tried: list[tuple]) -> str:
    """Says at which end of an axis the best settings are; nothing if one is inside, or names have no ends."""
    if len({setting[k] for setting in tried}) == 1 or not all(is_number(setting[k]) for setting in tried):
        return ""
    ends = []
    for setting in best:
        beside = [other for other in tried if other[:k] + other[k + 1 :] == setting[:k] + setting[k + 1 :]]
        for lot in (tried, beside if len(beside) > 1 else tried):
            values = [other[k] for other in lot]
            if setting[k] in (min(values), max(values)):
                end = "lowest" if setting[k] == min(values) else "highest"
                ends.append(f"best {axis}, {setting[k]:g}, is the {end} tried")
                break
        else:
            return ""
    return ends[0]
