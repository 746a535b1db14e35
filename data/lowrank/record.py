"""Trains LoRA adapters of two ranks with several seeds on the SQL task and records how alike their subspaces are.

    python data/lowrank/record.py

writes results.json and adapters.safetensors beside this file: lesson 01 reads both. About six minutes on two cores.
A trained adapter is kept in runs/lowrank, so that a second start trains only what is missing.
"""

import json
import os
import platform
from itertools import combinations
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

import lorakit
from lorakit._atomic import write_atomically
from lorakit.layers import lowrank
from lorakit.models.load import load_model

HERE = Path(__file__).parent
PARTS = Path("runs/lowrank")
ARMS = {"r8-seed0": (8, 0), "r64-seed1": (64, 1), "r64-seed2": (64, 2)}  # rank, seed
SETTINGS = {"alpha_over_rank": 2, "targets": "all-linear", "steps": 44, "batch_size": 8, "lr": 3e-3}
KEPT = ("model.layers.15.self_attn.q_proj", "model.layers.15.self_attn.v_proj")  # their matrices are stored, float32
DIRECTIONS = (1, 2, 4, 8)
TEST_ITEMS = 96


def examples(tokenizer, split, n=None):
    return lorakit.SQL.encode(tokenizer, lorakit.load_sql(split)[:n])


def train(rank, seed):
    """Trains one adapter; returns its A before, A and B after (layer/letter -> matrix), and what to record of it."""
    model, tokenizer = load_model("smollm2")
    torch.manual_seed(seed)
    lorakit.inject(model, rank, SETTINGS["alpha_over_rank"] * rank, targets=SETTINGS["targets"])
    matrices = {f"{name}/A0": layer.A.detach().clone() for name, layer in lorakit.adapters(model).items()}
    settings = {key: SETTINGS[key] for key in ("steps", "batch_size", "lr")}
    history = lorakit.fit(model, examples(tokenizer, "train"), seed=seed, **settings)
    right = lorakit.exact_match(model, examples(tokenizer, "tables", TEST_ITEMS))
    for name, layer in lorakit.adapters(model).items():
        matrices |= {f"{name}/A": layer.A.detach(), f"{name}/B": layer.B.detach()}
    run = {"rank": rank, "seed": seed, "first_loss": history.loss[0], "last_loss": history.loss[-1]}
    run |= {"right": sum(right), "items": len(right), "seconds": round(sum(history.seconds))}
    return matrices, run


def trained(arm, rank, seed):
    """`train`, or what an earlier start has kept of it with the same settings."""
    key = json.dumps(SETTINGS | {"rank": rank, "seed": seed, "items": TEST_ITEMS})
    part = PARTS / f"{arm}.safetensors"
    if part.exists():
        with safe_open(part, "pt") as file:
            if file.metadata()["key"] == key:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["run"])  # noqa: SIM118
    matrices, run = train(rank, seed)
    PARTS.mkdir(parents=True, exist_ok=True)
    write_atomically({part: save(matrices, {"key": key, "run": json.dumps(run)})})
    return matrices, run


def compare(left, right):
    """Mean similarity over the layers of each kind: kind -> number of directions -> value."""
    sums = {}
    for name in left:
        for k in DIRECTIONS:
            value = lowrank.subspace_similarity(left[name], right[name], k, k)
            sums.setdefault(name.rsplit(".", 1)[-1], {}).setdefault(str(k), []).append(value)
    return {kind: {k: sum(v) / len(v) for k, v in rows.items()} for kind, rows in sums.items()}


def main():
    matrices, runs = {}, {}
    for arm, (rank, seed) in ARMS.items():
        matrices[arm], runs[arm] = trained(arm, rank, seed)
        print(arm, runs[arm], flush=True)
    layers = [key.removesuffix("/A") for key in matrices["r8-seed0"] if key.endswith("/A")]
    starts, A, B = (
        {arm: {name: m[f"{name}/{key}"] for name in layers} for arm, m in matrices.items()} for key in ("A0", "A", "B")
    )
    BT = {arm: {name: m.T for name, m in each.items()} for arm, each in B.items()}
    record = {
        "command": "python data/lowrank/record.py",
        "model": "smollm2",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lorakit": lorakit.__version__},
        "settings": SETTINGS | {"data": "SQL task, train"},
        "runs": runs,
        "similarity": {
            f"{a} {b}": {
                "A": compare(A[a], A[b]),
                "B": compare(BT[a], BT[b]),
                "A at the start": compare(starts[a], starts[b]),
            }
            for a, b in combinations(ARMS, 2)
        },
        "one layer": {
            f"{a} {b} {letter}": lowrank.subspace_similarity(of[a][KEPT[0]], of[b][KEPT[0]], 8, 8)
            for a, b in combinations(ARMS, 2)
            for letter, of in (("A", A), ("B", BT))
        },
        "similarity to its own start": {arm: compare(A[arm], starts[arm]) for arm in ARMS},
        "widths": {name.rsplit(".", 1)[-1]: list(m.shape) for name, m in A["r8-seed0"].items()},
    }
    kept = {
        f"{arm}/{name}/{letter}": matrices[arm][f"{name}/{letter}"].contiguous()
        for arm in ARMS
        for name in KEPT
        for letter in "AB"
    }
    save_file(kept, HERE / "adapters.safetensors")
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
