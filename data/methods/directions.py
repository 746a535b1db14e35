"""How far training turns each weight matrix of SmolLM2, and how much it changes its length: full, LoRA, DoRA.

    python data/methods/directions.py      nine trainings, about ten minutes on two cores

Lesson 05 reads directions.json. LoRA and DoRA start as PEFT's of record.py do with that seed, and are lorakit's layers.
"""

import tempfile
from pathlib import Path

from record import BATCH, RECORD, RESULTS, SEEDS, STEPS, adapted, encoded

import lorakit
from lorakit._optional import quiet
from lorakit.experiments.recorded import read, record_runs
from lorakit.layers.dora import magnitude_direction
from lorakit.models.targets import find_targets

FULL_LR = 3e-4  # the best of four, as data/sft has it


def started(method, seed):
    """The plain model with lorakit's adapters as PEFT starts them; or all of it to be trained."""
    if method == "full":
        model, tokenizer = lorakit.load_model("smollm2")
        return model.requires_grad_(True), tokenizer
    theirs, tokenizer = adapted(method, seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs.save_pretrained(folder)
        model = theirs.unload()
        lorakit.load_adapter(model, folder)
    return model, tokenizer


def tuned(method):
    """The learning rate that record.py found, or the best of full fine-tuning."""
    runs = [run for run in read(RESULTS)["runs"] if run.get("method") == method and run["seed"] == SEEDS[1]]
    return FULL_LR if method == "full" else runs[0]["lr"]


def run(method, seed):
    """One training; of each linear layer the mean change of its rows' lengths and directions."""
    model, tokenizer = started(method, seed)
    settings = {"steps": STEPS, "batch_size": BATCH, "lr": tuned(method), "seed": seed}
    losses = lorakit.fit(model, encoded(tokenizer, lorakit.load_sql("train")), **settings, show=False).loss
    after, before = (model if method == "full" else lorakit.merge(model)), lorakit.load_model("smollm2")[0]
    pairs = {
        name: (before.get_submodule(name).weight, after.get_submodule(name).weight) for name in find_targets(before)
    }
    changes = {name: [float(f"{x:.4g}") for x in magnitude_direction(*pair)] for name, pair in pairs.items()}
    return {"lr": tuned(method), "loss": losses[-1], "changes": changes}


if __name__ == "__main__":
    record_runs(
        Path(__file__).with_name("directions.json"),
        [{"method": method, "seed": seed} for method in ("full", "LoRA", "DoRA") for seed in SEEDS],
        run,
        "python data/methods/directions.py",
        **RECORD,
    )
