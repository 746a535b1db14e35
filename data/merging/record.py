"""Trains two skills on SmolLM2, merges them by several routes and combines them by several methods, and scores it all.

    python data/merging/record.py            all runs, about forty minutes on two cores
    python data/merging/record.py skills     one study: rates, routes or skills

Lesson 07 reads results.json. Runs are recorded one by one; a second start makes only those that are missing. Trained
adapters are kept in runs/merging, which is not part of the repository, and trained again if they are gone.
"""

import sys
from functools import cache
from pathlib import Path

import torch

import lorakit
from lorakit.experiments.recorded import read, record_runs
from lorakit.merging.arithmetic import compress, dare, linear, ties
from lorakit.merging.updates import Update, attach, read_updates
from lorakit.tasks.extraction import messages
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.training.evaluate import kl_divergence, log_probabilities

RESULTS = Path(__file__).with_name("results.json")
ADAPTERS = Path(__file__).resolve().parents[2] / "runs" / "merging"
STEPS, BATCH, RANK, ALPHA, ITEMS, SEEDS = 32, 8, 8, 32, 96, (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3)
SKILLS = ("sql", "extract")
ROUTES = ("unmerged", "float32", "bfloat16", "float32, then NF4", "NF4", "NF4, then float32", "NF4, then NF4")


def items(skill, split):
    """train, tune, or test: the last on new tables, and on known fields in new words."""
    if skill == "sql":
        return lorakit.load_sql({"train": "train", "tune": "phrasings", "test": "tables"}[split])[
            : 400 if split == "train" else ITEMS
        ]
    return messages("train", 400) if split == "train" else messages("phrasings", ITEMS, seed=split == "tune")


@cache
def smollm2():
    return lorakit.load_model("smollm2")


def encoded(chosen):
    return lorakit.SQL.encode(smollm2()[1], chosen)


def right(model, skill, split="test"):
    """How many items are answered rightly: SQL by its rows, records to the letter.

    A query that is exact need not be generated; a record that is not exact is not right, but for blanks and tokens.
    """
    asked = items(skill, split)
    exact = lorakit.exact_match(model, encoded(asked), show=False)
    if skill == "extract":
        return sum(exact)
    rest = [item for item, done in zip(asked, exact, strict=True) if not done]
    answers = lorakit.SQL.answers(model, smollm2()[1], rest, max_new_tokens=24, show=False)
    return sum(exact) + sum(execution_accuracy(rest, answers))


def trained(skills, base, seed, lr, steps=STEPS, same_start=False):
    """The folder of an adapter, trained if need be: on float32 or NF4 weights, from its skill's own start or SQL's."""
    start = seed if same_start or skills[0] == "sql" else seed + 100
    folder = ADAPTERS / f"{'-'.join(skills)}-{base}-{seed}-{start}-{lr:g}-{steps}"
    if not folder.exists():
        model = lorakit.load_model("smollm2")[0]
        if base == "NF4":
            lorakit.quantize_model(model)
        torch.manual_seed(start)
        lorakit.inject(model, RANK, ALPHA)
        examples = [each for skill in skills for each in encoded(items(skill, "train"))]
        lorakit.fit(model, examples, steps=steps, batch_size=BATCH, lr=lr, seed=seed, show=False)
        lorakit.save_adapter(model, folder)
    return folder


def best(skill):
    """The rate whose adapter answers most of the tuning items."""
    runs = [made for made in read(RESULTS)["runs"] if made["study"] == "rates" and made["skill"] == skill]
    return max(runs, key=lambda made: made["right"])["lr"]


def updates(skill, seed, same_start=False):
    return read_updates(trained([skill], "float32", seed, best(skill), same_start=same_start))


def scored(changes):
    """Right answers in both skills with these changes added to SmolLM2."""
    model = smollm2()[0]
    if not changes:
        return {skill: right(model, skill) for skill in SKILLS}
    attach(model, changes)
    try:
        with lorakit.folded(model):
            return {skill: right(model, skill) for skill in SKILLS}
    finally:
        lorakit.remove(model)


def rate(study, skill, lr, seed):
    model = smollm2()[0]
    lorakit.load_adapter(model, trained([skill], "float32", seed, lr))
    try:
        with lorakit.folded(model):
            return {"right": right(model, skill, "tune"), "items": ITEMS}
    finally:
        lorakit.remove(model)


def route(study, base, route, seed):
    """The SQL adapter, trained on `base`, served by a route: KL to the unmerged model, and right answers."""
    examples, folder = encoded(items("sql", "test")), trained(["sql"], base, seed, best("sql"))

    def served(route):
        model = lorakit.load_model("smollm2")[0]
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
    return {"kl": error, "right": right(model, "sql"), "items": ITEMS}


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


def combined(study, method, weight, density, seed):
    """Right answers in both skills after a combination of the two adapters."""
    if method == "base":
        return scored({}) | {"items": ITEMS}
    if method == "trained together":
        return scored(read_updates(trained(SKILLS, "float32", seed, best("sql"), 2 * STEPS))) | {"items": ITEMS}
    parts = [updates(skill, seed, same_start=method == "sum, same start") for skill in SKILLS]
    weights = [weight, weight]
    made = {
        "sql alone": lambda: parts[0],
        "extract alone": lambda: parts[1],
        "sql + random": lambda: linear([parts[0], of_equal_norm(parts[1], seed)], [1, 1]),
        "extract + random": lambda: linear([parts[1], of_equal_norm(parts[0], seed)], [1, 1]),
        "sum": lambda: linear(parts, weights),
        "sum, same start": lambda: linear(parts, weights),
        "sum, uneven": lambda: linear(parts, [1, weight]),
        "sum, compressed": lambda: compress(linear(parts, weights), RANK),
        "factors added": lambda: factors_added(parts, weights),
        "TIES": lambda: ties(parts, weights, density, RANK),
        "DARE": lambda: dare(parts, weights, density, RANK, seed),
        "extract - sql": lambda: linear(parts, [-weight, 1]),
    }
    return scored(made[method]()) | {"items": ITEMS}


def grids():
    """The settings of each study; those of the later ones depend on the rates found in the first."""
    yield "rates", rate, [{"skill": skill, "lr": lr, "seed": 0} for skill in SKILLS for lr in RATES]
    plain = ("base", "sql alone", "extract alone", "sql + random", "extract + random", "trained together")
    methods = [(method, 1.0, 1.0) for method in plain]
    for weight in (0.5, 0.75, 1.0):
        methods += [(m, weight, 1.0) for m in ("sum", "sum, compressed", "factors added", "sum, same start")]
        methods += [("sum, uneven", weight / 2, 1.0)]
        methods += [("DARE", weight, 0.3), ("TIES", 2 * weight, 0.3)]
    methods += [("extract - sql", weight, 1.0) for weight in (0.5, 1.0)]
    names = ("method", "weight", "density")
    yield (
        "skills",
        combined,
        [dict(zip(names, each, strict=True)) | {"seed": seed} for seed in SEEDS for each in methods],
    )
    bases = ("float32", "NF4")
    yield "routes", route, [{"base": b, "route": r, "seed": s} for s in SEEDS for b in bases for r in ROUTES]


def main(*chosen):
    settings = {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "alpha": ALPHA}
    for study, run, grid in grids():
        if not chosen or study in chosen:
            runs = [{"study": study} | setting for setting in grid]
            record_runs(RESULTS, runs, run, "python data/merging/record.py", model="smollm2", settings=settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
