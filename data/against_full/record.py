"""LoRA beside full fine-tuning: what is forgotten while something new is learnt, how much fits in, which batches work.

    python data/against_full/record.py [study ...]      all studies, about two hours of a core, or some of `STUDIES`
    python data/against_full/record.py words            the base's own words, drawn once more

Lesson 08 reads the records in these folders. A second start makes only those that are missing; several may share it.
"""

import json
import os
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

import lorakit
from lorakit._atomic import write_atomically
from lorakit._random import seeded
from lorakit.experiments.ablation import runs
from lorakit.experiments.sweep import sweep
from lorakit.layers.lowrank import count_intruders, lower_intruders
from lorakit.tasks.facts import encoded, facts, known_facts
from lorakit.tasks.sql.task import generate
from lorakit.training.batch import Example
from lorakit.training.evaluate import share_and_nats

FOLDER = Path(__file__).parent
WORDS = FOLDER / "own_words.jsonl"
FACTS = {"model": "tiny", "n": 48, "steps": 300, "batch_size": 16}
SQL = {"model": "smollm2", "n": 192, "steps": 24, "batch_size": 8}  # each question is seen once
FULL = [2.5e-4, 5e-4, 1e-3, 1.25e-4, 2e-3, 6.25e-5]  # rates of what is trained in full
LORA = [1e-3, 2e-3, 4e-3, 5e-4, 8e-3, 2.5e-4]
ARMS = [
    {"arm": "full", "lr": FULL},
    {"arm": "LoRA", "rank": 16, "lr": LORA},
    {"arm": "LoRA", "rank": 1, "lr": LORA},
    {"arm": "LoRA", "rank": 64, "lr": LORA},
    {"arm": "full, linear layers", "lr": FULL},
    {"arm": "DoRA", "rank": 16, "lr": LORA},
    {"arm": "last block", "lr": FULL},
    {"arm": "LoRA", "rank": 16, "alpha": 512, "lr": [2.5e-4, 5e-4, 1e-3, 1.25e-4]},
    {"arm": "LoRA", "rank": 16, "alpha": 2048, "lr": [6.25e-5, 1.25e-4, 2.5e-4, 3.125e-5]},
    {"arm": "LoRA", "rank": 4, "lr": LORA},
]
SQL_ARMS = [
    {"arm": "full", "lr": [4e-4, 2e-4, 8e-4]},
    {"arm": "LoRA", "rank": 16, "lr": [4e-3, 2e-3]},
    {"arm": "LoRA, shuffled answers", "rank": 16, "lr": 4e-3},  # a control: nothing can be learnt
]
WEAKENED = [{"rank": rank, "lr": 1e-3, "seed": seed} | FACTS for seed in range(5) for rank in (1, 16, 64)]
FORGETTING = [FACTS | arm | {"seed": seed} for seed in range(5) for arm in ARMS]
FORGETTING_SQL = [SQL | arm | {"seed": seed} for seed in range(3) for arm in SQL_ARMS]
ON_FACTS = {"task": "facts", "lr": [5e-4, 1e-3, 2e-3]}
CAPACITY = [  # data/ablations has fewer facts
    {"n": 384, "steps": steps, "batch_size": 16, "alpha": 128, "rank": rank, "seed": seed} | ON_FACTS
    for seed in range(5)
    for steps in (300, 600)
    for rank in (0, 16, 64, 1)
]
CAPACITY += [each | {"lr": 4e-3} for each in CAPACITY if not each["rank"]]
BATCHES = [  # data/ablations has batches of 16
    {"n": 192, "steps": 4800 // size, "batch_size": size, "alpha": 128, "rank": [0, 8, 64], "seed": seed} | ON_FACTS
    for seed in range(5)
    for size in (64, 4)
]
BATCHES += [each | {"lr": 4e-3 if each["batch_size"] == 64 else 2.5e-4} for each in BATCHES]
LOOKS = {"tiny": 30, "smollm2": 3}  # at what is known, evenly over the steps
QUESTIONS = (
    "What is the capital of Italy?",
    "Why does the sky look blue?",
    "How do I boil an egg?",
    "Name three uses of a paper clip.",
    "Explain what a prime number is.",
    "Write two sentences about autumn.",
    "What should I pack for a day by the sea?",
    "How does a bicycle stay upright?",
    "Give me a tip for falling asleep.",
    "What is photosynthesis?",
    "Tell me about the Moon.",
    "Why is bread soft?",
    "How can I learn a new language?",
    "What does a librarian do?",
    "Describe a cat to somebody who has never seen one.",
    "What is the difference between weather and climate?",
    "Write a short letter that thanks a neighbour.",
    "How many days does a week have, and what are they called?",
    "What is a computer program?",
    "Suggest a name for a small dog.",
    "Why do we have leap years?",
    "How is paper made?",
    "What makes a good friend?",
    "Tell me a story about a lighthouse in three sentences.",
    "What is gravity?",
    "How do I keep houseplants alive?",
    "What was invented first, the wheel or the clock?",
    "Explain what a budget is.",
    "Which animals live in the desert?",
    "How does a vaccine work?",
    "What can I cook with potatoes and onions?",
    "Why do leaves change their colour?",
)
SHARE = 0.75  # of an intruder's singular value that is left after lowering
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.25, 0.0)
SPLITS, LOOKED = ("validation", "tables"), 40  # of the SQL questions, and how many of each


def prepare(model: nn.Module, arm: str, rank: int, alpha: int, seed: int) -> None:
    """Makes the model trainable as the arm is."""
    if rank:
        with seeded(seed):
            lorakit.inject(model, rank, alpha, layer=lorakit.DoRALinear if arm == "DoRA" else lorakit.LoRALinear)
        return
    linear, last = weights(model), f"layers.{model.config.num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        chosen = {"full": True, "full, linear layers": name in linear, "last block": name in linear and last in name}
        parameter.requires_grad_(chosen[arm])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that LoRA reaches."""
    names = [f"{name}.weight" for name in lorakit.find_targets(model)]
    return {name: model.get_parameter(name).detach().clone() for name in names}


@torch.no_grad()
def put(model: nn.Module, before: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Makes the weights what they were before, plus these changes."""
    for name, weight in before.items():
        model.get_parameter(name).copy_(weight + changes[name])


def changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """By how much the weights differ from those before."""
    return {name: model.get_parameter(name).detach() - weight for name, weight in before.items()}


def data(
    model: str, tokenizer: Any, n: int, seed: int, shuffled: bool
) -> tuple[list[Example], dict[str, list[Example]]]:
    """What is taught, and what is looked at: of the new what chooses and what is reported, and the old."""
    if model == "tiny":
        new = encoded(tokenizer, facts(n, seed))
        return new, {"new": new, "known": encoded(tokenizer, known_facts())}
    texts = [json.loads(line) for line in WORDS.read_text(encoding="utf-8").splitlines()]
    looked = {split: lorakit.SQL.encode(tokenizer, lorakit.load_sql(split, version=2)[:LOOKED]) for split in SPLITS}
    looked["known"] = [lorakit.encode(tokenizer, **text) for text in texts]
    items = generate("train", n, seed, version=2)
    answers = random.Random(seed).sample(items, n) if shuffled else items
    pairs = zip(items, answers, strict=True)
    return [lorakit.encode(tokenizer, item.prompt, answer.completion) for item, answer in pairs], looked


def run(
    arm: str, lr: float, seed: int, model: str, n: int, steps: int, batch_size: int, rank: int = 0, alpha: int = 32
) -> dict[str, Any]:
    """One training, what is known along it, and the intruder dimensions at its end, lowered as well."""
    base, tokenizer = lorakit.load_model(model)
    before = weights(base)
    taught, looked = data(model, tokenizer, n, seed, "shuffled" in arm)
    found: dict[str, Any] = {"step": []}

    def look(step: int, prefix: str = "") -> None:
        for name, examples in looked.items():
            both = share_and_nats(base, examples, batch_size=256, show=False)
            for key, value in zip((prefix + name, f"{prefix}{name}_nats"), both, strict=True):
                found.setdefault(key, []).append(round(value, 5))
        if not prefix:
            found["step"].append(step)

    every = steps // LOOKS[model]
    if model == "tiny":
        look(0)
    prepare(base, arm, rank, alpha, seed)
    trained = lorakit.count(base).trainable
    lorakit.fit(
        base, taught, steps=steps, batch_size=batch_size, lr=lr, seed=seed, show=False,
        after_step=lambda step: look(step.number) if step.number % every == 0 else None,
    )  # fmt: skip
    if rank:
        lorakit.merge(base)
    changes = changed(base, before)
    moved, size = (sum(t.square().sum().item() for t in each.values()) for each in (changes, before))
    found |= {"trained": trained, "moved": round((moved / size) ** 0.5, 6), "layers": len(before)}
    found["intruders"] = sum(count_intruders(weight, changes[name]) for name, weight in before.items())
    if model == "tiny":
        put(base, before, {name: lower_intruders(weight, changes[name], SHARE) for name, weight in before.items()})
        look(steps, "lowered_")
    return found


def weaken(rank: int, lr: float, seed: int, model: str, n: int, steps: int, batch_size: int) -> dict[str, Any]:
    """LoRA, and what is known if its intruders are lowered to a share, or the whole update is shrunk to it."""
    base, tokenizer = lorakit.load_model(model)
    before = weights(base)
    taught, looked = data(model, tokenizer, n, seed, False)
    prepare(base, "LoRA", rank, 32, seed)
    lorakit.fit(base, taught, steps=steps, batch_size=batch_size, lr=lr, seed=seed, show=False)
    lorakit.merge(base)
    changes = changed(base, before)
    ways = {"lowered": lower_intruders, "shrunk": lambda weight, change, share: share * change}
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for way, share in product(ways, SHARES):
        put(base, before, {name: ways[way](weight, changes[name], share) for name, weight in before.items()})
        (new, _), (_, nats) = (
            share_and_nats(base, looked[name], batch_size=256, show=False) for name in ("new", "known")
        )
        found[way].append([share, round(new, 5), round(nats, 5)])
    return found


def own_words() -> None:
    """What the base itself says to everyday questions, drawn at temperature 0.7: texts that it predicts well."""
    base, tokenizer = lorakit.load_model("smollm2")
    lines = []
    torch.manual_seed(0)
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = base.generate(**ids, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=48)
        completion = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
        lines.append(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False))
    write_atomically({WORDS: ("\n".join(lines) + "\n").encode()})


STUDIES = {  # function, grid, what may differ among runs that are made together
    "forgetting": (run, FORGETTING, ()),
    "forgetting_sql": (run, FORGETTING_SQL, ()),
    "weakened": (weaken, WEAKENED, ()),
    "capacity": (runs, CAPACITY, ("rank", "lr")),
    "batches": (runs, BATCHES, ("rank", "lr")),
}


def main(*names: str) -> None:
    for name in names or STUDIES:
        if name == "words":
            own_words()
            continue
        function, grid, together = STUDIES[name]
        command = f"python data/against_full/record.py {name}"
        sweep(function, grid, FOLDER / name, together=together, command=command)


if __name__ == "__main__":
    main(*sys.argv[1:])
