"""Records how alike the subspaces of trained LoRA adapters are, and how the optimiser shapes a full update's spectrum.

    python data/lowrank/record.py

records in trainings and pairs, and writes adapters.safetensors beside this file: about six minutes on two cores. A
trained adapter is kept in runs/lowrank, which is not part of the repository, and trained again if it is gone. The
records in optimizers, of the tiny base, take three more. Lesson 01 reads all of it; a second start makes only the runs
that are missing.
"""

import os
import time
from collections import deque
from functools import partial
from itertools import combinations
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file, save, save_file

import lorakit
from lorakit._atomic import write_atomically
from lorakit.experiments.records import record_path
from lorakit.experiments.sweep import sweep
from lorakit.layers import lowrank
from lorakit.tasks.facts import facts, recall
from lorakit.tasks.task import encoded
from lorakit.training.batch import collate
from lorakit.training.loss import completion_loss

HERE = Path(__file__).resolve().parent
PARTS = HERE.parents[1] / "runs" / "lowrank"
HOW = {"model": "smollm2", "version": 1, "targets": "all-linear", "alpha_over_rank": 2}  # version: of the SQL task
HOW |= {"steps": 44, "batch_size": 8, "lr": 3e-3}
TRAININGS = {f"r{rank}-seed{seed}": {"rank": rank, "seed": seed} | HOW for rank, seed in ((8, 0), (64, 1), (64, 2))}
PAIRS = [{"left": left, "right": right} | HOW for left, right in combinations(TRAININGS, 2)]
KEPT = ("model.layers.15.self_attn.q_proj", "model.layers.15.self_attn.v_proj")  # their matrices are stored, float32
DIRECTIONS = (1, 2, 4, 8)
TEST_ITEMS = 96
OPTIMIZERS = {"adamw": None, "sgd": torch.optim.SGD, "momentum": partial(torch.optim.SGD, momentum=0.9)}
RATES = {"adamw": [1e-3, 3e-3, 1e-2], "sgd": [0.1, 0.3, 1.0], "momentum": [0.01, 0.03, 0.1, 0.3]}
FULL = {"model": "tiny", "n_facts": 24, "steps": 600, "batch_size": 8, "until": 0.05}  # until: nats a token
TUNING_SEED, SEEDS = 0, [1, 2, 3, 4, 5]


def examples(tokenizer, split, version, n=None):
    return lorakit.SQL.encode(tokenizer, lorakit.load_sql(split, version=version)[:n])


def part(**setting):
    """Where a training's matrices are kept."""
    return record_path(PARTS, setting).with_suffix(".safetensors")


def train(rank, seed, model, version, targets, alpha_over_rank, **recipe):
    """Trains one adapter and keeps its A before, A and B after, as `layer/letter`; returns what to record of it."""
    how = {"model": model, "version": version, "targets": targets, "alpha_over_rank": alpha_over_rank}
    file = part(rank=rank, seed=seed, **how, **recipe)
    plain, tokenizer = lorakit.load_model(model)
    torch.manual_seed(seed)
    lorakit.inject(plain, rank, alpha_over_rank * rank, targets=targets)
    adapters = lorakit.adapters(plain)
    matrices = {f"{name}/A0": layer.A.detach().clone() for name, layer in adapters.items()}
    history = lorakit.fit(plain, examples(tokenizer, "train", version), seed=seed, **recipe, show=False)
    for name, layer in adapters.items():
        matrices |= {f"{name}/A": layer.A.detach(), f"{name}/B": layer.B.detach()}
    PARTS.mkdir(parents=True, exist_ok=True)
    write_atomically({file: save(matrices)})
    right = lorakit.exact_match(plain, examples(tokenizer, "tables", version, TEST_ITEMS), show=False)
    return {
        "first_loss": history.loss[0],
        "last_loss": history.loss[-1],
        "right": sum(right),
        "items": len(right),
        "train_seconds": round(sum(history.seconds)),
        "to_its_start": alike(of(matrices, "A"), of(matrices, "A0")),
        "widths": {kind(name): list(layer.A.shape) for name, layer in adapters.items()},
    }


def matrices(name):
    """What a training has left; it is repeated if the file is gone."""
    if not part(**TRAININGS[name]).exists():
        train(**TRAININGS[name])
    return load_file(part(**TRAININGS[name]))


def of(matrices, letter):
    """The matrices of one letter by layer, B transposed: rows are directions."""
    found = {key.removesuffix(f"/{letter}"): m for key, m in matrices.items() if key.endswith(f"/{letter}")}
    return {layer: m.T if letter == "B" else m for layer, m in found.items()}


def kind(layer):
    return layer.rsplit(".", 1)[-1]


def alike(left, right):
    """Mean similarity over the layers of each kind: kind -> number of directions -> value."""
    sums = {}
    for name in left:
        for k in DIRECTIONS:
            value = lowrank.subspace_similarity(left[name], right[name], k, k)
            sums.setdefault(kind(name), {}).setdefault(str(k), []).append(value)
    return {kind: {k: sum(v) / len(v) for k, v in rows.items()} for kind, rows in sums.items()}


def compare(left, right, **how):
    """How alike the subspaces of two trainings are: of A, of B, of A at the start; and in one layer that is kept."""
    both = [matrices(name) for name in (left, right)]
    found = {letter: [of(each, letter) for each in both] for letter in ("A", "B", "A0")}
    one = {letter: lowrank.subspace_similarity(*(m[KEPT[0]] for m in found[letter]), 8, 8) for letter in "AB"}
    start = {"A at the start": alike(*found["A0"])}
    return {letter: alike(*found[letter]) for letter in "AB"} | start | {"one layer": one}


def fine_tune(optimizer, lr, seed, model, n_facts, steps, batch_size, until):
    """Teaches facts to every weight until their loss is low; returns how far it came, and its updates' spectra."""
    (plain, tokenizer), cpu = lorakit.load_model(model), time.process_time()
    layers = {name: plain.get_submodule(name) for name in lorakit.find_targets(plain)}
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    items, recent = facts(n_facts, seed), deque(maxlen=n_facts // batch_size)  # the losses of each fact's last batch

    def enough(step):
        recent.append(step.loss)
        return "stop" if len(recent) == recent.maxlen and sum(recent) / len(recent) < until else None

    history = lorakit.fit(
        plain,
        encoded(tokenizer, items),
        lr=lr,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        schedule="constant",
        optimizer=OPTIMIZERS[optimizer],
        after_step=enough,
        show=False,
    )
    with torch.no_grad():
        loss = completion_loss(plain, collate(encoded(tokenizer, items))).item()
        spectra = [torch.linalg.svdvals(layer.weight - start[name]) for name, layer in layers.items()]
    measures = {"stable": lowrank.stable_rank, "effective": lowrank.effective_rank, "norm": torch.linalg.vector_norm}
    measures["energy at 8"] = partial(lowrank.captured_energy, k=8)
    means = {name: sum(float(measure(s)) for s in spectra) / len(spectra) for name, measure in measures.items()}
    reached = {"steps_made": len(history.loss), "loss": loss, "recall": recall(plain, tokenizer, items)}
    return reached | means | {"cpu_seconds": round(time.process_time() - cpu, 2)}


def tuning():
    """The runs that choose each optimiser's learning rate: the one that is there in the fewest steps."""
    return [{"optimizer": name, "lr": lr, "seed": TUNING_SEED} | FULL for name, rates in RATES.items() for lr in rates]


def repeats(tuned):
    """The runs that count: every optimiser at its best rate, paired by seed."""
    best = tuned.sort_values(["steps_made", "loss"]).drop_duplicates("optimizer").set_index("optimizer").lr
    return [{"optimizer": name, "lr": float(best[name]), "seed": seed} | FULL for name in RATES for seed in SEEDS]


def main():
    tuned = sweep(fine_tune, tuning(), HERE / "optimizers", command="python data/lowrank/record.py")
    sweep(fine_tune, repeats(tuned), HERE / "optimizers", command="python data/lowrank/record.py")
    sweep(train, TRAININGS.values(), HERE / "trainings", command="python data/lowrank/record.py")
    sweep(compare, PAIRS, HERE / "pairs", command="python data/lowrank/record.py")
    file = HERE / "adapters.safetensors"
    if not file.exists() or all(part(**setting).exists() for setting in TRAININGS.values()):
        found = {name: matrices(name) for name in TRAININGS}
        keys = [f"{layer}/{letter}" for layer in KEPT for letter in "AB"]
        kept = {f"{name}/{key}": found[name][key].contiguous() for name in found for key in keys}
        write_atomically({file: lambda path: save_file(kept, path)})


if __name__ == "__main__":
    main()
