"""Trains SmolLM2 on the SQL task with LoRA, its base in 32, 16, 8 and 4 bits.

    python data/qlora/record.py          all runs, about 35 minutes on two cores
    python data/qlora/record.py NF4      the runs whose base begins so
    python data/qlora/record.py budgets  memory of models that do not fit here, two minutes, into budgets.json

Lesson 04 reads results.json. Runs are recorded one by one; a second start makes only those that are missing.
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
from lorakit.experiments.recorded import record_runs
from lorakit.layers import nf4
from lorakit.models.quantize import quantize_model
from lorakit.speed.activations import lean
from lorakit.speed.cpu import fast
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.tasks.task import encoded
from lorakit.training.loss import completion_loss
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

SIZES = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
RESULTS = Path(__file__).with_name("results.json")
STEPS, BATCH, RANK, ALPHA, ITEMS = 44, 8, 16, 32, 208
SEEDS = (0, 1, 2)
LR = 3e-3  # the best of five for LoRA on the float32 base, as data/sft has it
ARMS = {  # base -> learning rates
    "float32": (LR,),
    "bfloat16": (LR,),
    "int8": (LR,),
    "NF4": (LR, 1e-3, 1e-2),
    "NF4, bfloat16": (LR,),
    "NF4, twice the steps": (LR,),
    "FP4": (LR,),
}


def base(arm):
    """SmolLM2 with its linear layers as the arm has them, and its tokenizer."""
    dtype = torch.bfloat16 if "bfloat16" in arm else torch.float32
    if arm == "int8":
        _, tokenizer = lorakit.load_model("smollm2")
        with quiet():
            config = BitsAndBytesConfig(load_in_8bit=True)
            name = tokenizer.name_or_path
            return AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=dtype), tokenizer
    model, tokenizer = lorakit.load_model("smollm2", dtype=dtype)
    codebook = {"NF4": nf4.NF4, "FP4": nf4.FP4}.get(arm.split(",")[0])
    return (quantize_model(model, codebook=codebook) if codebook else model), tokenizer


def adapted(arm, seed):
    """The same, with adapters that start alike in all arms; PEFT's on the 8-bit base, which computes in its own way."""
    model, tokenizer = base(arm)
    if arm != "int8":
        torch.manual_seed(seed)
        lorakit.inject(model, RANK, ALPHA)
        return model, tokenizer
    start, _ = lorakit.load_model("smollm2")
    torch.manual_seed(seed)
    lorakit.inject(start, RANK, ALPHA)
    with tempfile.TemporaryDirectory() as folder, quiet():
        lorakit.save_adapter(start, folder)
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True), tokenizer


def train(model, examples, lr, seed, steps):
    """`fit`, or for PEFT's model the same recipe in plain operations."""
    settings = {"steps": steps, "batch_size": BATCH, "lr": lr, "seed": seed}
    if hasattr(model, "peft_config"):
        return plain_loop(model, examples, **settings)
    return lorakit.fit(model, examples, **settings, show=False).loss


def run(arm, lr, seed):
    """One training and its scores on questions about new tables: `exact` to the letter, `right` by its rows."""
    model, tokenizer = adapted(arm, seed)
    start = time.perf_counter()
    examples, steps = encoded(tokenizer, lorakit.load_sql("train")), STEPS * (2 if "twice" in arm else 1)
    losses = train(model, examples, lr, seed, steps)
    found = {"seconds": round(time.perf_counter() - start, 1), "losses": [round(loss, 7) for loss in losses]}
    items, model = lorakit.load_sql("tables")[:ITEMS], model.eval()
    found |= {"items": len(items), "exact": sum(lorakit.exact_match(model, encoded(tokenizer, items), show=False))}
    if lr == LR:  # generation takes longer than training
        answers = lorakit.SQL.answers(model, tokenizer, items, max_new_tokens=32, show=False)
        found["right"] = sum(execution_accuracy(items, answers))
    return found


def cost(arm):
    """What a base takes, measured in a process of its own: bytes, and by how much a step exceeds them."""
    command = [sys.executable, __file__, "--cost", arm]
    done = subprocess.run(command, env=returning_memory(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_cost(arm):
    """The body of that process: one step on 4 x 128 tokens, all labelled."""
    model, _ = adapted(arm, 0)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ids = torch.randint(5, 49_000, (4, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours = not hasattr(model.train(), "peft_config")

    def step():
        (completion_loss(model, batch) if ours else model(**batch).loss).backward()
        model.zero_grad(set_to_none=True)

    if ours:
        with fast(model, 512), lean(model):
            step()
            grown = sorted(peak_bytes(step) for _ in range(3))[1]
    else:
        step()
        grown = sorted(peak_bytes(step) for _ in range(3))[1]
    print(json.dumps({"base_bytes": sum(tensors.values()) - trained, "step_bytes": grown}))


def budgets():
    """What models need that do not fit here, by `lorakit.budget`: deterministic, recorded because it takes a minute."""
    bf16 = {"dtype": "bfloat16", "batch_size": 1, "tokens": 512, "checkpointing": True}
    mixed = {"method": "full", "optimizer": "adamw-paged", "master_weights": True}
    qv = {"targets": ["q_proj", "v_proj"], "rank": 4, "dtype": "float16", "batch_size": 1, "tokens": 2048}
    grid = [
        *({"model": name} | bf16 | more for name in SIZES for more in (mixed, {"method": "lora"}, {"method": "qlora"})),
        {"model": "llama-65b"} | bf16 | {"method": "full", "optimizer": "adamw-paged"},
        {"model": "llama-65b"} | bf16 | {"method": "qlora", "rank": 64},
        *({"model": "gpt-3-175b", "method": method, "checkpointing": True} | qv for method in ("full", "lora")),
        *(
            {"model": "llama-2-7b", "method": method, "dtype": "bfloat16", "batch_size": 1, "tokens": tokens}
            for tokens in (256, 1024, 4096)
            for method in ("full", "lora", "qlora")
        ),
    ]

    def run(model, **settings):
        found = lorakit.budget(model, **settings)
        return {"parameters": found.parameters, "trained": found.trained, "peak": found.peak}

    record_runs(RESULTS.with_name("budgets.json"), grid, run, "python data/qlora/record.py budgets")


def main(prefix=""):
    chosen = {arm: rates for arm, rates in ARMS.items() if arm.startswith(prefix)}
    record = {
        "command": "python data/qlora/record.py",
        "packages": ("torch", "transformers", "peft", "bitsandbytes"),
        "model": "smollm2",
        "settings": {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "alpha": ALPHA},
    }
    costs = [{"arm": arm, "of": "cost"} for arm in chosen if "twice" not in arm]
    record_runs(RESULTS, costs, lambda arm, of: cost(arm), **record)
    grid = [{"arm": arm, "lr": lr, "seed": seed} for arm, rates in chosen.items() for lr in rates for seed in SEEDS]
    record_runs(RESULTS, grid, run, **record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cost"]:
        print_cost(sys.argv[2])
    elif sys.argv[1:2] == ["budgets"]:
        budgets()
    else:
        main(*sys.argv[1:2])
