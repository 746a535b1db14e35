"""SmolLM2, half trained on the SQL task, goes on: by preference, and by a reward for queries that find the right rows.

    python data/preference/record.py [part ...]      all runs, or those of parts of `GRIDS`

"dpo" prefers the right query to one that is nearly right; "rates" and "sizes" are reinforcement by the reward alone.
Lesson 09 reads the records. A second start makes only those that are missing; several may share the work.
"""

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit
from lorakit._random import seeded
from lorakit.experiments.sweep import sweep
from lorakit.layers.subspace import RandomSubspace
from lorakit.speed.accelerated import accelerated
from lorakit.tasks.sql.task import generate, near_misses
from lorakit.training.batch import IGNORE, Example, collate
from lorakit.training.evaluate import teacher_forced
from lorakit.training.loss import token_losses

FOLDER = Path(__file__).parent
SCORED = 64  # questions per split, before and after
SPLITS = ("validation", "tables")
WARM = {"n": 64, "batch_size": 8, "lr": 4e-3}  # the supervised start: LoRA of rank 16, merged
NEW_TOKENS = 24
DPO = {"rank": 16, "n": 128, "batch_size": 8, "steps": 16}
RL = {"steps": 30, "prompts": 4, "rollouts": 8}
GRIDS = {
    "rates": [RL | {"arm": "LoRA", "size": 16, "lr": [3e-4, 1e-3, 1e-4, 1e-6], "seed": seed} for seed in range(5)],
    "dpo": [
        DPO | arm | {"seed": seed}
        for seed in range(5)
        for arm in (
            {"arm": "DPO", "beta": 0.1, "lr": [3e-4, 1e-3, 3e-3, 1e-4, 1e-6]},
            {"arm": "SFT", "beta": 0.0, "lr": [1e-3, 3e-3, 3e-4]},  # on the right queries alone
            {"arm": "DPO", "beta": 1.0, "lr": [3e-4, 1e-3, 1e-4]},
        )
    ],
    "sizes": [
        RL | arm | {"seed": seed}
        for seed in range(3)
        for arm in (
            {"arm": "LoRA", "size": 1, "lr": [1e-3, 3e-3, 3e-4]},
            {"arm": "subspace", "size": [10, 1000], "lr": [1e-4, 3e-4, 3e-5]},  # how far a parameter moves in a step
        )
    ],
}
ALPHA = 32
Pair = tuple[Example, Example, float, float]  # the right one, the wrong one, the reference's log-probability of each


def start(seed: int) -> tuple[nn.Module, Any]:
    """The model after a short supervised training; the same for all runs of a seed."""
    model, tokenizer = lorakit.load_model("smollm2")
    items = generate("train", WARM["n"], seed, version=2)
    with seeded(seed):
        lorakit.inject(model, 16, ALPHA)
    steps = WARM["n"] // WARM["batch_size"]
    examples = lorakit.SQL.encode(tokenizer, items)
    lorakit.fit(model, examples, steps=steps, batch_size=WARM["batch_size"], lr=WARM["lr"], seed=seed, show=False)
    return lorakit.merge(model), tokenizer


def misses(items: Sequence[Any], seed: int) -> list[str]:
    """For each question a query that is nearly right, drawn from all of its near misses."""
    rng = random.Random(f"misses/{seed}")
    return [rng.choice(near_misses(item)) for item in items]


def pairs(model: nn.Module, tokenizer: Any, items: Sequence[Any], seed: int) -> list[Pair]:
    """Right and wrong answers, and what the reference, the model as it is now, thinks of both."""
    right = lorakit.SQL.encode(tokenizer, items)
    end = items[0].completion.removeprefix(items[0].answer)
    wrong = [
        lorakit.encode(tokenizer, item.prompt, text + end)
        for item, text in zip(items, misses(items, seed), strict=True)
    ]
    known = [[-nats for _, nats in teacher_forced(model, each, show=False)] for each in (right, wrong)]
    return list(zip(right, wrong, *known, strict=True))


def log_probabilities(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """log p of each completion: the sum over its tokens."""
    batch = collate(examples)
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
    return torch.stack([-part.sum() for part in token_losses(model, batch).split(counts)])


def dpo_loss(model: nn.Module, batch: list[Pair], beta: float) -> Tensor:
    """-log sigmoid(beta (gain of the right one - gain of the wrong one)), over the reference."""
    right, wrong, *known = zip(*batch, strict=True)
    now = log_probabilities(model, [*right, *wrong]).view(2, -1)
    gains = now - torch.tensor(known, dtype=now.dtype)
    return -F.logsigmoid(beta * (gains[0] - gains[1])).mean()


def scores(model: nn.Module, tokenizer: Any, seed: int) -> dict[str, float]:
    """Of each split: the share of questions that are answered rightly, nats per token of the right queries, and how
    often these are thought likelier than a wrong one, with the mean difference in nats."""
    found = {}
    for split in SPLITS:
        items = lorakit.load_sql(split, version=2)[:SCORED]
        held_out = pairs(model, tokenizer, items, seed)
        examples = [right for right, *_ in held_out]
        answers = lorakit.SQL.right(model, tokenizer, items, max_new_tokens=NEW_TOKENS, show=False)
        labelled = sum(label != IGNORE for example in examples for label in example.labels)
        found[f"{split}_right"] = sum(answers) / SCORED
        found[f"{split}_nats"] = round(-sum(a for _, _, a, _ in held_out) / labelled, 5)
        found[f"{split}_preferred"] = sum(a > b for _, _, a, b in held_out) / SCORED
        found[f"{split}_margin"] = round(sum(a - b for _, _, a, b in held_out) / SCORED, 4)
    return found


@contextmanager
@torch.no_grad()
def moved(trained: nn.Module) -> Iterator[None]:
    """For a time, the weights of a model in a subspace are where its coordinates say, so that it can generate."""
    if not isinstance(trained, RandomSubspace):
        yield
        return
    origin = {name: trained.model.get_parameter(name).clone() for name in trained.names}
    for name, value in trained.theta().items():
        trained.model.get_parameter(name).copy_(value)
    try:
        yield
    finally:
        for name, value in origin.items():
            trained.model.get_parameter(name).copy_(value)


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> list[Example]:
    """One answer to each prompt, drawn at temperature 1: what was said is labelled."""
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    eos = tokenizer.eos_token_id
    drawn = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=eos
    )[:, longest:]
    found = []
    for row, new in zip(ids, drawn.tolist(), strict=True):
        answer = new[: new.index(eos) + 1] if eos in new else new
        found.append(Example(row + answer, [IGNORE] * len(row) + answer))
    return found


def rewards(tokenizer: Any, items: Sequence[Any], rollouts: Sequence[Example]) -> list[float]:
    """1 for a query that ends and finds the right rows, else 0."""
    said = [[label for label in rollout.labels if label != IGNORE] for rollout in rollouts]
    texts = [tokenizer.decode(row[:-1]) if row[-1] == tokenizer.eos_token_id else "" for row in said]
    return [float(right) for right in lorakit.execution_accuracy(items, texts)]


def advantages(values: Sequence[float], group: int) -> Tensor:
    """How much better than its group each answer is, in the group's standard deviations; 0 where all are alike."""
    table = torch.tensor(values, dtype=torch.float32).view(-1, group)
    return ((table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)).flatten()


def policy_loss(model: nn.Module, rollouts: Sequence[Example], better: Tensor) -> Tensor:
    """The mean over all tokens of -A log p; its gradient is GRPO's where each answer is used once."""
    batch = collate(rollouts)
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1)
    return (better.repeat_interleave(counts) * token_losses(model, batch)).mean()


def prefer(
    arm: str, beta: float, lr: float, seed: int, rank: int, n: int, batch_size: int, steps: int
) -> dict[str, Any]:
    """A training on pairs, or on their right queries alone, and what is right and preferred before and after."""
    model, tokenizer = start(seed)
    before = scores(model, tokenizer, seed)
    taught = pairs(model, tokenizer, generate("train", n, 1000 + seed, version=2), seed)
    with seeded(seed):
        lorakit.inject(model, rank, ALPHA)
    recipe = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "show": False}
    if arm == "DPO":
        history = lorakit.fit(
            model, taught, loss_fn=lambda model, batch: dpo_loss(model, batch, beta), collate=list, **recipe
        )
    else:
        history = lorakit.fit(model, [right for right, *_ in taught], **recipe)
    return compared(before, scores(model, tokenizer, seed)) | {"losses": [round(loss, 6) for loss in history.loss]}


def compared(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The scores before and after a training, by names of their own."""
    return {
        f"{when}_{name}": value for when, own in (("before", before), ("after", after)) for name, value in own.items()
    }


def reinforce(arm: str, size: int, lr: float, seed: int, steps: int, prompts: int, rollouts: int) -> dict[str, Any]:
    """Reinforcement from the supervised start of a seed: the rewards along it, and what is right before and after."""
    model, tokenizer = start(seed)
    before = scores(model, tokenizer, seed)
    items = generate("train", steps * prompts, 1000 + seed, version=2)  # others than the start has seen
    total, trained = lorakit.count(model).total, model
    if arm == "subspace":
        trained, lr = RandomSubspace(model, size, seed), lr * (total / size) ** 0.5
    else:
        with seeded(seed):
            lorakit.inject(model, size, ALPHA)
    params = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    found: dict[str, list[float]] = {"reward": [], "alike": [], "tokens": []}
    with seeded(seed), accelerated(trained, 70 * prompts * rollouts):
        for step in range(steps):
            group = [item for item in items[step * prompts : (step + 1) * prompts] for _ in range(rollouts)]
            model.eval()
            with moved(trained):
                drawn = sample(model, tokenizer, [item.prompt for item in group])
            values = rewards(tokenizer, group, drawn)
            better = advantages(values, rollouts)
            if better.any():
                optimizer.zero_grad()
                policy_loss(trained, drawn, better).backward()
                nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
            found["reward"].append(sum(values) / len(values))
            found["alike"].append(sum(not each.any() for each in better.view(-1, rollouts)) / prompts)
            found["tokens"].append(sum(label != IGNORE for each in drawn for label in each.labels) / len(drawn))
    with moved(trained):
        after = scores(model, tokenizer, seed)
    rounded = {name: [round(float(value), 4) for value in values] for name, values in found.items()}
    return compared(before, after) | rounded | {"trained": sum(p.numel() for p in params)}


def main(parts: Sequence[str] = tuple(GRIDS)) -> None:
    for part in parts:
        function, folder = (prefer, "dpo") if part == "dpo" else (reinforce, "rl")
        sweep(function, GRIDS[part], FOLDER / folder, command=f"python data/preference/record.py {part}")


if __name__ == "__main__":
    main(sys.argv[1:] or tuple(GRIDS))
