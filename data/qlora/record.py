"""Trains SmolLM2 on the SQL task with LoRA, its base in 32, 16, 8 and 4 bits.

    python data/qlora/record.py            all runs, about 35 minutes on two cores
    python data/qlora/record.py budgets    one study: costs, trainings, or budgets of models that do not fit here

Lesson 04 reads the records in these folders. A second start makes only those that are missing.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.sweep import sweep
from lorakit.layers import nf4
from lorakit.models.quantize import quantize_model
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.tasks.task import encoded
from lorakit.training.loss import completion_loss
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = Path(__file__).parent
ITEMS = 208
LR = 3e-3  # the best of five for LoRA on the float32 base and this edition
RATES = {
    "float32": [LR],
    "bfloat16": [LR],
    "int8": [LR],
    "NF4": [LR, 1e-3, 1e-2],
    "NF4, bfloat16": [LR],
    "NF4, twice the steps": [LR],
    "FP4": [LR],
}
LORA = {"model": "smollm2", "rank": 16, "alpha": 32}
HOW = {"version": 1, "batch_size": 8} | LORA  # version: of the SQL task
COSTS = {"arm": [arm for arm in RATES if "twice" not in arm]} | LORA
TRAININGS = [
    {"arm": arm, "lr": rates, "seed": [0, 1, 2], "steps": 88 if "twice" in arm else 44} | HOW
    for arm, rates in RATES.items()
]

BF16 = {"dtype": "bfloat16", "batch_size": 1, "tokens": 512, "checkpointing": True}
MIXED = {"method": "full", "optimizer": "adamw-paged", "master_weights": True}
QV = {"targets": [["q_proj", "v_proj"]], "rank": 4, "dtype": "float16", "batch_size": 1, "tokens": 2048}
SIZES = ["llama-2-7b", "llama-2-13b", "llama-2-70b"]
BUDGETS = [
    *({"model": SIZES} | BF16 | more for more in (MIXED, {"method": ["lora", "qlora"]})),
    {"model": "llama-65b"} | BF16 | {"method": "full", "optimizer": "adamw-paged"},
    {"model": "llama-65b"} | BF16 | {"method": "qlora", "rank": 64},
    {"model": "gpt-3-175b", "method": ["full", "lora"], "checkpointing": True} | QV,
    {"model": "llama-2-7b", "method": ["full", "lora", "qlora"], "dtype": "bfloat16", "batch_size": 1}
    | {"tokens": [256, 1024, 4096]},
]


def base(arm, model):
    """SmolLM2 with its linear layers as the arm has them, and its tokenizer."""
    dtype = torch.bfloat16 if "bfloat16" in arm else torch.float32
    if arm == "int8":
        _, tokenizer = lorakit.load_model(model)
        with quiet():
            config = BitsAndBytesConfig(load_in_8bit=True)
            name = tokenizer.name_or_path
            return AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=dtype), tokenizer
    model, tokenizer = lorakit.load_model(model, dtype=dtype)
    codebook = {"NF4": nf4.NF4, "FP4": nf4.FP4}.get(arm.split(",")[0])
    return (quantize_model(model, codebook=codebook) if codebook else model), tokenizer


def adapted(arm, seed, model, rank, alpha):
    """The same, with adapters that start alike in all arms; PEFT's on the 8-bit base, which computes in its own way."""
    quantised, tokenizer = base(arm, model)
    start = lorakit.load_model(model)[0] if arm == "int8" else quantised
    torch.manual_seed(seed)
    lorakit.inject(start, rank, alpha)
    if arm != "int8":
        return start, tokenizer
    with tempfile.TemporaryDirectory() as folder, quiet():
        lorakit.save_adapter(start, folder)
        return peft.PeftModel.from_pretrained(quantised, folder, is_trainable=True), tokenizer


def train(model, examples, **recipe):
    """`fit`, or for PEFT's model the same recipe in plain operations."""
    if hasattr(model, "peft_config"):
        return plain_loop(model, examples, **recipe)
    return lorakit.fit(model, examples, **recipe, show=False).loss


def run(arm, lr, seed, version, steps, batch_size, **lora):
    """One training and its scores on questions about new tables: `exact` to the letter, `right` by its rows."""
    model, tokenizer = adapted(arm, seed, **lora)
    start = time.perf_counter()
    examples = encoded(tokenizer, lorakit.load_sql("train", version=version))
    losses = train(model, examples, lr=lr, seed=seed, steps=steps, batch_size=batch_size)
    found = {"train_seconds": round(time.perf_counter() - start, 1), "losses": [round(loss, 7) for loss in losses]}
    items, model = lorakit.load_sql("tables", version=version)[:ITEMS], model.eval()
    found |= {"items": len(items), "exact": sum(lorakit.exact_match(model, encoded(tokenizer, items), show=False))}
    if lr == LR:  # generation takes longer than training
        answers = lorakit.SQL.answers(model, tokenizer, items, max_new_tokens=32, show=False)
        found["right"] = sum(execution_accuracy(items, answers))
    return found


def cost(**setting):
    """What a base takes, measured in a process of its own: bytes, and by how much a step exceeds them."""
    command = [sys.executable, __file__, "--cost", json.dumps(setting)]
    done = subprocess.run(command, env=returning_memory(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_cost(arm, **lora):
    """The body of that process: one step on 4 x 128 tokens, all labelled."""
    model, _ = adapted(arm, 0, **lora)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ids = torch.randint(5, 49_000, (4, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours = not hasattr(model.train(), "peft_config")

    def step():
        (completion_loss(model, batch) if ours else model(**batch).loss).backward()
        model.zero_grad(set_to_none=True)

    if ours:
        with accelerated(model, 512, trains=True):
            step()
            grown = sorted(peak_bytes(step) for _ in range(3))[1]
    else:
        step()
        grown = sorted(peak_bytes(step) for _ in range(3))[1]
    print(json.dumps({"base_bytes": sum(tensors.values()) - trained, "step_bytes": grown}))


def budget(model, **settings):
    """What a model needs that does not fit here: deterministic, recorded because all of them take two minutes."""
    found = lorakit.budget(model, **settings)
    return {"parameters": found.parameters, "trained": found.trained, "peak": found.peak}


STUDIES = {"costs": (cost, COSTS), "trainings": (run, TRAININGS), "budgets": (budget, BUDGETS)}


def main(*names):
    for name in names or STUDIES:
        sweep(*STUDIES[name], HERE / name, command=f"python data/qlora/record.py {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cost"]:
        print_cost(**json.loads(sys.argv[2]))
    else:
        main(*sys.argv[1:])
