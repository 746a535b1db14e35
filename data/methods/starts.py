"""Where A and B start, on the tiny base: uniform (Kaiming), Gaussian, PiSSA, OLoRA, each at three learning rates.

    python data/methods/starts.py      36 short trainings, about four minutes on two cores

Lesson 05 reads starts.json.
"""

import math
from itertools import product
from pathlib import Path

import torch

import lorakit
from lorakit.experiments.recorded import record_runs
from lorakit.tasks.facts import encoded, facts, recall

FACTS, STEPS, RANK, ALPHA, SEEDS, RATES = 48, 150, 4, 8.0, (0, 1, 2), (1e-3, 3e-3, 1e-2)
STARTS = {"Kaiming": None, "Gaussian": None, "PiSSA": lorakit.pissa_start, "OLoRA": lorakit.olora_start}


def run(start, lr, seed):
    """One training: the facts known afterwards, and the mean loss of the first fifty steps."""
    model, tokenizer = lorakit.load_model("tiny")
    items = facts(FACTS, seed)
    torch.manual_seed(seed)
    if STARTS[start]:
        lorakit.inject(model, RANK, ALPHA, layer=lorakit.PiSSALinear, start=STARTS[start])
    else:
        lorakit.inject(model, RANK, ALPHA)
    if start == "Gaussian":
        for layer in lorakit.adapters(model).values():
            torch.nn.init.normal_(layer.A, std=1 / RANK)  # as PEFT's "gaussian" has it
    try:
        losses = lorakit.fit(model, encoded(tokenizer, items), steps=STEPS, lr=lr, seed=seed, show=False).loss
    except FloatingPointError:
        return {"recall": 0.0, "early": math.inf}
    return {"recall": round(recall(model, tokenizer, items), 4), "early": round(sum(losses[:50]) / 50, 4)}


if __name__ == "__main__":
    record_runs(
        Path(__file__).with_name("starts.json"),
        [{"start": start, "lr": lr, "seed": seed} for start, lr, seed in product(STARTS, RATES, SEEDS)],
        run,
        "python data/methods/starts.py",
        model="tiny",
        settings={"facts": FACTS, "steps": STEPS, "rank": RANK, "alpha": ALPHA, "batch_size": 8},
    )
