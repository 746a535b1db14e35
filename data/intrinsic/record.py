"""Records how many dimensions facts need, resumably, and writes the card: every number in it is from the records.

python data/intrinsic/record.py
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lorakit._atomic import write_atomically
from lorakit.experiments.intrinsic import (
    COMMAND,
    PLANS,
    Arm,
    Plan,
    chosen,
    d90_by_seed,
    next_run,
    read,
    record,
    results,
)
from lorakit.experiments.stats import mean_interval

CARD = """# How many dimensions do facts need? Recorded runs

The tiny base ([its card](../tiny/README.md)) learns facts that it has never seen: in full, in random subspaces of its
parameters, and with LoRA. {files} hold every run; this card is computed from them.

- **Made by**: `{command}`, {total} runs, {cpu_minutes:.1f} CPU-minutes in all. Stopped, it goes on where it was.
- **Circumstances**: {device}; {versions}.
  Seeded; another processor rounds otherwise, so expect near, not equal numbers.
- **Licence**: Apache-2.0, like the code.
- **Each run**: {steps} steps of AdamW, every fact shown {epochs:.0f} times, 10 % warm-up, then linear decay.
- **Learning rate**: tuned for each arm over 3 or 4 rates with seed {tuning_seed}, which counts in no result; results
  are those of seeds {seeds}. A seed draws the facts, the subspace or LoRA's start, and the order. "edge" marks a best
  rate at the end of its sweep: a wider sweep might do better.

d90 is the smallest d at which recall reaches 90 % of full fine-tuning's with the same seed, read off a line between
measured points in log d. Source: Li et al. 2018 (arXiv:1804.08838); for fine-tuning Aghajanyan et al. 2020
(arXiv:2012.13255). In the tables: mean recall, lowest and highest over the seeds, loss in nats a token, and what is
left of the recall of facts that the base knew. A subspace's rate is the step of one parameter (`Arm.peak_lr`).
{sections}
## Known limits

- d90 here belongs to this base, these facts and this number of steps: a slow arm and a small one look alike.
- The subspace is a count sketch of equal buckets (`lorakit.layers.subspace.RandomSubspace`), not Fastfood as in the
  papers.
- {n_seeds} seeds: intervals are wide, and small differences between arms are not resolved.
- Facts are random digits, with no rule to be found; other tasks may need fewer dimensions for more examples.
"""
SECTION = """
## {n_facts} facts

They are {bits:.0f} bits; the base has {parameters:,} parameters. A run takes {cpu_seconds:.1f} CPU-seconds.

| seed | d90 |
|---|---|
{d90}

{interval}

| arm | trainable | rate | recall | lowest - highest | loss | known facts kept |
|---|---|---|---|---|---|---|
{rows}
"""


def _row(plan: Plan, runs: Sequence[Mapping[str, Any]], arm: Arm) -> str:
    mine, lrs = results(plan, runs, arm), plan.arms()[arm]
    lr = chosen(plan, runs, arm)["lr"]
    recalls = [each["recall"] for each in mine]
    name = {"full": "full fine-tuning", "lora": f"LoRA, rank {arm.size}", "subspace": f"subspace, d = {arm.size:,}"}
    loss, known = (fmean(each[key] for each in mine) for key in ("loss", "known_recall"))
    edge = " (edge)" if lr in (min(lrs), max(lrs)) else ""
    return (
        f"| {name[arm.kind]} | {mine[0]['trainable']:,} | {lr:g}{edge} | {fmean(recalls):.1%} "
        f"| {min(recalls):.1%} - {max(recalls):.1%} | {loss:.3f} | {known:.1%} |"
    )


def _interval(values: Sequence[float]) -> str:
    """The sentence on all seeds: a geometric mean, or that the grid ends too early."""
    if not all(map(math.isfinite, values)):
        return "At least one seed does not reach 90 % within the grid, so no mean is given."
    mean, low, high = (math.exp(value) for value in mean_interval([math.log(value) for value in values]))
    return f"Geometric mean {mean:,.0f}, 95 % interval {low:,.0f} to {high:,.0f} (Student's t on log d90)."


def _section(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> str:
    by_seed = d90_by_seed(plan, runs)
    return SECTION.format(
        n_facts=plan.n_facts,
        bits=plan.n_facts * math.log2(10_000),
        parameters=next(each["trainable"] for each in runs if each["kind"] == "full"),
        cpu_seconds=fmean(each["cpu_seconds"] for each in runs),
        d90="\n".join(f"| {seed} | {value:,.0f} |" for seed, value in by_seed.items()),
        interval=_interval(list(by_seed.values())),
        rows="\n".join(_row(plan, runs, arm) for arm in plan.arms()),
    )


def write(folder: str | os.PathLike, files: Sequence[str] = tuple(PLANS)) -> None:
    """Writes `README.md` beside complete records.

    Raises:
        ValueError: runs are missing.
    """
    records = {file: read(folder, file) for file in files}
    for file, (plan, runs) in records.items():
        if next_run(plan, runs) is not None:
            raise ValueError(f"expected {file} in {folder} to be complete, got {len(runs)} runs: {COMMAND}")
    runs = [each for _, some in records.values() for each in some]
    plan = records[files[0]][0]
    card = CARD.format(
        command=COMMAND,
        files=" and ".join(f"`{file}`" for file in files),
        total=len(runs),
        steps=plan.steps,
        epochs=plan.steps * plan.batch_size / plan.n_facts,
        tuning_seed=plan.tuning_seed,
        seeds=", ".join(map(str, plan.seeds)),
        n_seeds=len(plan.seeds),
        cpu_minutes=sum(each["cpu_seconds"] for each in runs) / 60,
        device="; ".join(sorted({each["device"] for each in runs})),
        versions=", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items()),
        sections="".join(_section(*each) for each in records.values()),
    )
    write_atomically({Path(folder) / "README.md": card.encode()})


if __name__ == "__main__":
    for name in PLANS:
        record(Path(__file__).parent, name)
    write(Path(__file__).parent)
