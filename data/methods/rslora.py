"""Ranks, scale rules and learning rates on the tiny base: does rsLoRA do what another learning rate does not?

    python data/methods/rslora.py      120 trainings, many at once

Lesson 05 reads rslora.json.
"""

import time
from itertools import product
from pathlib import Path

import lorakit
from lorakit.experiments.recorded import record_runs
from lorakit.tasks.facts import encoded, facts, recall

RESULTS = Path(__file__).with_name("rslora.json")
FACTS, STEPS, ALPHA, SEEDS = 48, 150, 8.0, (0, 1, 2)
RANKS, RATES = (1, 4, 16, 256), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def run(rank, seed):
    """The recall of both rules at all rates: adapters of one rank and seed are trained together."""
    model, tokenizer = lorakit.load_model("tiny")
    items, start = facts(FACTS, seed), time.perf_counter()
    grid = list(product(("lora", "rslora"), RATES))
    specs = [lorakit.Spec(lorakit.LoRAConfig(rank, ALPHA, scale_rule=rule), lr, seed) for rule, lr in grid]
    recalls = {"lora": {}, "rslora": {}}
    for fitted, (rule, lr) in zip(
        lorakit.fit_many(model, encoded(tokenizer, items), specs, steps=STEPS, show=False), grid, strict=True
    ):
        fitted.attach(model)
        recalls[rule][f"{lr:g}"] = 0.0 if fitted.error else round(recall(model, tokenizer, items), 4)
        lorakit.remove(model)
    return {"recall": recalls, "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    record_runs(
        RESULTS,
        [{"rank": rank, "seed": seed} for rank in RANKS for seed in SEEDS],
        run,
        "python data/methods/rslora.py",
        model="tiny",
        settings={"facts": FACTS, "steps": STEPS, "alpha": ALPHA, "batch_size": 8},
    )
