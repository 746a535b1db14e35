"""Trainings killed at random moments, and one that was not: run by test_checkpoint.py in a process of its own.

The process forks before torch has threads; each child trains until it kills itself, as a full queue or a lost machine
would. Prints a line for each thing that is not the same in the end.
"""

import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorakit.training import checkpoint
from lorakit.training.batch import IGNORE, Example
from lorakit.training.fit import fit

STEPS, EVERY = 14, 3
OPTIMIZERS = {"adamw": None, "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9)}


class Model(nn.Module):
    """A few numbers, dropout, and running means."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout, self.head = nn.Embedding(20, 8), nn.Dropout(0.3), nn.Linear(8, 20)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input_ids, attention_mask):
        hidden = self.dropout(self.embedding(input_ids)).cumsum(1)
        return SimpleNamespace(logits=self.head(self.norm(hidden.mT).mT))


def texts(seed, n=11):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 20, (3 + i % 4,), generator=draw).tolist() for i in range(n)]
    return [Example(row, [IGNORE, IGNORE, *row[2:]]) for row in ids]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def train(name, folder, kill=None):
    """To the end, or until a step, where it is killed: behind it, in it, or while it is written."""
    step, where = kill or (None, "")
    model = Model()
    after_step = lambda done: done.number == step and where == "behind" and die()  # noqa: E731
    if where == "in":
        at = iter(range(step))  # the optimiser's steps of this process
        register_optimizer_step_pre_hook(lambda *_: die() if next(at, None) is None else None)
    if where == "writing":
        save = checkpoint._write
        checkpoint._write = lambda state, path: (save(state, path), os.truncate(path, 1000), die())
    settings = {"steps": STEPS, "batch_size": 4, "lr": 1e-2, "optimizer": OPTIMIZERS[name], "after_step": after_step}
    settings |= {"validation": texts(1), "validate_every": 2, "patience": 3}
    settings |= {"checkpoint": folder, "checkpoint_every": EVERY} if folder else {}
    history = fit(model, texts(0), show=False, **settings)
    return {"weights": model.state_dict(), **{name: getattr(history, name) for name in KEPT}}


KEPT = ("loss", "lr", "tokens", "validation", "best")


def in_a_child(work):
    """Does it in another process; True if that was killed."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status)
        return os.WIFSIGNALED(status)
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(name):
    torch.set_num_threads(1)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        in_a_child(lambda: torch.save(train(name, None), place / "whole"))
        kills = [
            (2, "behind"),
            (5, "in"),
            (0, "writing"),
            (draw.randrange(4, STEPS), "behind"),
            (draw.randrange(4), "in"),
        ]
        died = [in_a_child(lambda kill=kill: train(name, place / "files", kill)) for kill in kills]
        for result in ("resumed", "again"):
            in_a_child(lambda result=result: torch.save(train(name, place / "files"), place / result))
        whole = torch.load(place / "whole")
        print("killed", sum(died))
        for result in ("resumed", "again"):
            found = torch.load(place / result)
            weights = found.pop("weights")
            for key, value in whole["weights"].items():
                if not torch.equal(weights[key], value):
                    print(result, "has another", key)
            for key in found:
                if found[key] != whole[key]:
                    print(result, "has another", key, found[key], whole[key])


if __name__ == "__main__":
    main(sys.argv[1])
