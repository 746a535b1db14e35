"""Records how many dimensions facts need, resumably, and writes the card: every number in it is from the records.

    python data/intrinsic/record.py

teaches the tiny base 24, 48 and 96 facts in random d-dimensional subspaces of its parameters, with LoRA and in full,
each at its own best learning rate: a quarter of an hour on one core. Lesson 01 reads the records in trainings.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from lorakit._atomic import write_atomically
from lorakit.experiments.intrinsic import Arm, at_tuned_rate, d90_by_seed, tuned_rates
from lorakit.experiments.records import Settings, expand, frame, read_records
from lorakit.experiments.stats import mean_interval
from lorakit.experiments.sweep import sweep
from lorakit.models.download import fetch_model
from lorakit.models.load import load_model
from lorakit.models.manifest import sha256
from lorakit.tasks.facts import encoded, facts, known_facts, recall
from lorakit.training.batch import collate
from lorakit.training.loss import completion_loss

COMMAND = "python data/intrinsic/record.py"
FOLDER = Path(__file__).with_name("trainings")


@dataclass(frozen=True)
class Plan:
    """The whole grid. A learning rate is chosen with `tuning_seed` alone; the results are those of `seeds`."""

    dimensions: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
    subspace_steps: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)  # how far a parameter moves in a step
    ranks: tuple[int, ...] = (1, 4, 16)
    lora_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    full_lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)  # of the facts, the subspace or LoRA's start, and the order
    n_facts: int = 24
    steps: int = 200
    batch_size: int = 8

    def arms(self) -> dict[Arm, tuple[float, ...]]:
        """Every arm with its grid of learning rates (of steps, for subspaces)."""
        return (
            {Arm("full", 0): self.full_lrs}
            | {Arm("subspace", d): self.subspace_steps for d in self.dimensions}
            | {Arm("lora", rank): self.lora_lrs for rank in self.ranks}
        )

    def tuning(self) -> list[Settings]:
        """The runs that choose every arm's learning rate."""
        how = {name: getattr(self, name) for name in ("n_facts", "steps", "batch_size")}
        how |= {"model": "tiny", "base_sha256": sha256(fetch_model("tiny") / "model.safetensors")}
        return expand([asdict(arm) | {"lr": lrs, "seed": self.tuning_seed} | how for arm, lrs in self.arms().items()])

    def repeats(self, tuned: pd.DataFrame) -> list[Settings]:
        """The runs at the learning rates that the tuning runs have chosen.

        Raises:
            ValueError: tuning runs are missing.
        """
        if len(tuned) < len(self.tuning()):
            raise ValueError(f"expected {len(self.tuning())} tuning runs of {self.n_facts} facts, got {len(tuned)}")
        rates = tuned_rates(tuned).set_index(["kind", "size"]).lr
        return expand(
            setting | {"lr": float(rates[setting["kind"], setting["size"]]), "seed": list(self.seeds)}
            for setting in self.tuning()
        )


# Twice and four times the facts, in batches as much larger: as many epochs, and does d90 double each time?
PLANS = (
    Plan(),
    Plan(n_facts=48, batch_size=16, dimensions=(256, 512, 1024, 2048, 4096)),
    Plan(n_facts=96, batch_size=32, dimensions=(512, 1024, 2048, 4096)),
)


def run(
    kind: str,
    size: int,
    lr: float,
    seed: int,
    n_facts: int,
    steps: int,
    batch_size: int,
    model: str,
    base_sha256: str,  # names the base in the record
) -> dict[str, Any]:
    """Trains once and measures recall, loss in nats a token, recall of what the base knew, and CPU-seconds."""
    (base, tokenizer), items = load_model(model), facts(n_facts, seed)
    cpu = time.process_time()
    trained, trainable = Arm(kind, size).fit(
        base, encoded(tokenizer, items), lr, seed, steps=steps, batch_size=batch_size
    )
    return {
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "recall": recall(trained, tokenizer, items),
        "loss": round(completion_loss(trained, collate(encoded(tokenizer, items))).item(), 6),
        "known_recall": recall(trained, tokenizer, known_facts()),
        "trainable": trainable,
    }


def record(folder: str | os.PathLike, plan: Plan, show: bool = True) -> pd.DataFrame:
    """Makes the runs of a plan that a folder lacks, one thread each: each arm is tuned first, then repeated.

    Returns:
        all runs of the plan.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tuned = sweep(run, plan.tuning(), folder, command=COMMAND, show=show)
        return pd.concat([tuned, sweep(run, plan.repeats(tuned), folder, command=COMMAND, show=show)])
    finally:
        torch.set_num_threads(threads)


def read(folder: str | os.PathLike, plan: Plan) -> pd.DataFrame:
    """The runs of a plan that a folder holds.

    Raises:
        ValueError: runs are missing.
    """
    tuned = frame(folder, plan.tuning())
    repeats = plan.repeats(tuned)
    found = frame(folder, repeats)
    if len(found) < len(repeats):
        raise ValueError(f"expected {len(repeats)} repeated runs of {plan.n_facts} facts, got {len(found)}")
    return pd.concat([tuned, found])


CARD = """# How many dimensions do facts need? Recorded runs

The tiny base ([its card](../tiny/README.md)) learns facts that it has never seen: in full, in random subspaces of its
parameters, and with LoRA. The records in `trainings` hold every run; this card is computed from them.

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


def _row(runs: pd.DataFrame, arm: Arm, lrs: Sequence[float]) -> str:
    mine = runs[(runs.kind == arm.kind) & (runs["size"] == arm.size)]
    lr, recalls = mine.lr.iloc[0], mine.recall.tolist()
    name = {"full": "full fine-tuning", "lora": f"LoRA, rank {arm.size}", "subspace": f"subspace, d = {arm.size:,}"}
    edge = " (edge)" if lr in (min(lrs), max(lrs)) else ""
    return (
        f"| {name[arm.kind]} | {mine.trainable.iloc[0]:,} | {lr:g}{edge} | {fmean(recalls):.1%} "
        f"| {min(recalls):.1%} - {max(recalls):.1%} | {fmean(mine.loss):.3f} | {fmean(mine.known_recall):.1%} |"
    )


def _interval(values: Sequence[float]) -> str:
    """The sentence on all seeds: a geometric mean, or that the grid ends too early."""
    if not all(map(math.isfinite, values)):
        return "At least one seed does not reach 90 % within the grid, so no mean is given."
    mean, low, high = (math.exp(value) for value in mean_interval([math.log(value) for value in values]))
    return f"Geometric mean {mean:,.0f}, 95 % interval {low:,.0f} to {high:,.0f} (Student's t on log d90)."


def _section(plan: Plan, runs: pd.DataFrame) -> str:
    tuned = at_tuned_rate(runs, tuning_seed=plan.tuning_seed)
    by_seed = d90_by_seed(tuned)
    return SECTION.format(
        n_facts=plan.n_facts,
        bits=plan.n_facts * math.log2(10_000),
        parameters=runs[runs.kind == "full"].trainable.iloc[0],
        cpu_seconds=fmean(runs.cpu_seconds),
        d90="\n".join(f"| {seed} | {value:,.0f} |" for seed, value in by_seed.items()),
        interval=_interval(list(by_seed.values())),
        rows="\n".join(_row(tuned, arm, lrs) for arm, lrs in plan.arms().items()),
    )


def write(folder: str | os.PathLike, card: str | os.PathLike, plans: Sequence[Plan] = PLANS) -> None:
    """Writes the card of complete records.

    Raises:
        ValueError: runs are missing.
    """
    studies, plan = {each: read(folder, each) for each in plans}, plans[0]
    records: list[Mapping[str, Any]] = read_records(folder)
    runs = pd.concat(studies.values())
    text = CARD.format(
        command=COMMAND,
        total=len(runs),
        steps=plan.steps,
        epochs=plan.steps * plan.batch_size / plan.n_facts,
        tuning_seed=plan.tuning_seed,
        seeds=", ".join(map(str, plan.seeds)),
        n_seeds=len(plan.seeds),
        cpu_minutes=sum(runs.cpu_seconds) / 60,
        device="; ".join(sorted({each["device"] for each in records})),
        versions=", ".join(f"{name} {version}" for name, version in records[0]["versions"].items()),
        sections="".join(_section(*each) for each in studies.items()),
    )
    write_atomically({Path(card): text.encode()})


def main() -> None:
    for plan in PLANS:
        record(FOLDER, plan)
    write(FOLDER, Path(__file__).with_name("README.md"))


if __name__ == "__main__":
    main()
