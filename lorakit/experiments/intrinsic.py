"""How many dimensions a task needs: training in random subspaces, recorded run by run, and d90 read off.

`python data/intrinsic/record.py` teaches the tiny base 24 and 48 facts in random d-dimensional subspaces of its
parameters, with LoRA and in full, each at its own best learning rate. Stopped, it goes on where it was.
Sources: Li et al. 2018 (arXiv:1804.08838), who name d90; Aghajanyan et al. 2020 (arXiv:2012.13255), for fine-tuning.
"""

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit._atomic import write_atomically
from lorakit._progress import Progress
from lorakit.layers.subspace import RandomSubspace
from lorakit.models.download import fetch_model
from lorakit.models.inject import count, inject
from lorakit.models.load import load_model
from lorakit.models.manifest import sha256
from lorakit.tasks.facts import encoded, facts, known_facts, recall
from lorakit.training.batch import collate
from lorakit.training.fit import fit
from lorakit.training.loss import completion_loss

COMMAND = "python data/intrinsic/record.py"


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
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject(model, rank=self.size, alpha=2 * self.size)
        return model, count(model).trainable

    def peak_lr(self, step: float, parameters: int) -> float:
        """AdamW's learning rate: in a subspace such that each of the D parameters moves by about `step` a step.

        An entry of P is `sqrt(d / D)` in size, so that z must move by `step sqrt(D / d)`.
        """
        return step * math.sqrt(parameters / self.size) if self.kind == "subspace" else step


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


# The recorded grids by file. Twice the facts in twice the batch: as many epochs, and does d90 double?
PLANS = {
    "results.json": Plan(),
    "results_48.json": Plan(n_facts=48, batch_size=16, dimensions=(256, 512, 1024, 2048, 4096)),
}


def run(arm: Arm, lr: float, seed: int, plan: Plan) -> dict[str, Any]:
    """Trains once and measures; a function of its arguments, on one machine.

    Args:
        arm: how to train.
        lr: peak learning rate, or step of a parameter in a subspace, see `Arm.peak_lr`.
        seed: of facts, subspace or LoRA's start, and order.
        plan: number of facts, steps and batch size.

    Returns:
        the record: recall, loss in nats a token, recall of what the base knew, CPU-seconds, and the circumstances.
    """
    (model, tokenizer), items = load_model("tiny"), facts(plan.n_facts, seed)
    parameters = count(model).total
    trained, trainable = arm.prepare(model, seed)
    cpu = time.process_time()
    fit(
        trained,
        encoded(tokenizer, items),
        steps=plan.steps,
        batch_size=plan.batch_size,
        lr=arm.peak_lr(lr, parameters),
        seed=seed,
        show=False,
    )
    cpu = time.process_time() - cpu
    loss = completion_loss(trained, collate(encoded(tokenizer, items))).item()
    return {
        **asdict(arm),
        "seed": seed,
        "lr": lr,
        "recall": recall(trained, tokenizer, items),
        "loss": round(loss, 6),
        "known_recall": recall(trained, tokenizer, known_facts()),
        "trainable": trainable,
        "cpu_seconds": round(cpu, 2),
        "device": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "command": COMMAND,
    }


def chosen(plan: Plan, runs: Sequence[Mapping[str, Any]], arm: Arm) -> Mapping[str, Any]:
    """The tuning run that decides an arm's learning rate: the highest recall, of equals the lowest loss."""
    tuning = _of(runs, arm, [plan.tuning_seed])
    return max(tuning, key=lambda each: (each["recall"], -each["loss"]))


def results(plan: Plan, runs: Sequence[Mapping[str, Any]], arm: Arm) -> list[Mapping[str, Any]]:
    """An arm's runs at its chosen learning rate, in the order of the plan's seeds; the tuning run is none of them."""
    lr = chosen(plan, runs, arm)["lr"]
    return [each for each in _of(runs, arm, plan.seeds) if each["lr"] == lr]


def _of(runs: Sequence[Mapping[str, Any]], arm: Arm, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    mine = [each for each in runs if (each["kind"], each["size"]) == (arm.kind, arm.size)]
    return [each for seed in seeds for each in mine if each["seed"] == seed]


def next_run(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> tuple[Arm, float, int] | None:
    """The first run that is missing, as (arm, lr, seed), None if none is; an arm is tuned first, then repeated."""
    for arm, lrs in plan.arms().items():
        tuned = {each["lr"] for each in _of(runs, arm, [plan.tuning_seed])}
        for lr in lrs:
            if lr not in tuned:
                return arm, lr, plan.tuning_seed
        done = {each["seed"] for each in results(plan, runs, arm)}
        for seed in plan.seeds:
            if seed not in done:
                return arm, chosen(plan, runs, arm)["lr"], seed
    return None


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


def d90_by_seed(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """d90 of each seed, against full fine-tuning of the same facts."""
    curves: dict[int, dict[int, float]] = {seed: {} for seed in plan.seeds}
    for d in plan.dimensions:
        for each in results(plan, runs, Arm("subspace", d)):
            curves[each["seed"]][d] = each["recall"]
    full = {each["seed"]: each["recall"] for each in results(plan, runs, Arm("full", 0))}
    return {seed: d90(curve, full[seed]) for seed, curve in curves.items()}


def read(folder: str | os.PathLike, file: str = "results.json") -> tuple[Plan, list[dict[str, Any]]]:
    """The plan and the runs that `record` left in a folder, complete or not."""
    stored = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    plan = {key: tuple(value) if isinstance(value, list) else value for key, value in stored["plan"].items()}
    return Plan(**plan), stored["runs"]


def record(
    folder: str | os.PathLike, file: str = "results.json", plan: Plan | None = None, show: bool = True
) -> list[dict[str, Any]]:
    """Does the runs of a plan that a file lacks, one thread each, and saves after every one.

    Args:
        folder: made if missing.
        file: its name in the folder.
        plan: the grid; None for the course's, in `PLANS`.
        show: draw a progress bar.

    Returns:
        all records, those that were there and the new ones.

    Raises:
        ValueError: the file holds another plan's runs, or another base's.
    """
    plan, path = plan or PLANS[file], Path(folder) / file
    base = sha256(fetch_model("tiny") / "model.safetensors")
    head = json.loads(json.dumps({"plan": asdict(plan), "base_sha256": base}))
    runs: list[dict[str, Any]] = []
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        runs = stored.pop("runs")
        if stored != head:
            raise ValueError(f"expected the runs of this plan and base in {path}, got others: move the file away")
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(len(lrs) + len(plan.seeds) for lrs in plan.arms().values())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Progress(total, "recording", "run", show) as progress:
            progress.update(len(runs))
            while (todo := next_run(plan, runs)) is not None:
                runs.append(run(*todo, plan))
                lines = ",\n".join(json.dumps(each) for each in runs)
                text = f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'
                write_atomically({path: text.encode()})
                progress.update(1, f"{todo[0].kind} {todo[0].size}: recall {runs[-1]['recall']:.2f}")
    finally:
        torch.set_num_threads(threads)
    return runs
