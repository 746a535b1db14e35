"""Trains two skills on SmolLM2, merges them by several routes and combines them by several methods, and scores it all.

    python data/merging/record.py      all runs, about forty minutes on two cores

Lesson 07 reads the records in routes and skills, which are made at the learning rates that those in rates show best.
A second start makes only the runs that are missing. Trained adapters are kept in runs/merging, which is not part of the
repository, and trained again if they are gone.
"""

from functools import cache
from pathlib import Path

import torch

import lorakit
from lorakit.experiments.records import expand
from lorakit.experiments.sweep import sweep
from lorakit.merging.arithmetic import compress, dare, linear, ties
from lorakit.merging.updates import Update, attach, read_updates
from lorakit.tasks.extraction import messages
from lorakit.tasks.task import encoded
from lorakit.training.evaluate import kl_divergence, log_probabilities

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE.parents[1] / "runs" / "merging"
ITEMS, SEEDS, SKILLS = 96, [0, 1, 2], ["sql", "extract"]
HOW = {"model": "smollm2", "version": 1, "steps": 32, "batch_size": 8}  # version: of the SQL task
HOW |= {"rank": 8, "alpha": 32}
ROUTES = ["unmerged", "float32", "bfloat16", "float32, then NF4", "NF4", "NF4, then float32", "NF4, then NF4"]
RATES = {"skill": SKILLS, "lr": [1e-3, 2e-3, 4e-3], "seed": 0} | HOW


def grids(sql_lr, extract_lr):
    """The grids of routes and of skills at the tuned rates."""
    ones = {"weight": 1.0, "density": 1.0}
    sums = ["sum", "sum, compressed", "factors added", "sum, same start"]
    controls = ["base", "sql alone", "extract alone", "sql + random", "extract + random", "trained together"]
    methods = [
        {"method": controls} | ones,
        {"method": sums, "weight": [0.5, 0.75, 1.0], "density": 1.0},
        {"method": "sum, uneven", "weight": [0.25, 0.375, 0.5], "density": 1.0},
        {"method": "DARE", "weight": [0.5, 0.75, 1.0], "density": 0.3},
        {"method": "TIES", "weight": [1.0, 1.5, 2.0], "density": 0.3},
        {"method": "extract - sql", "weight": [0.5, 1.0], "density": 1.0},
    ]
    routes = {"base": ["float32", "NF4"], "route": ROUTES, "lr": sql_lr, "seed": SEEDS} | HOW
    return routes, [each | {"sql_lr": sql_lr, "extract_lr": extract_lr, "seed": SEEDS} | HOW for each in methods]


def items(skill, split, version):
    """train, tune, or test: the last on new tables, and on known fields in new words."""
    if skill == "sql":
        found = lorakit.load_sql({"train": "train", "tune": "phrasings", "test": "tables"}[split], version=version)
        return found[: 400 if split == "train" else ITEMS]
    return messages("train", 400) if split == "train" else messages("phrasings", ITEMS, seed=split == "tune")


@cache
def plain(model):
    """The model without adapters, and its tokenizer."""
    return lorakit.load_model(model)


def right(model, tokenizer, skill, version, split="test"):
    """How many items are answered rightly: SQL by its rows, records to the letter.

    A query that is exact need not be generated; a record that is not exact is not right, but for blanks and tokens.
    """
    asked = items(skill, split, version)
    if skill == "extract":
        return sum(lorakit.exact_match(model, encoded(tokenizer, asked), show=False))
    return sum(lorakit.SQL.right(model, tokenizer, asked, max_new_tokens=24, show=False))


def trained(skills, base, seed, how, same_start=False):
    """The folder of an adapter, trained if need be: on float32 or NF4 weights, from its skill's own start or SQL's."""
    start = seed if same_start or skills[0] == "sql" else seed + 100
    folder = ADAPTERS / "-".join(map(str, [*skills, base, seed, start, *(how[name] for name in sorted(how))]))
    if not folder.exists():
        model, tokenizer = lorakit.load_model(how["model"])
        if base == "NF4":
            lorakit.quantize_model(model)
        torch.manual_seed(start)
        lorakit.inject(model, how["rank"], how["alpha"])
        examples = [each for skill in skills for each in encoded(tokenizer, items(skill, "train", how["version"]))]
        recipe = {name: how[name] for name in ("steps", "batch_size", "lr")}
        lorakit.fit(model, examples, **recipe, seed=seed, show=False)
        lorakit.save_adapter(model, folder)
    return folder


def scored(how, changes):
    """Right answers in both skills with these changes added to the model."""
    model, tokenizer = plain(how["model"])
    if not changes:
        return {skill: right(model, tokenizer, skill, how["version"]) for skill in SKILLS}
    attach(model, changes)
    try:
        with lorakit.folded(model):
            return {skill: right(model, tokenizer, skill, how["version"]) for skill in SKILLS}
    finally:
        lorakit.remove(model)


def rate(skill, seed, **how):
    """Right answers of one skill's adapter on the tuning items."""
    model, tokenizer = plain(how["model"])
    lorakit.load_adapter(model, trained([skill], "float32", seed, how))
    try:
        with lorakit.folded(model):
            return {"right": right(model, tokenizer, skill, how["version"], "tune"), "items": ITEMS}
    finally:
        lorakit.remove(model)


def serve(base, route, seed, **how):
    """The SQL adapter, trained on `base`, served by a route: KL to the unmerged model, and right answers."""
    _, tokenizer = plain(how["model"])
    examples, folder = encoded(tokenizer, items("sql", "test", how["version"])), trained(["sql"], base, seed, how)

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
    return {"kl": error, "right": right(model, tokenizer, "sql", how["version"]), "items": ITEMS}


def factors_added(parts, weights):
    """PEFT's combination "linear", for adapters of one rank: the factors are summed, each with its weight's root."""
    roots = [weight**0.5 for weight in weights]
    return {
        name: Update(
            sum(root * part[name].B for root, part in zip(roots, parts, strict=True)),
            sum(root * part[name].A for root, part in zip(roots, parts, strict=True)),
        )
        for name in parts[0]
    }


def of_equal_norm(changes, seed):
    """A control: random changes of the same rank and norm, layer by layer."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, update in changes.items():
        B, A = torch.randn(update.B.shape, generator=random), torch.randn(update.A.shape, generator=random)
        found[name] = Update(B * (update.matrix.norm() / (B @ A).norm()), A)
    return found


def combine(method, weight, density, seed, sql_lr, extract_lr, **how):
    """Right answers in both skills after a combination of the two adapters."""
    rank, weights, rates = how["rank"], [weight, weight], {"sql": sql_lr, "extract": extract_lr}
    if method == "base":
        return scored(how, {}) | {"items": ITEMS}
    if method == "trained together":
        both = trained(SKILLS, "float32", seed, how | {"lr": sql_lr, "steps": 2 * how["steps"]})
        return scored(how, read_updates(both)) | {"items": ITEMS}
    same = method == "sum, same start"
    parts = [read_updates(trained([s], "float32", seed, how | {"lr": rates[s]}, same_start=same)) for s in SKILLS]
    made = {
        "sql alone": lambda: parts[0],
        "extract alone": lambda: parts[1],
        "sql + random": lambda: linear([parts[0], of_equal_norm(parts[1], seed)], [1, 1]),
        "extract + random": lambda: linear([parts[1], of_equal_norm(parts[0], seed)], [1, 1]),
        "sum": lambda: linear(parts, weights),
        "sum, same start": lambda: linear(parts, weights),
        "sum, uneven": lambda: linear(parts, [1, weight]),
        "sum, compressed": lambda: compress(linear(parts, weights), rank),
        "factors added": lambda: factors_added(parts, weights),
        "TIES": lambda: ties(parts, weights, density, rank),
        "DARE": lambda: dare(parts, weights, density, rank, seed),
        "extract - sql": lambda: linear(parts, [-weight, 1]),
    }
    return scored(how, made[method]()) | {"items": ITEMS}


def main():
    command = "python data/merging/record.py"
    rates = sweep(rate, RATES, HERE / "rates", command=command)
    assert len(rates) == len(expand(RATES)), "another process is still tuning"
    best = rates.loc[rates.groupby("skill").right.idxmax()].set_index("skill").lr  # of equals the lowest
    routes, skills = grids(float(best["sql"]), float(best["extract"]))
    sweep(serve, routes, HERE / "routes", command=command)
    sweep(combine, skills, HERE / "skills", command=command)


if __name__ == "__main__":
    main()
