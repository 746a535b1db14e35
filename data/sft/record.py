"""Trains SmolLM2 on the SQL task over learning rates: with LoRA, fully, and by prompt tuning.

    python data/sft/record.py [part ...]      all runs, or those of parts of `GRIDS`; about five minutes of a core each

Lesson 03 reads the records in trainings. A second start makes only those that are missing; several may share the work.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.nn import functional as F

import lorakit
from lorakit._optional import quiet
from lorakit.experiments.sweep import sweep
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.sql.task import generate
from lorakit.training.batch import collate
from lorakit.training.evaluate import teacher_forced
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft

FOLDER = Path(__file__).with_name("trainings")
ITEMS = 128  # questions per held-out split
COMMON = {"model": "smollm2", "version": 2, "steps": 35, "batch_size": 8, "seed": 0}  # version: of the SQL task
LORA = COMMON | {"arm": "LoRA", "rank": 16, "alpha": 32}
FULL = COMMON | {"arm": "full"}
PROMPT = COMMON | {"arm": "prompt tuning", "virtual_tokens": 20}
GRIDS = {
    "rates": [LORA | {"lr": [2e-3, 4e-3, 1e-3, 8e-3, 2e-4]}, FULL | {"lr": [2e-4, 4e-4, 1e-4, 8e-4, 1.6e-3, 5e-5]}],
    "prompt": [
        PROMPT | {"start": "words", "lr": [1e-1, 3e-1, 1.0, 3e-2, 1e-2, 1e-3, 3.0]},
        PROMPT | {"start": "random", "lr": [3e-1, 1e-1, 1.0, 3e-2, 1e-2, 1e-3, 3.0]},
        PROMPT | {"start": "words", "lr": [3e-1, 1e-1, 1.0], "steps": 140},
    ],
}


def lora_config(how):
    return peft.LoraConfig(r=how["rank"], lora_alpha=how["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")


def lora(model, examples, how):
    """`fit` with lorakit's adapters that start as PEFT's do with this seed, which draws numbers in another order."""
    torch.manual_seed(how["seed"])
    with tempfile.TemporaryDirectory() as folder, quiet():
        wrapped = peft.get_peft_model(model, lora_config(how))
        wrapped.save_pretrained(folder)
        lorakit.load_adapter(wrapped.unload(), folder)
    return model, lorakit.fit(model, examples, **recipe(how), show=False).loss


def full(model, examples, how):
    model.requires_grad_(True)
    return model, lorakit.fit(model, examples, **recipe(how), show=False).loss


def prompt_tuning(model, examples, how):
    """PEFT's prompt tuning in the plain loop: trained vectors before every prompt, started at words or at random."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=how["virtual_tokens"])
    if how["start"] == "words":
        config.prompt_tuning_init = peft.PromptTuningInit.TEXT
        config.tokenizer_name_or_path = model.name_or_path
        config.prompt_tuning_init_text = "Write one SQLite query that answers the question about the table."
    torch.manual_seed(how["seed"])
    with quiet():
        model = peft.get_peft_model(model, config)
    with accelerated(model, 70 * how["batch_size"]):
        return model, plain_loop(model, examples, **recipe(how))


def recipe(how):
    return {name: how[name] for name in ("steps", "batch_size", "lr", "seed")}


@torch.no_grad()
def prompted(model, examples):
    """What `teacher_forced` says, for a model that puts its own vectors before every text."""
    found, before = [], model.active_peft_config.num_virtual_tokens
    for start in range(0, len(examples), 8):
        batch = collate(examples[start : start + 8], model.device)
        labels = batch.pop("labels")[:, 1:]
        logits = model.eval()(**batch).logits[:, before:-1]
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # zero where the label is -100
        exact = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
        found += zip(exact.tolist(), nats.sum(-1).tolist(), strict=True)
    return found


ARMS = {"LoRA": lora, "full": full, "prompt tuning": prompt_tuning}


def run(**how):
    """A training, and on the first questions of two splits: how many are answered exactly, and nats per token."""
    model, tokenizer = lorakit.load_model(how["model"])
    items = generate("train", how["steps"] * how["batch_size"], how["seed"], version=how["version"])
    start = time.perf_counter()
    model, losses = ARMS[how["arm"]](model, lorakit.SQL.encode(tokenizer, items), how)
    result = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": [round(loss, 7) for loss in losses],
        "train_seconds": round(time.perf_counter() - start, 1),
        "items": ITEMS,
    }
    for split in ("validation", "tables"):
        examples = lorakit.SQL.encode(tokenizer, lorakit.load_sql(split, version=how["version"])[:ITEMS])
        labelled = sum(label != -100 for example in examples for label in example.labels)
        scored = prompted(model, examples) if "start" in how else teacher_forced(model, examples, show=False)
        result[f"exact_{split}"] = sum(exact for exact, _ in scored)
        result[f"nats_{split}"] = round(sum(nats for _, nats in scored) / labelled, 5)
    return result


def main(parts=tuple(GRIDS)):
    for part in parts:
        sweep(run, GRIDS[part], FOLDER, command=f"python data/sft/record.py {part}")


if __name__ == "__main__":
    main(sys.argv[1:] or GRIDS)
