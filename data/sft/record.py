"""Trains SmolLM2 on the SQL task: through TRL; by lorakit with LoRA and fully, over learning rates; by prompt tuning.

    python data/sft/record.py            all runs, about 40 minutes on two cores
    python data/sft/record.py trl        the runs whose arm begins so

Lesson 03 reads results.json. Runs are recorded one by one; a second start makes only those that are missing.
"""

import os
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.experiments.recorded import record_runs
from lorakit.speed.cpu import fast
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.tasks.task import encoded
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

RESULTS = Path(__file__).with_name("results.json")
STEPS, BATCH, RANK, ALPHA, VIRTUAL, ITEMS = 44, 8, 16, 32, 20, 208
SEEDS = (0, 1, 2)
ARMS = {  # arm -> learning rates
    "TRL SFTTrainer": (3e-3,),
    "LoRA": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "prompt tuning": (1e-1, 3e-1),
}


def lora(seed):
    """A model with lorakit's adapters that start as PEFT's do with this seed, which draws numbers in another order."""
    model, tokenizer = lorakit.load_model("smollm2")
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        wrapped = peft.get_peft_model(model, lora_config())
        wrapped.save_pretrained(folder)
        lorakit.load_adapter(wrapped.unload(), folder)
    return model, tokenizer


def lora_config():
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def run_lora(lr, seed):
    model, tokenizer = lora(seed)
    history = lorakit.fit(model, encoded(tokenizer, lorakit.load_sql("train")), **settings(lr, seed))
    return model, tokenizer, history.loss


def run_full(lr, seed):
    model, tokenizer = lorakit.load_model("smollm2")
    model.requires_grad_(True)
    history = lorakit.fit(model, encoded(tokenizer, lorakit.load_sql("train")), **settings(lr, seed))
    return model, tokenizer, history.loss


def settings(lr, seed):
    return {"steps": STEPS, "batch_size": BATCH, "lr": lr, "seed": seed, "show": False}


def run_trl(lr, seed):
    """SFTTrainer over prompt/completion columns, with peft_config; under `fast`, which changes no result."""
    model, tokenizer = lorakit.load_model("smollm2")
    items = lorakit.load_sql("train")
    columns = {"prompt": [i.prompt for i in items], "completion": [i.completion for i in items]}
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = SFTConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=lr, seed=seed,
            warmup_steps=0.1, lr_scheduler_type="linear", weight_decay=0.0, use_cpu=True, bf16=False,
            activation_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            peft_config=lora_config(),
        )  # fmt: skip
        trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__))
        with fast(trainer.model, 50 * BATCH):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, tokenizer, losses


def run_prompt(lr, seed):
    """PEFT's prompt tuning in the plain loop: `VIRTUAL` trained vectors before every prompt, started at words."""
    model, tokenizer = lorakit.load_model("smollm2")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prompt_tuning_init="TEXT",
        tokenizer_name_or_path=model.name_or_path,
        prompt_tuning_init_text="Write one SQLite query that answers the question about the table.",
    )  # fmt: skip
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(model, config)
    examples = encoded(tokenizer, lorakit.load_sql("train"))
    with fast(model, 70 * BATCH):
        losses = plain_loop(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return model, tokenizer, losses


def scores(model, tokenizer, arm, lr):
    """How many of `ITEMS` questions about new tables are answered as expected to the letter, and find the right rows.

    Rows need generation, which takes longer than the training: it is done where arms are compared, not learning rates.
    """
    items, model = lorakit.load_sql("tables")[:ITEMS], model.eval()
    found = {"items": len(items)}
    if arm != "prompt tuning":
        found["exact"] = sum(lorakit.exact_match(model, encoded(tokenizer, items), show=False))
    if arm in ("TRL SFTTrainer", "prompt tuning") or (arm, lr) == ("LoRA", 3e-3):
        answers = lorakit.SQL.answers(model, tokenizer, items, max_new_tokens=32, show=False)
        found["right"] = sum(execution_accuracy(items, answers))
    return found


RUNS = {"TRL SFTTrainer": run_trl, "LoRA": run_lora, "full": run_full, "prompt tuning": run_prompt}


def run(arm, lr, seed):
    start = time.perf_counter()
    model, tokenizer, losses = RUNS[arm](lr, seed)
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, **scores(model, tokenizer, arm, lr)} | {
        "losses": [round(loss, 7) for loss in losses],
        "seconds": round(seconds, 1),
    }


def main(prefix=""):
    chosen = [(arm, rates) for arm, rates in ARMS.items() if arm.startswith(prefix)]
    record_runs(
        RESULTS,
        [{"arm": arm, "lr": lr, "seed": seed} for arm, rates in chosen for lr, seed in product(rates, SEEDS)],
        run,
        "python data/sft/record.py",
        ("torch", "transformers", "peft", "trl", "datasets"),
        model="smollm2",
        settings={"steps": STEPS, "batch_size": BATCH, "rank": RANK, "alpha": ALPHA, "virtual_tokens": VIRTUAL},
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
