"""Trains SmolLM2 on the SQL task: through TRL; by lorakit with LoRA and fully, over learning rates; by prompt tuning.

    python data/sft/record.py      all runs, about 40 minutes on two cores

Lesson 03 reads the records in trainings. A second start makes only those that are missing; several may share the work.
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

import lorakit
from lorakit._optional import quiet
from lorakit.experiments.sweep import sweep
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.sql.task import execution_accuracy
from lorakit.tasks.task import encoded
from lorakit.training.reference_loop import plain_loop

with quiet():
    import peft
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

FOLDER = Path(__file__).with_name("trainings")
ITEMS = 208
RATES = {
    "TRL SFTTrainer": [3e-3],
    "LoRA": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "full": [3e-5, 1e-4, 3e-4, 1e-3],
    "prompt tuning": [1e-1, 3e-1],
}
SETTINGS = {"model": "smollm2", "version": 1, "steps": 44, "batch_size": 8}  # version: of the SQL task
SETTINGS |= {"rank": 16, "alpha": 32, "virtual_tokens": 20}
GRID = [{"arm": arm, "lr": rates, "seed": [0, 1, 2]} | SETTINGS for arm, rates in RATES.items()]


def lora_config(how):
    return peft.LoraConfig(r=how["rank"], lora_alpha=how["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")


def run_lora(how):
    """`fit` with lorakit's adapters that start as PEFT's do with this seed, which draws numbers in another order."""
    model, tokenizer = lorakit.load_model(how["model"])
    torch.manual_seed(how["seed"])
    with tempfile.TemporaryDirectory() as folder, quiet():
        wrapped = peft.get_peft_model(model, lora_config(how))
        wrapped.save_pretrained(folder)
        lorakit.load_adapter(wrapped.unload(), folder)
    return model, tokenizer, fitted(model, tokenizer, how)


def run_full(how):
    model, tokenizer = lorakit.load_model(how["model"])
    model.requires_grad_(True)
    return model, tokenizer, fitted(model, tokenizer, how)


def recipe(how):
    return {name: how[name] for name in ("steps", "batch_size", "lr", "seed")}


def examples(tokenizer, how):
    return encoded(tokenizer, lorakit.load_sql("train", version=how["version"]))


def fitted(model, tokenizer, how):
    return lorakit.fit(model, examples(tokenizer, how), **recipe(how), show=False).loss


def run_trl(how):
    """SFTTrainer over prompt/completion columns, with peft_config; under `fast`, which changes no result."""
    model, tokenizer = lorakit.load_model(how["model"])
    items = lorakit.load_sql("train", version=how["version"])
    columns = {"prompt": [i.prompt for i in items], "completion": [i.completion for i in items]}
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = SFTConfig(
            output_dir=folder, max_steps=how["steps"], per_device_train_batch_size=how["batch_size"],
            learning_rate=how["lr"], seed=how["seed"],
            warmup_steps=0.1, lr_scheduler_type="linear", weight_decay=0.0, use_cpu=True, bf16=False,
            activation_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            peft_config=lora_config(how),
        )  # fmt: skip
        trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__))
        with accelerated(trainer.model, 50 * how["batch_size"]):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, tokenizer, losses


def run_prompt(how):
    """PEFT's prompt tuning in the plain loop: trained vectors before every prompt, started at words."""
    model, tokenizer = lorakit.load_model(how["model"])
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=how["virtual_tokens"], prompt_tuning_init="TEXT",
        tokenizer_name_or_path=model.name_or_path,
        prompt_tuning_init_text="Write one SQLite query that answers the question about the table.",
    )  # fmt: skip
    torch.manual_seed(how["seed"])
    with quiet():
        model = peft.get_peft_model(model, config)
    with accelerated(model, 70 * how["batch_size"]):
        losses = plain_loop(model, examples(tokenizer, how), **recipe(how))
    return model, tokenizer, losses


def scores(model, tokenizer, arm, lr, version):
    """How many of `ITEMS` questions about new tables are answered as expected to the letter, and find the right rows.

    Rows need generation, which takes longer than the training: it is done where arms are compared, not learning rates.
    """
    items, model = lorakit.load_sql("tables", version=version)[:ITEMS], model.eval()
    found = {"items": len(items)}
    if arm != "prompt tuning":
        found["exact"] = sum(lorakit.exact_match(model, encoded(tokenizer, items), show=False))
    if arm in ("TRL SFTTrainer", "prompt tuning") or (arm, lr) == ("LoRA", 3e-3):
        answers = lorakit.SQL.answers(model, tokenizer, items, max_new_tokens=32, show=False)
        found["right"] = sum(execution_accuracy(items, answers))
    return found


RUNS = {"TRL SFTTrainer": run_trl, "LoRA": run_lora, "full": run_full, "prompt tuning": run_prompt}


def run(**how):
    start = time.perf_counter()
    model, tokenizer, losses = RUNS[how["arm"]](how)
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, **scores(model, tokenizer, how["arm"], how["lr"], how["version"])} | {
        "losses": [round(loss, 7) for loss in losses],
        "train_seconds": round(seconds, 1),
    }


def main():
    sweep(run, GRID, FOLDER, command="python data/sft/record.py")


if __name__ == "__main__":
    main()
