"""Trains the tiny base on facts with the methods that PEFT has, each at its own learning rate; and what explains them.

    python data/methods/record.py            all studies, about 40 minutes of a core
    python data/methods/record.py facts      one of STUDIES; costs wants an idle machine

Lesson 05 reads the records in folders of these names. A second start makes only the runs that are missing.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.sweep import sweep
from lorakit.layers.dora import magnitude_direction
from lorakit.models.targets import find_targets
from lorakit.tasks.facts import facts as new_facts
from lorakit.tasks.facts import known_facts
from lorakit.tasks.task import encoded
from lorakit.training.batch import collate
from lorakit.training.recipe import batches, schedule_share

with quiet():
    import peft
    from peft.tuners.oft.layer import OFTRotationModule

HERE = Path(__file__).parent
RANK, SEEDS, TURNED = 16, list(range(10)), ("LoRA", "full", "DoRA", "DoRA, slow m")
ONE_BY_ONE = ("AdaLoRA", "LoHa")  # PEFT's code for them does not pass through `vmap`
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TINY = {"model": "tiny", "facts": 64, "batch_size": 8}
COMMAND = "python data/methods/record.py"
HOW = {"together": ["lr", "seed"], "at_once": 10, "command": COMMAND + " facts"}
TEXT, WORDS = "Write one SQLite query that answers the question about the table.", "extension of ada hopper ? 0 1 2 3"


@dataclass(frozen=True)
class Method:
    """One row of the table: PEFT's configuration by rank and steps, where its tuning begins, and rates of its own."""

    config: type | None  # None: full fine-tuning
    settings: Callable[[int, int], dict[str, Any]]
    octave: float  # of the rate with which tuning begins, see `rate`
    faster: dict[str, float] = field(default_factory=dict)  # part of a parameter's name -> multiple of the rate
    ranked: bool = True  # whether it has a size to choose


def lora(**more):
    return lambda r, steps: {"r": r, "lora_alpha": 2 * r} | ALL | more


def inside(start):
    return lambda r, steps: {"r": r, "lora_alpha": r, "init_lora_weights": start} | ALL


def adaptive(r, steps):
    shape = {"init_r": 3 * r // 2, "target_r": r, "lora_alpha": 2 * r}
    return shape | {"tinit": steps * 2 // 11, "tfinal": steps * 4 // 11, "total_step": steps} | ALL


def prompt(r, steps):
    tokens = {"num_virtual_tokens": 5 * r // 4, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT}
    return {"task_type": "CAUSAL_LM"} | tokens


PLACES = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS = {
    "LoRA": Method(peft.LoraConfig, lora(), 2),
    "full": Method(None, lambda r, steps: {}, 1, ranked=False),
    "rsLoRA": Method(peft.LoraConfig, lora(use_rslora=True), 1),
    "DoRA": Method(peft.LoraConfig, lora(use_dora=True), 2),
    "DoRA, slow m": Method(peft.LoraConfig, lora(use_dora=True), 2.5, {"magnitude": 0.1}),
    "LoRA+": Method(peft.LoraConfig, lora(), 0, {"lora_B": 16.0}),
    "Gaussian": Method(peft.LoraConfig, lora(init_lora_weights="gaussian"), 2),
    "PiSSA": Method(peft.LoraConfig, inside("pissa"), 2),
    "OLoRA": Method(peft.LoraConfig, inside("olora"), 2),
    "AdaLoRA": Method(peft.AdaLoraConfig, adaptive, 4),
    "LoHa": Method(peft.LoHaConfig, lambda r, steps: {"r": r // 2, "alpha": r} | ALL, 4),
    "LoKr": Method(peft.LoKrConfig, lambda r, steps: {"r": r, "alpha": 2 * r} | ALL, 5),
    "VeRA": Method(peft.VeraConfig, lambda r, steps: {"r": 16 * r} | ALL, 7),
    "MiSS": Method(peft.MissConfig, lambda r, steps: {"r": 2 * r} | ALL, 2),
    "OFT": Method(peft.OFTConfig, lambda r, steps: {"oft_block_size": 2 * r} | ALL, 3),
    "(IA)3": Method(peft.IA3Config, lambda r, steps: ALL | PLACES, 9, ranked=False),
    "RoAd": Method(peft.RoadConfig, lambda r, steps: ALL, 6, ranked=False),
    "prompt tuning": Method(peft.PromptTuningConfig, prompt, 5),
}
WIDE = {name: (1, 3) for name in ("LoRA", "Gaussian", "PiSSA", "OLoRA")}  # octaves of further rates
AGAIN = {  # rank, steps -> methods whose runs are also made with these
    (4, 80): ("LoRA", "rsLoRA", "DoRA", "MiSS"),
    (RANK, 160): ("LoRA", "full", "rsLoRA", "DoRA", "MiSS"),
}
WIDE |= {"full": (0, 2), "rsLoRA": (0, 2), "DoRA": (1, 3), "DoRA, slow m": (1, 3.5, 4), "LoRA+": (-1, 1)}
COSTLY = [name for name in METHODS if name not in ("full", "DoRA, slow m", "Gaussian")]  # others cost as one of these


def rate(octave):
    """The ladder of rates: 0.001 and a factor of two an octave."""
    return float(f"{1e-3 * 2.0**octave:.4g}")


def adapted(name, seed, base="smollm2", rank=RANK, steps=44):
    """The base with PEFT's adapters of that method, in training mode, and its tokenizer; or all of it to be trained."""
    model, tokenizer = lorakit.load_model(base)
    if base == "tiny":
        model.set_attn_implementation("eager")  # plain operations, for `vmap`
    if METHODS[name].config is None:
        return model.requires_grad_(True).train(), tokenizer
    settings = METHODS[name].settings(rank, steps)
    if "prompt_tuning_init_text" in settings:
        settings["tokenizer_name_or_path"] = model.name_or_path
        if base == "tiny":
            settings["prompt_tuning_init_text"] = WORDS
    torch.manual_seed(seed)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, METHODS[name].config(**settings)).train(), tokenizer


def rotations(self, Q, block_size, *_):
    """PEFT's rotations of OFT with its defaults; out of place, since `vmap` allows nothing else."""
    at = (self.rows * block_size + self.cols).expand(len(Q), -1)
    upper = Q.new_zeros(len(Q), block_size**2).scatter(1, at, Q).view(-1, block_size, block_size)
    K = upper - upper.mT
    square = K @ K
    return torch.eye(block_size, dtype=Q.dtype) + 2 * (K + square + square @ K) + square @ square


def trained(method, models, examples, rates, seeds, steps, batch_size):
    """`plain_loop` for several runs of a method at once: trains the models, and returns their losses, (K, steps)."""
    model, faster = models[0], METHODS[method].faster
    own = [dict(each.named_parameters()) for each in models]
    names = [name for name, p in own[0].items() if p.requires_grad]
    assert all(torch.equal(p, each[name]) for each in own for name, p in own[0].items() if name not in names)
    params = {name: torch.stack([each[name].detach() for each in own]) for name in names}
    for k, name in product(range(len(own)), names):
        own[k][name].data = params[name][k]  # what moves is what the models have
    texts = [collate(each) for each in examples]
    assert all(text["attention_mask"].all() for text in texts)
    ids, labels = (torch.stack([text[key] for text in texts]) for key in ("input_ids", "labels"))
    orders = torch.tensor([list(batches(len(examples[0]), batch_size, steps, seed)) for seed in seeds])
    runs, sides = torch.arange(len(seeds))[:, None], [(-1, *[1] * (params[name].ndim - 1)) for name in names]
    ratios = [next((by for part, by in faster.items() if part in name), 1.0) for name in names]
    first, second = ([torch.zeros_like(p) for p in params.values()] for _ in range(2))

    def loss(values, ids, labels):
        return functional_call(model, values, kwargs={"input_ids": ids, "labels": labels}).loss

    def one_by_one(params, ids, labels):
        found = [each(input_ids=i, labels=j).loss for each, i, j in zip(models, ids, labels, strict=True)]
        grads = [torch.autograd.grad(x, [each[name] for name in names]) for x, each in zip(found, own, strict=True)]
        return dict(zip(names, map(torch.stack, zip(*grads, strict=True)), strict=True)), torch.stack(found).detach()

    step, losses = one_by_one if method in ONE_BY_ONE else vmap(grad_and_value(loss)), []
    for each in models:
        each.eval()  # nothing drops out
    for i in range(steps):
        grads, values = step(params, ids[runs, orders[:, i]], labels[runs, orders[:, i]])
        clip = (1 / (sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt() + 1e-6)).clamp(max=1)
        peak = torch.tensor(rates, dtype=torch.float32) * schedule_share(i, steps, math.ceil(steps / 10))
        for g, p, m, v, side, ratio in zip(grads.values(), params.values(), first, second, sides, ratios, strict=True):
            g.mul_(clip.view(side))
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p -= (ratio * peak / (1 - 0.9 ** (i + 1))).view(side) * m / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        losses.append(values)
        if method == "AdaLoRA":
            for k, name in product(range(len(own)), names):
                own[k][name].grad = grads[name][k]
            for each in models:
                each.base_model.update_and_allocate(i)
    return torch.stack(losses, 1)


@torch.no_grad()
def scores(model, examples):
    """The share of examples that are answered exactly, and nats per labelled token; vectors before the text pass."""
    batch = collate(examples)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]
    nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum() / (labels != -100).sum()
    exact = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
    return exact.float().mean().item(), nats.item() if nats.isfinite() else None


def fact_runs(settings):
    """Trains the tiny base on facts, several rates and seeds of a method at once; what it then knows, and has lost."""
    how = settings[0]
    method, rank, steps = how["method"], how["rank"] or RANK, how["steps"]
    models = [adapted(method, each["seed"], how["model"], rank, steps)[0] for each in settings]
    base, tokenizer = lorakit.load_model(how["model"])
    taught = [encoded(tokenizer, new_facts(how["facts"], each["seed"])) for each in settings]
    rates, seeds = ([each[name] for each in settings] for name in ("lr", "seed"))
    with mock.patch.object(OFTRotationModule, "_cayley_batch", rotations):
        losses = trained(method, models, taught, rates, seeds, steps, how["batch_size"])
    known, found = encoded(tokenizer, known_facts()), []
    for model, examples, early in zip(models, taught, losses[:, :50].mean(1).tolist(), strict=True):
        one = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        one |= dict(zip(("recall", "nats"), scores(model, examples), strict=True))
        one |= dict(zip(("known", "known_nats"), scores(model, known), strict=True))
        one["early"] = early if math.isfinite(early) else None
        if method in TURNED and one["nats"] is not None:
            plain = model if method == "full" else model.merge_and_unload()
            one["changes"] = changes(base, plain)
        if method == "AdaLoRA":
            layers = {at: each for at, each in model.base_model.model.named_modules() if hasattr(each, "lora_E")}
            one["ranks"] = {at: int(each.lora_E["default"].count_nonzero()) for at, each in layers.items()}
        found.append({name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in one.items()})
    return found


def facts(method, rank, steps, seeds):
    """A row of the table: rates half an octave apart, three at first, further ones while the best is at an edge."""
    places = [METHODS[method].octave + k for k in (0, -0.5, 0.5)]
    how = {"method": method, "rank": rank if METHODS[method].ranked else 0, "steps": steps, "seed": seeds} | TINY
    while True:
        found = sweep(fact_runs, how | {"lr": [rate(k) for k in places]}, HERE / "facts", **HOW)
        nats = found.nats.fillna(99).groupby(found.lr).mean()  # none: it diverged
        best = min(places, key=lambda k: nats[rate(k)])
        further = [k for k in (best - 0.5, best + 0.5) if k not in places]
        if not further:
            return
        places += further


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
    after = after if method == "full" else lorakit.merge(after)
    return {"loss": losses[-1], "changes": changes(lorakit.load_model(model)[0], after)}


def changes(before, after):
    """Of each linear layer the mean change of its rows' lengths and directions."""
    pairs = {
        name: (before.get_submodule(name).weight, after.get_submodule(name).weight) for name in find_targets(before)
    }
    with torch.no_grad():
        return {name: [float(f"{x:.4g}") for x in magnitude_direction(*pair)] for name, pair in pairs.items()}


def directions():
    """How far training turns each weight matrix of SmolLM2, and how much it changes its lengths, over rates."""
    how = {"model": "smollm2", "version": 1, "steps": 44, "batch_size": 8}  # version: of the SQL task
    grid = [
        {"method": method, "lr": lr, "seed": [0, 1, 2]} | how
        for method, lr in (("full", 3e-4), ("LoRA", 3e-3), ("DoRA", 3e-3))
    ]
    sweep(turn, grid, HERE / "directions", command=COMMAND + " directions")


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


def table():
    """All methods at rank 16 or near its size, some at rank 4 or with more steps, and some rates further off."""
    for method in METHODS:
        facts(method, RANK, 80, SEEDS)
    for (rank, steps), methods in AGAIN.items():
        for method in methods:
            facts(method, rank, steps, SEEDS)
    for method, further in WIDE.items():
        how = {"method": method, "rank": RANK if METHODS[method].ranked else 0, "steps": 80, "seed": SEEDS} | TINY
        sweep(fact_runs, how | {"lr": [rate(k) for k in further]}, HERE / "facts", **HOW)


STUDIES = {
    "facts": table,
    "costs": lambda: sweep(cost, {"method": COSTLY}, HERE / "costs", command=COMMAND + " costs"),
    "directions": directions,
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
