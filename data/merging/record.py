"""Trains two skills on SmolLM2, combines them by several methods, merges one by several routes, and scores it all.

    python data/merging/record.py [part ...]      all runs, or those of some parts of `PARTS`; about an hour

Lesson 07 reads the records in rates, skills and routes; skills are made at the rates that those in rates show
best. A second start makes only the runs that are missing. Trained adapters are kept in runs/merging, not part of
the repository, and trained again if they are gone.
"""

import os
import sys
from functools import cache, lru_cache
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import lorakit
from lorakit.experiments.records import expand, frame
from lorakit.experiments.sweep import sweep
from lorakit.merging.arithmetic import dare, linear, ties
from lorakit.merging.updates import Update, read_updates
from lorakit.tasks.extraction import messages
from lorakit.tasks.sql.task import generate
from lorakit.tasks.task import encoded
from lorakit.training.evaluate import kl_divergence, log_probabilities, share_and_nats

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE.parents[1] / "runs" / "merging"
SKILLS = ["sql", "records"]
ITEMS = {"validation": 24, "test": 40}  # of each skill
HOW = {"model": "smollm2", "version": 2, "steps": 24, "batch_size": 8, "rank": 8, "alpha": 32}  # version: of SQL
RATES = [
    {"skill": "sql", "lr": [2e-3, 4e-3, 8e-3], "seed": 0} | HOW,
    {"skill": "records", "lr": [2e-3, 4e-3, 8e-3], "seed": 0} | HOW,
]
SEEDS = [0, 1, 2, 3, 4]  # of the skills
ROUTES = ["unmerged", "float32", "bfloat16", "float32, then NF4", "NF4", "NF4, then float32", "NF4, then NF4"]
OF_ROUTES = {"base": ["float32", "NF4"], "route": ROUTES, "lr": 2e-3, "seed": [0, 1, 2]} | HOW
OF_ROUTES |= {"version": 1, "steps": 32}  # the first edition, at the rate that was best there


def best_rate(skill):
    """The rate with the most right answers on the validation items; of equals the one with less loss there."""
    runs = frame(HERE / "rates", expand(RATES))
    assert len(runs) == len(expand(RATES)), "another process is still tuning"
    return float(runs[runs.skill == skill].sort_values(["right", "nats"], ascending=[False, True]).lr.iloc[0])


def skills_grid():
    """Seed after seed; within one, the weights of a combination behind each other."""
    rates = {f"{skill}_lr": best_rate(skill) for skill in SKILLS}
    methods = [
        {"method": ["sql alone", "records alone"], "density": 1.0, "weight": 1.0},
        {"method": "sum", "density": 1.0, "weight": [0.2, 0.3, 0.5, 0.8]},
        {"method": "TIES", "density": 0.1, "weight": [0.5, 0.8]},
        {"method": "TIES", "density": 0.2, "weight": [0.3, 0.5, 0.8]},
        {"method": "TIES", "density": 0.5, "weight": 0.5},
        {"method": "TIES", "density": 1.0, "weight": [0.3, 0.5]},
        {"method": "DARE", "density": 0.2, "weight": 0.5},
        {"method": "DARE", "density": 0.5, "weight": [0.3, 0.5, 0.8]},
        {"method": ["sum", "sql + random"], "density": 1.0, "weight": 1.0},
    ]
    return [each | rates | HOW | {"seed": seed} for seed in SEEDS for each in methods]


def items(skill, split, how, seed):
    """As many as a training takes, or the first of held-out ones: SQL about new tables, records in new words."""
    if split == "train":
        n = how["steps"] * how["batch_size"]
        return generate("train", n, seed, version=how["version"]) if skill == "sql" else messages("train", n, seed)
    if skill == "sql":
        found = lorakit.load_sql({"test": "tables"}.get(split, split), version=how["version"])
        return found[: ITEMS[split]]
    return messages("phrasings", ITEMS[split], seed=split == "validation")


@cache
def plain(model):
    """The model in bfloat16, which holds its weights exactly; its tokenizer; and these weights, by layer."""
    model, tokenizer = lorakit.load_model(model)
    layers = {name: model.get_submodule(name) for name in lorakit.find_targets(model)}
    model.bfloat16()
    return model, tokenizer, {name: (layer, layer.weight.detach().clone()) for name, layer in layers.items()}


def trained(skill, seed, how):
    """The folder of an adapter, trained if need be, in bfloat16 with float32 factors."""
    names = [skill, "original", seed, *(how[name] for name in sorted(how))]
    folder = ADAPTERS / "-".join(map(str, names))
    if not folder.exists():
        model, tokenizer = lorakit.load_model(how["model"])
        torch.manual_seed(2 * seed + SKILLS.index(skill))
        lorakit.inject(model.bfloat16(), how["rank"], how["alpha"])
        recipe = {name: how[name] for name in ("steps", "batch_size", "lr")}
        lorakit.fit(model, encoded(tokenizer, items(skill, "train", how, seed)), **recipe, seed=seed, show=False)
        lorakit.save_adapter(model, folder)
    return folder


@torch.no_grad()
def scored(how, splits, changes=None, weight=1.0, skills=SKILLS):
    """Exact answers, and nats per token of the true ones, of the base with these changes in its weights."""
    model, tokenizer, layers = plain(how["model"])
    for name, (layer, before) in layers.items():
        layer.weight.copy_(before.float() + weight * changes[name] if changes else before)
    found = {}
    for skill in skills:
        for split in splits:
            examples = encoded(tokenizer, items(skill, split, how, 0))
            share, nats = share_and_nats(model, examples, show=False)
            ending = f"{skill}_{split}"
            found |= {ending: round(share * len(examples)), f"nats_{ending}": round(nats, 5)}
    return found


def matrices(updates):
    return {name: update.matrix for name, update in updates.items()}


def rate(skill, seed, **how):
    """Exact answers of one skill's adapter on the validation items."""
    changes = matrices(read_updates(trained(skill, seed, how)))
    found = scored(how, ["validation"], changes, skills=[skill])
    return {
        "right": found[f"{skill}_validation"],
        "nats": found[f"nats_{skill}_validation"],
        "items": ITEMS["validation"],
    }


def of_equal_norm(changes, seed):
    """A control: random changes of the same rank and norm, layer by layer."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, update in changes.items():
        B, A = (torch.randn(part.shape, generator=random, dtype=torch.float32) for part in (update.B, update.A))
        found[name] = Update(B * (update.matrix.norm() / (B @ A).norm()), A)
    return found


@lru_cache(maxsize=1)
def combined(method, density, seed, sql_lr, records_lr, how):
    """The change of each weight; a method's weight is the same for both adapters, so that it scales this."""
    how = dict(how)
    rates = {"sql": sql_lr, "records": records_lr}
    sql, records = (read_updates(trained(skill, seed, how | {"lr": rates[skill]})) for skill in SKILLS)
    made = {
        "sql alone": lambda: sql,
        "records alone": lambda: records,
        "sql + random": lambda: linear([sql, of_equal_norm(records, seed)], [1, 1]),
        "sum": lambda: linear([sql, records], [1, 1]),
        "TIES": lambda: ties([sql, records], [1, 1], density, None),
        "DARE": lambda: dare([sql, records], [1, 1], density, None, seed),
    }
    return matrices(made[method]())


def combine(method, weight, density, seed, sql_lr, records_lr, **how):
    """Exact answers in both skills after a combination of the two adapters, merged into the weights."""
    changes = combined(method, density, seed, sql_lr, records_lr, tuple(how.items()))
    skills = ["sql"] if method == "sql + random" else SKILLS
    return scored(how, ITEMS, changes, weight, skills) | {
        "items": ITEMS["test"],
        "validation_items": ITEMS["validation"],
    }


def trained_for_routes(base, seed, how):
    """The folder of an adapter on float32 or NF4 weights, trained in float32 on the first 400 questions."""
    folder = ADAPTERS / "-".join(map(str, ["sql", base, seed, seed, *(how[name] for name in sorted(how))]))
    if not folder.exists():
        model, tokenizer = lorakit.load_model(how["model"])
        if base == "NF4":
            lorakit.quantize_model(model)
        torch.manual_seed(seed)
        lorakit.inject(model, how["rank"], how["alpha"])
        examples = encoded(tokenizer, lorakit.load_sql("train", version=how["version"])[:400])
        recipe = {name: how[name] for name in ("steps", "batch_size", "lr")}
        lorakit.fit(model, examples, **recipe, seed=seed, show=False)
        lorakit.save_adapter(model, folder)
    return folder


def serve(base, route, seed, **how):
    """The SQL adapter, trained on `base`, served by a route: KL to the unmerged model, and right answers."""
    _, tokenizer, _ = plain(how["model"])
    asked = lorakit.load_sql("tables", version=how["version"])[:96]
    examples, folder = encoded(tokenizer, asked), trained_for_routes(base, seed, how)

    def served(route):
        model = lorakit.load_model(how["model"])[0]
        if route.startswith("NF4") or (route == "unmerged" and base == "NF4"):
            lorakit.quantize_model(model)
        if route.startswith("NF4,"):
            lorakit.dequantize_model(model)
        lorakit.load_adapter(model, folder)
        if route not in ("unmerged", "NF4"):
            lorakit.merge(model)
        if route.endswith("then NF4"):
            lorakit.quantize_model(model)
        return model.bfloat16() if route == "bfloat16" else model

    model = served(route)
    reference = log_probabilities(served("unmerged"), examples)
    error = kl_divergence(reference, log_probabilities(model, examples))
    right = sum(lorakit.SQL.right(model, tokenizer, asked, max_new_tokens=24, show=False))
    return {"kl": error, "right": right, "items": len(asked)}


PARTS = {  # folder -> function, grid
    "rates": (rate, lambda: RATES),
    "skills": (combine, skills_grid),
    "routes": (serve, lambda: OF_ROUTES),
}


def main(parts=tuple(PARTS)):
    for part in parts:
        run, grid = PARTS[part]
        sweep(run, grid(), HERE / part, command=f"python data/merging/record.py {part}")


if __name__ == "__main__":
    main(sys.argv[1:] or tuple(PARTS))
