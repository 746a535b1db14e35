"""Trains adapters on bases in 32, 16, 8 and 4 bits; measures what such bases take, and budgets what does not fit here.

    python data/qlora/record.py [study ...]    all studies, about 30 minutes of a core, or some of `STUDIES`

Lesson 04 reads the records in these folders. A second start makes only those that are missing.
"""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.cost.memory import peak_bytes, returning_memory
from lorakit.experiments.ablation import runs
from lorakit.experiments.sweep import sweep
from lorakit.layers import nf4
from lorakit.models.quantize import dequantize_model, quantize_model
from lorakit.speed.accelerated import accelerated
from lorakit.training.loss import completion_loss

with quiet():
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = Path(__file__).parent
INT4 = tuple(level / 7 for level in range(-7, 8))
CODEBOOKS = {"NF4": nf4.NF4, "FP4": nf4.FP4, "int4": INT4}

ON_FACTS = {"model": "tiny", "task": "facts", "n": 96, "rank": 8, "alpha": 128, "batch_size": 8, "steps": [150, 75]}
ON_FACTS |= {"lr": [2e-3, 1e-3, 4e-3]}
FACTS = [
    {"base": ["float32", "NF4", "int4", "FP4", "int8", "bfloat16"]} | ON_FACTS | {"seed": list(range(10))},
    *({"base": "noise", "noise_seed": seed} | ON_FACTS | {"seed": seed} for seed in range(10)),
]
ON_SQL = {"model": "smollm2", "task": "sql", "version": 2, "rank": 16, "alpha": 128, "batch_size": 8, "steps": 12}
ON_SQL |= {"lr": [2e-3, 1e-3, 4e-3, 5e-4], "n": 96, "test": [["validation", "tables"]], "tested": 48}
SQL = {"seed": list(range(5)), "base": ["float32", "NF4"]} | ON_SQL

LORA = {"model": "smollm2", "rank": 16, "alpha": 32}
COSTS = {"arm": ["float32", "bfloat16", "int8", "NF4", "NF4, bfloat16", "FP4"]} | LORA

BF16 = {"dtype": "bfloat16", "batch_size": 1, "tokens": 512, "checkpointing": True}
LONG = {"dtype": "bfloat16", "batch_size": 1, "tokens": [256, 1024, 4096]}
MIXED = {"method": "full", "optimizer": "adamw-paged", "master_weights": True}
QV = {"targets": [["q_proj", "v_proj"]], "rank": 4, "dtype": "float16", "batch_size": 1, "tokens": 2048}
SIZES = ["llama-2-7b", "llama-2-13b", "llama-2-70b"]
BUDGETS = [
    *({"model": SIZES} | BF16 | more for more in (MIXED, {"method": ["lora", "qlora"]})),
    {"model": "llama-65b"} | BF16 | {"method": "full", "optimizer": "adamw-paged"},
    {"model": "llama-65b"} | BF16 | {"method": "qlora", "rank": 64},
    {"model": "gpt-3-175b", "method": ["full", "lora"], "checkpointing": True} | QV,
    *({"model": "llama-2-7b"} | LONG | more for more in (MIXED, {"method": ["lora", "qlora"]})),
]


def rounded(model, base, noise_seed=0):
    """The model with the weights of its linear layers rounded as the base has them, in float32."""
    if base in CODEBOOKS:
        return dequantize_model(quantize_model(model, codebook=CODEBOOKS[base]))
    generator = torch.Generator().manual_seed(noise_seed)
    for name in lorakit.find_targets(model):
        layer = model.get_submodule(name)
        W = layer.weight.data
        if base == "bfloat16":
            W.copy_(W.bfloat16())
        elif base == "int8":
            blocks = W.view(-1, 64)
            step = blocks.abs().amax(1, keepdim=True) / 127
            blocks.copy_((blocks / step).round() * step)
        elif base == "noise":  # as large as NF4's error in this layer
            error = lorakit.NF4Linear(layer).frozen_weight() - W
            noise = torch.randn(W.shape, generator=generator, dtype=torch.float32)
            W.add_(noise * error.norm() / noise.norm())
    return model


@cache
def saved(model, base, noise_seed=0):
    """A folder with the rounded model; its weights in float32 compute what the codes do."""
    folder = tempfile.TemporaryDirectory()
    plain, tokenizer = lorakit.load_model(model)
    with quiet():
        rounded(plain, base, noise_seed).save_pretrained(folder.name)
        tokenizer.save_pretrained(folder.name)
    return folder


def trained(settings):
    """`runs` of `lorakit.experiments.ablation`, on the rounded base that all these settings have in common."""
    own = {name: settings[0][name] for name in ("model", "base", "noise_seed") if name in settings[0]}
    model = {"model": saved(**own).name}
    return runs([{name: value for name, value in each.items() if name not in own} | model for each in settings])


def trained_alone(**setting):
    return trained([setting])[0]


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
    codebook = CODEBOOKS.get(arm.split(",")[0])
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


STUDIES = {
    "facts": (trained, FACTS, ("lr", "seed")),
    "sql": (trained_alone, SQL, ()),
    "costs": (cost, COSTS, ()),
    "budgets": (budget, BUDGETS, ()),
}


def main(*names):
    for name in names or STUDIES:
        run, grid, together = STUDIES[name]
        sweep(run, grid, HERE / name, together=together, at_once=15, command=f"python data/qlora/record.py {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cost"]:
        print_cost(**json.loads(sys.argv[2]))
    else:
        main(*sys.argv[1:])
