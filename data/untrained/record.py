"""What a model answers to the SQL task's questions before any training: told to write SQL, and shown solved examples.

    python data/untrained/record.py      six records, about five minutes on two cores

Lesson 00 reads the records in answers. A second start makes only those that are missing.
"""

import hashlib
from functools import cache
from pathlib import Path

import lorakit
from lorakit import load_model, load_sql
from lorakit.experiments.sweep import sweep
from lorakit.tasks.sql.task import generate

FOLDER = Path(__file__).with_name("answers")
SYSTEM = (
    "<|im_start|>system\nWrite one SQLite query that answers the question. Answer with the query alone.<|im_end|>\n"
)
GRID = {"hint": ["told to write SQL", "shown three examples"], "split": ["tables", "ways", "stranger"]}
GRID |= {"model": ["smollm2"], "version": [2], "questions": [16], "tokens": [64]}


def prompts(how: dict) -> list[str]:
    """The prompts of a setting: a system turn, perhaps three solved questions of different shapes, the question."""
    train = generate("train", 280, version=how["version"])  # lesson 00's
    solved = list({item.shape: item for item in train}.values())[:3]
    shots = "".join(item.prompt + item.completion + "\n" for item in solved)
    hint = SYSTEM + (shots if how["hint"] == "shown three examples" else "")
    items = load_sql("stranger") if how["split"] == "stranger" else load_sql(how["split"], version=how["version"])
    return [hint + item.prompt for item in items[: how["questions"]]]


def key(prompt: str) -> str:
    """What stands for a prompt in a record."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def run(**how):
    model, tokenizer = loaded(how["model"])
    asked = prompts(how)
    answers = lorakit.greedy(model, tokenizer, asked, stop="<|im_end|>", max_new_tokens=how["tokens"], show=False)
    return {"prompts": [key(prompt) for prompt in asked], "answers": answers}


@cache
def loaded(model):
    return load_model(model)


def main():
    sweep(run, GRID, FOLDER, command="python data/untrained/record.py")


if __name__ == "__main__":
    main()
