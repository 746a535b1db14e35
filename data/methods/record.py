"""Trains SmolLM2 on the SQL task with the methods that PEFT has, each at its own learning rate; and what explains them.

    python data/methods/record.py            all studies, about three hours on two cores
    python data/methods/record.py costs      one of STUDIES; costs wants an idle machine

Lesson 05 reads the records in folders of these names. A second start makes only the runs that are missing.

The rate is tuned with seed 0 on questions in new words (`phrasings`): three neighbours of a ladder, and further ones as
long as the best is at an edge. The best rate gets two more seeds; results are right answers about new tables.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.sweep import sweep
from lorakit.layers.dora import magnitude_direction
from lorakit.models.targets import find_targets
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.facts import facts as new_facts
from lorakit.tasks.facts import recall
from lorakit.tasks.task import encoded
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft

HERE = Path(__file__).parent
RANK, SEEDS = 16, [0, 1, 2]
HOW = {"model": "smollm2", "version": 1, "steps": 44, "batch_size": 8}  # version: of the SQL task
HOW |= {"tuning_items": 104, "test_items": 208}
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA = {"r": RANK, "lora_alpha": 2 * RANK} | ALL
TINY = {"model": "tiny", "facts": 48, "steps": 150, "batch_size": 8}
COMMAND = "python data/methods/record.py"
TEXT = "Write one SQLite query that answers the question about the table."


@dataclass(frozen=True)
class Method:
    """One row of the table: PEFT's configuration, where its tuning begins, and LoRA+'s ratio of rates."""

    config: type
    settings: dict
    lr: float
    ratio: float = 1.0


METHODS = {
    "LoRA": Method(peft.LoraConfig, LORA, 3e-3),
    "rsLoRA": Method(peft.LoraConfig, LORA | {"use_rslora": True}, 1e-3),
    "DoRA": Method(peft.LoraConfig, LORA | {"use_dora": True}, 3e-3),
    "LoRA+": Method(peft.LoraConfig, LORA, 3e-4, ratio=16.0),
    "PiSSA": Method(peft.LoraConfig, LORA | {"lora_alpha": RANK, "init_lora_weights": "pissa"}, 1e-3),
    "OLoRA": Method(peft.LoraConfig, LORA | {"lora_alpha": RANK, "init_lora_weights": "olora"}, 1e-3),
    "AdaLoRA": Method(
        peft.AdaLoraConfig,
        {"init_r": 24, "target_r": RANK, "lora_alpha": 2 * RANK, "tinit": 8, "tfinal": 16, "total_step": HOW["steps"]}
        | ALL,
        1e-2,
    ),
    "LoHa": Method(peft.LoHaConfig, {"r": RANK // 2, "alpha": RANK} | ALL, 1e-2),
    "LoKr": Method(peft.LoKrConfig, {"r": RANK, "alpha": 2 * RANK} | ALL, 1e-2),
    "VeRA": Method(peft.VeraConfig, {"r": 256} | ALL, 3e-2),
    "(IA)3": Method(
        peft.IA3Config,
        ALL | {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        3e-2,
    ),
    "prompt tuning": Method(
        peft.PromptTuningConfig,
        {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20, "prompt_tuning_init": "TEXT"}
        | {"prompt_tuning_init_text": TEXT},
        1e-1,
    ),
    "MiSS": Method(peft.MissConfig, {"r": 2 * RANK} | ALL, 1e-3),
    "OFT": Method(peft.OFTConfig, {"oft_block_size": 32} | ALL, 1e-3),
    "RoAd": Method(peft.RoadConfig, ALL, 1e-2),
}


def adapted(name, seed, base=HOW["model"]):
    """The base with PEFT's adapters of that method, in training mode, and its tokenizer."""
    model, tokenizer = lorakit.load_model(base)
    settings = dict(METHODS[name].settings)
    if "prompt_tuning_init_text" in settings:
        settings["tokenizer_name_or_path"] = model.name_or_path
    torch.manual_seed(seed)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, METHODS[name].config(**settings)).train(), tokenizer


def train(name, model, examples, **recipe):
    """`fit`; the same recipe in plain operations for the two methods whose loss is not that of the logits alone."""
    if name in ("AdaLoRA", "prompt tuning"):
        allocate = getattr(model.base_model, "update_and_allocate", None)
        with accelerated(model, 70 * recipe["batch_size"], trains=True):
            return plain_loop(model, examples, **recipe, **({"after_step": allocate} if allocate else {}))
    return lorakit.fit(model, examples, **recipe, loraplus_ratio=METHODS[name].ratio, show=False).loss


def right(name, model, tokenizer, items, only_exact=False):
    """Which items are answered rightly by their rows; those that are exact to the letter need not be generated."""
    if name == "prompt tuning":
        exact = [False] * len(items)
    else:
        exact = lorakit.exact_match(model, encoded(tokenizer, items), show=False)
        if only_exact:
            return exact
    return lorakit.SQL.right(model, tokenizer, items, exact, max_new_tokens=32, show=False)


def ranks(model):
    """How many directions AdaLoRA has left each layer."""
    modules = model.base_model.model.named_modules()
    return {name: int(layer.lora_E["default"].count_nonzero()) for name, layer in modules if hasattr(layer, "lora_E")}


def run(method, lr, seed, model, version, steps, batch_size, tuning_items, test_items):
    """One training and its scores: `tuned_on` of the questions in new words, `right` of those about new tables."""
    adapter, tokenizer = adapted(method, seed, model)
    found = {"trained": sum(p.numel() for p in adapter.parameters() if p.requires_grad)}
    taught, tuning, tests = (lorakit.load_sql(split, version=version) for split in ("train", "phrasings", "tables"))
    tuning, tests = tuning[:tuning_items], tests[:test_items]
    start, train_items = time.perf_counter(), encoded(tokenizer, taught)
    losses = train(method, adapter, train_items, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    found |= {"train_seconds": round(time.perf_counter() - start, 1), "losses": [round(loss, 7) for loss in losses]}
    adapter.eval()
    found["tuned_on"] = sum(right(method, adapter, tokenizer, tuning, only_exact=True))
    found |= {"items": len(tests), "right": sum(right(method, adapter, tokenizer, tests))}
    return found | ({"ranks": ranks(adapter)} if method == "AdaLoRA" else {})


def trainings(method):
    """Tunes a method's rate and repeats the best with the other seeds; returns it. What is recorded is only read."""
    first, command = LADDER.index(METHODS[method].lr), COMMAND + " trainings"
    places = [first, first - 1, first + 1]
    while True:
        grid = {"method": method, "lr": [LADDER[i] for i in places], "seed": 0} | HOW
        found = sweep(run, grid, HERE / "trainings", command=command)
        assert len(found) == len(places), "another process is still tuning"
        tuned = found.tuned_on.fillna(0).tolist()  # a run that diverged has none right
        best = places[tuned.index(max(tuned))]  # the first of equals
        missing = [i for i in (best - 1, best + 1) if i not in places and 0 <= i < len(LADDER)]
        if not missing:
            break
        places.append(missing[0])
    grid = {"method": method, "lr": LADDER[best], "seed": SEEDS[1:]} | HOW
    sweep(run, grid, HERE / "trainings", command=command)
    return LADDER[best]


def started(method, seed, model):
    """The plain model with lorakit's adapters as PEFT starts them; or all of it to be trained."""
    if method == "full":
        plain, tokenizer = lorakit.load_model(model)
        return plain.requires_grad_(True), tokenizer
    theirs, tokenizer = adapted(method, seed, model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs.save_pretrained(folder)
        plain = theirs.unload()
        lorakit.load_adapter(plain, folder)
    return plain, tokenizer


def turn(method, lr, seed, model, version, steps, batch_size):
    """One training; of each linear layer the mean change of its rows' lengths and directions."""
    after, tokenizer = started(method, seed, model)
    examples = encoded(tokenizer, lorakit.load_sql("train", version=version))
    losses = lorakit.fit(after, examples, steps=steps, batch_size=batch_size, lr=lr, seed=seed, show=False).loss
    after, before = (after if method == "full" else lorakit.merge(after)), lorakit.load_model(model)[0]
    pairs = {
        name: (before.get_submodule(name).weight, after.get_submodule(name).weight) for name in find_targets(before)
    }
    changes = {name: [float(f"{x:.4g}") for x in magnitude_direction(*pair)] for name, pair in pairs.items()}
    return {"loss": losses[-1], "changes": changes}


def directions():
    """How far training turns each weight matrix, and how much it changes its length, at each method's own rate."""
    rates = {"full": 3e-4} | {method: trainings(method) for method in ("LoRA", "DoRA")}  # full: best of four
    how = {name: HOW[name] for name in ("model", "version", "steps", "batch_size")}
    grid = [{"method": method, "lr": lr, "seed": SEEDS} | how for method, lr in rates.items()]
    sweep(turn, grid, HERE / "directions", command=COMMAND + " directions")


def rule_runs(settings):
    """The facts learnt with both scale rules at all rates: adapters of one rank and seed are trained together."""
    first = settings[0]
    model, tokenizer = lorakit.load_model(first["model"])
    items = new_facts(first["facts"], first["seed"])
    specs = [
        lorakit.Spec(lorakit.LoRAConfig(s["rank"], s["alpha"], scale_rule=s["scale_rule"]), s["lr"], s["seed"])
        for s in settings
    ]
    recipe, found = {"steps": first["steps"], "batch_size": first["batch_size"], "show": False}, []
    for fitted in lorakit.fit_many(model, encoded(tokenizer, items), specs, **recipe):
        fitted.attach(model)
        found.append({"recall": 0.0 if fitted.error else round(recall(model, tokenizer, items), 4)})
        lorakit.remove(model)
    return found


def rslora():
    """Does rsLoRA do what another learning rate does not? Ranks, rules and rates on the tiny base."""
    grid = {"rank": [1, 4, 16, 256], "seed": SEEDS, "scale_rule": ["lora", "rslora"]}
    grid |= {"lr": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "alpha": 8.0} | TINY
    sweep(rule_runs, grid, HERE / "rslora", together=["scale_rule", "lr"], command=COMMAND + " rslora")


STARTS = {"Kaiming": None, "Gaussian": None, "PiSSA": lorakit.pissa_start, "OLoRA": lorakit.olora_start}


def start_run(start, lr, seed, rank, alpha, model, facts, steps, batch_size):
    """One training: the facts known afterwards, and the mean loss of the first fifty steps."""
    base, tokenizer = lorakit.load_model(model)
    items = new_facts(facts, seed)
    torch.manual_seed(seed)
    if STARTS[start]:
        lorakit.inject(base, rank, alpha, layer=lorakit.PiSSALinear, start=STARTS[start])
    else:
        lorakit.inject(base, rank, alpha)
    if start == "Gaussian":
        for layer in lorakit.adapters(base).values():
            torch.nn.init.normal_(layer.A, std=1 / rank)  # as PEFT's "gaussian" has it
    recipe = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "show": False}
    try:
        losses = lorakit.fit(base, encoded(tokenizer, items), **recipe).loss
    except FloatingPointError:
        return {"recall": 0.0, "early": math.inf}
    return {"recall": round(recall(base, tokenizer, items), 4), "early": round(sum(losses[:50]) / 50, 4)}


def starts():
    """Where A and B start, on the tiny base: uniform (Kaiming), Gaussian, PiSSA, OLoRA, each at three rates."""
    grid = {"start": list(STARTS), "lr": [1e-3, 3e-3, 1e-2], "seed": SEEDS, "rank": 4, "alpha": 8.0} | TINY
    sweep(start_run, grid, HERE / "starts", command=COMMAND + " starts")


def cost(method):
    """What a method takes: see `print_cost`; each in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--cost-of", method], env=os.environ, stdout=subprocess.PIPE, check=True
    )
    small = subprocess.run(
        [sys.executable, __file__, "--memory-of", method], env=returning_memory(), stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | json.loads(small.stdout.splitlines()[-1])


def whole_step(model):
    """A function that does one step on 4 x 128 tokens, all labelled, as PEFT does it."""
    ids = torch.randint(5, 49_000, (4, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step():
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def print_cost(method, rounds=3):
    """Prints the time of a step as a share of LoRA's, alternating, and what merging does to the outputs."""
    steps = [whole_step(adapted(name, 0)[0]) for name in ("LoRA", method)]
    seconds = [[], []]
    for i in range(rounds + 1):
        for work, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            work()
            times.extend([time.perf_counter() - start] * (i > 0))  # the first is a warm-up
    print(
        json.dumps(
            {"seconds_of_step": seconds[1], "seconds_of_lora": seconds[0], "merging_error": merging_error(method)}
        )
    )


def merging_error(method):
    """The relative error of the logits after PEFT's merge, float32, all trained numbers moved; None if it cannot."""
    model, _ = adapted(method, 0)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad(), quiet():
        for p in (p for p in model.eval().parameters() if p.requires_grad):
            p.add_(0.02 * torch.randn_like(p))
        before = model(input_ids=ids).logits[:, -40:]
        try:
            after = model.merge_and_unload()(input_ids=ids).logits
        except (AttributeError, NotImplementedError, ValueError):
            return None
    return ((before - after).norm() / before.norm()).item()


def print_memory(method):
    """Prints the bytes of the adapter, its buffers included, and those by which a step exceeds what it finds."""
    model, _ = adapted(method, 0)
    own = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    plain = sum(p.nbytes for p in lorakit.load_model("smollm2")[0].parameters())
    step = whole_step(model)
    step()
    grown = sorted(peak_bytes(step) for _ in range(3))[1]
    print(json.dumps({"adapter_bytes": sum(own.values()) - plain, "step_bytes": grown}))


STUDIES = {
    "trainings": lambda: [trainings(method) for method in METHODS],
    "costs": lambda: sweep(cost, {"method": list(METHODS)}, HERE / "costs", command=COMMAND + " costs"),
    "directions": directions,
    "rslora": rslora,
    "starts": starts,
}


def main(*names):
    for name in names or STUDIES:
        STUDIES[name]()


if __name__ == "__main__":
    single = {"--cost-of": print_cost, "--memory-of": print_memory}.get(sys.argv[1] if sys.argv[1:] else "")
    if single:
        single(sys.argv[2])
    else:
        main(*sys.argv[1:])
