"""Trains SmolLM2 on the SQL task with the methods that PEFT has, each at its own learning rate.

    python data/methods/record.py              all runs, about two hours on two cores
    python data/methods/record.py LoRA DoRA    the runs of these methods; several processes may share the work
    python data/methods/record.py --cost       parameters, memory and time of a step; wants an idle machine

Lesson 05 reads results.json. Runs are recorded one by one; a second start makes only those that are missing.

The rate is tuned with seed 0 on questions in new words (`phrasings`): three neighbours of a ladder, and further ones as
long as the best is at an edge. The best rate gets two more seeds; all three are scored on questions about new tables.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.recorded import read, record_runs
from lorakit.speed.activations import lean
from lorakit.speed.cpu import fast
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.tasks.task import encoded
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft

RESULTS = Path(__file__).with_name("results.json")
STEPS, BATCH, RANK, TUNING, ITEMS = 44, 8, 16, 104, 208
SEEDS = (0, 1, 2)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA = {"r": RANK, "lora_alpha": 2 * RANK} | ALL
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
        {"init_r": 24, "target_r": RANK, "lora_alpha": 2 * RANK, "tinit": 8, "tfinal": 16, "total_step": STEPS} | ALL,
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


def adapted(name, seed):
    """SmolLM2 with PEFT's adapters of that method, in training mode, and its tokenizer."""
    model, tokenizer = lorakit.load_model("smollm2")
    settings = dict(METHODS[name].settings)
    if "prompt_tuning_init_text" in settings:
        settings["tokenizer_name_or_path"] = model.name_or_path
    torch.manual_seed(seed)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, METHODS[name].config(**settings)).train(), tokenizer


def train(name, model, examples, lr, seed, steps=STEPS):
    """`fit`; the same recipe in plain operations for the two methods whose loss is not that of the logits alone."""
    settings = {"steps": steps, "batch_size": BATCH, "lr": lr, "seed": seed}
    if name in ("AdaLoRA", "prompt tuning"):
        allocate = getattr(model.base_model, "update_and_allocate", None)
        with fast(model, 70 * BATCH), lean(model):
            return plain_loop(model, examples, **settings, **({"after_step": allocate} if allocate else {}))
    return lorakit.fit(model, examples, **settings, loraplus_ratio=METHODS[name].ratio, show=False).loss


def right(name, model, tokenizer, items, only_exact=False):
    """Which items are answered rightly by their rows; those that are exact to the letter need not be generated."""
    if name == "prompt tuning":
        exact = [False] * len(items)
    else:
        exact = lorakit.exact_match(model, encoded(tokenizer, items), show=False)
        if only_exact:
            return exact
    rest = [item for item, done in zip(items, exact, strict=True) if not done]
    answers = lorakit.SQL.answers(model, tokenizer, rest, max_new_tokens=32, show=False)
    found = iter(execution_accuracy(rest, answers))
    return [done or next(found) for done in exact]


def ranks(model):
    """How many directions AdaLoRA has left each layer."""
    modules = model.base_model.model.named_modules()
    return {name: int(layer.lora_E["default"].count_nonzero()) for name, layer in modules if hasattr(layer, "lora_E")}


def run(method, lr, seed):
    """One training and its scores: `tuned_on` of the questions in new words; if it is the best yet, all of the rest."""
    model, tokenizer = adapted(method, seed)
    found = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    start = time.perf_counter()
    try:
        losses = train(method, model, encoded(tokenizer, lorakit.load_sql("train")), lr, seed)
    except FloatingPointError as error:
        return found | {"tuned_on": 0, "error": str(error)}
    found |= {"seconds": round(time.perf_counter() - start, 1), "losses": [round(loss, 7) for loss in losses]}
    model.eval()
    found["tuned_on"] = sum(right(method, model, tokenizer, lorakit.load_sql("phrasings")[:TUNING], only_exact=True))
    others = [made["tuned_on"] for made in read(RESULTS)["runs"] if made.get("method") == method]
    if seed or found["tuned_on"] > max(others, default=-1):
        answered = right(method, model, tokenizer, lorakit.load_sql("tables")[:ITEMS])
        found |= {"items": len(answered), "right": sum(answered)}
    return found | ({"ranks": ranks(model)} if method == "AdaLoRA" else {})


def grid(method):
    """The settings to run, each chosen with an eye on the records so far."""

    def tuned():
        runs = [made for made in read(RESULTS)["runs"] if made.get("method") == method and made["seed"] == 0]
        return {LADDER.index(made["lr"]): made["tuned_on"] for made in runs}

    first = LADDER.index(METHODS[method].lr)
    for i in (first, first - 1, first + 1):
        yield {"method": method, "lr": LADDER[i], "seed": 0}
    while True:
        best = max(tuned(), key=tuned().get)  # the first of equals
        missing = [i for i in (best - 1, best + 1) if i not in tuned() and 0 <= i < len(LADDER)]
        if not missing:
            break
        yield {"method": method, "lr": LADDER[missing[0]], "seed": 0}
    for seed in SEEDS[1:]:
        yield {"method": method, "lr": LADDER[best], "seed": seed}


def cost(of):
    """What a method takes: see `print_cost`; each in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--cost-of", of], env=os.environ, stdout=subprocess.PIPE, check=True
    )
    small = subprocess.run(
        [sys.executable, __file__, "--memory-of", of], env=returning_memory(), stdout=subprocess.PIPE, check=True
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


RECORD = {
    "packages": ("torch", "transformers", "peft"),
    "model": "smollm2",
    "settings": {"steps": STEPS, "batch_size": BATCH, "tuning_items": TUNING, "test_items": ITEMS},
}


def main(*methods):
    command = "python data/methods/record.py"
    if methods[:1] == ("--cost",):
        record_runs(RESULTS, [{"of": method} for method in METHODS], cost, command, **RECORD)
        return
    for method in methods or METHODS:
        record_runs(RESULTS, grid(method), run, command, **RECORD)


if __name__ == "__main__":
    single = {"--cost-of": print_cost, "--memory-of": print_memory}.get(sys.argv[1] if sys.argv[1:] else "")
    single(sys.argv[2]) if single else main(*sys.argv[1:])
