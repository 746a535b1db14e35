"""The runs of an ablation: settings in, what the model has learnt out. For `sweep`, and for plans:

function: lorakit.experiments.ablation:runs
grid: {task: facts, rank: [1, 4, 16], alpha: 2r, lr: [3e-3, 1e-2], seed: [0, 1, 2]}
together: [rank, alpha, lr, seed]
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from lorakit._random import seeded
from lorakit._suggest import check_name
from lorakit.layers.config import LoRAConfig
from lorakit.models.inject import count, inject
from lorakit.models.load import load_model
from lorakit.models.merge import remove
from lorakit.tasks.facts import FACTS, known_facts, recall
from lorakit.tasks.sql.task import sql_task
from lorakit.tasks.task import Task, own_task
from lorakit.training.batch import IGNORE, Example
from lorakit.training.evaluate import teacher_forced
from lorakit.training.fit import fit
from lorakit.training.fit_many import Spec, fit_many
from lorakit.training.history import History
from lorakit.training.optim import OPTIMIZERS

# What differs from layer to layer, and what the settings of one call share
BY_LAYER = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
FOR_FIT = ("steps", "batch_size", "weight_decay", "schedule")
COMMON = ("task", "n", "level", "version", "model", *FOR_FIT, "test", "tested", "answers")


@dataclass(frozen=True)
class Setting:
    """What a run is; any field may be a parameter of a grid.

    Args:
        task: "facts" to memorise, "sql", or a folder with `train.jsonl` and `test.jsonl`, one object with `prompt` and
            `completion` a line.
        n: training examples: the first n of the task's; 0 for as many as usual.
        level: of the SQL task, 1 to 4.
        version: of the SQL task: its first edition or its second.
        frames, tables: of the second, how many ways of asking a shape and how many tables training shows; 0 for all.
        draw: of the second, the seed of the questions that training shows, and of these frames and tables; None for
            the run's own.
        test: of the SQL task, the split to test on, or several in a list (in a grid, a list in a list). Each is the
            same whatever training shows; with `_as_taught` behind its name it is asked in training's ways, and about
            training's tables if it has none of its own.
        tested: questions of each such split; the stranger's are always taken all.
        answers: also have the model answer what it does not get exactly, in up to four tokens more than the longest
            completion has, and score that as the task does.
        model: name or folder, as for `load_model`.
        rank: of the adapters; 0 for full fine-tuning.
        alpha: a number, or a multiple of the rank such as "2r".
        lr, steps, batch_size, loraplus_ratio: as for `fit`.
        seed: of the facts, the start of A, the data's order and dropout.
        targets, scale_rule, dropout: as for `inject`; targets may be a list in a list of a grid.
        weight_decay: as for `fit`, with adamw.
        schedule: as for `fit`.
        optimizer: one of `OPTIMIZERS`.
        rank_pattern, alpha_pattern, exclude_modules, layers_to_transform, layers_pattern: as for a `LoRAConfig`.
    """

    task: str = "facts"
    n: int = 0
    level: int = 1
    version: int = 1
    frames: int = 0
    tables: int = 0
    draw: int | None = None
    test: str | Sequence[str] = "tables"
    tested: int = 208
    answers: bool = False
    model: str = "tiny"
    rank: int = 8
    alpha: float | str = "2r"
    lr: float = 1e-2
    seed: int = 0
    steps: int = 200
    batch_size: int = 8
    targets: str | Sequence[str] = "all-linear"
    scale_rule: str = "lora"
    dropout: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "linear"
    optimizer: str = "adamw"
    loraplus_ratio: float = 1.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] = ()
    layers_pattern: str | Sequence[str] = ()

    def __post_init__(self):
        check_name("an optimizer", self.optimizer, OPTIMIZERS)
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"expected weight_decay with adamw only, got it with {self.optimizer!r}, which sets its own"
            )
        if isinstance(self.alpha, str) and not re.fullmatch(r"\d*\.?\d*r", self.alpha):
            raise ValueError(f"expected alpha as a number or a multiple of the rank such as '2r', got {self.alpha!r}")

    @property
    def scale_alpha(self) -> float:
        """alpha as a number."""
        return float(self.alpha[:-1] or 1) * self.rank if isinstance(self.alpha, str) else self.alpha

    @property
    def config(self) -> LoRAConfig | None:
        """The adapter; None for full fine-tuning."""
        if not self.rank:
            return None
        words = {name: getattr(self, name) for name in BY_LAYER}
        return LoRAConfig(self.rank, self.scale_alpha, self.dropout, self.scale_rule, self.targets, **words)

    @property
    def spec(self) -> Spec | None:
        """The run as `fit_many` takes it; None if it cannot."""
        config, plain = self.config, not self.dropout and self.optimizer == "adamw" and self.loraplus_ratio == 1
        return Spec(config, self.lr, self.seed) if config and plain else None


def runs(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains and tests once for every setting, several adapters at once where `fit_many` can.

    Args:
        settings: fields of `Setting`; those together in one call have `COMMON` in common.

    Returns:
        for each `correct`, the share of test completions that the model gives exactly, in [0, 1]; `loss` on them, in
        nats a token; with `answers` also `right`, the share of answers that are right as the task sees it (queries that
        find the right rows); all three with `_SPLIT` behind the name if `test` is a list; `train_loss`, of the last
        tenth of the steps; `tokens` seen in training; `trainable` parameters; for facts `known`, the share of those
        that the base knew and still gives. The test of facts is on the facts that were taught.

    Raises:
        TypeError, ValueError: a setting is unknown or impossible.
        FloatingPointError: a run diverged.
    """
    chosen = [Setting(**setting) for setting in settings]
    apart = [name for name in COMMON if any(getattr(each, name) != getattr(chosen[0], name) for each in chosen)]
    if apart:
        raise ValueError(f"expected settings that have {', '.join(COMMON)} in common, got other {', '.join(apart)}")
    model, tokenizer = load_model(chosen[0].model)
    data = [items(each) for each in chosen]
    taught = [task.encode(tokenizer, own) for task, own, _ in data]
    shared: dict[str, Any] = {name: getattr(chosen[0], name) for name in FOR_FIT}
    shared["show"] = False
    found: dict[int, dict[str, Any]] = {}
    specs = {at: spec for at, each in enumerate(chosen) if (spec := each.spec)}
    if len(specs) > 1:
        fits = fit_many(model, [taught[at] for at in specs], list(specs.values()), **shared)
        for at, fitted in zip(specs, fits, strict=True):
            if fitted.error:
                raise FloatingPointError(fitted.error)
            trainable = count(fitted.attach(model)).trainable
            scores = _scores(model, tokenizer, data[at][0], data[at][2], chosen[at])
            found[at] = scores | _summary(fitted.history, trainable)
            remove(model)
    for at, (setting, own, (task, _, tests)) in enumerate(zip(chosen, taught, data, strict=True)):
        if at not in found:
            found[at] = _one(setting, own, task, tests, shared)
    return [found[at] for at in range(len(chosen))]


def run(**setting: Any) -> dict[str, Any]:
    """One run of `runs`, for grids whose runs are not made together."""
    return runs([setting])[0]


def beside(function: Callable[..., Any], settings: Sequence[dict[str, Any]], folder: Path) -> Callable[..., Any]:
    """`run` or `runs` for a plan in a folder: tasks that are folders are looked for beside it, wherever it is run.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
    """
    tasks = {setting["task"] for setting in settings if _is_folder(setting)}
    for path in (Path(folder, task, f"{part}.jsonl") for task in sorted(tasks) for part in ("train", "test")):
        if not path.is_file():
            raise FileNotFoundError(
                f"expected a task of facts, sql or a folder with train.jsonl and test.jsonl, got no file {path}"
            )
    return update_wrapper(partial(_from_folder, function, Path(folder).resolve()), function) if tasks else function


def _is_folder(setting: dict[str, Any]) -> bool:
    task = setting.get("task", "facts")
    return isinstance(task, str) and task not in ("facts", "sql")


def _from_folder(function: Callable[..., Any], folder: Path, settings: Any = None, /, **setting: Any) -> Any:
    def placed(each: dict[str, Any]) -> dict[str, Any]:
        return each | ({"task": str(folder / each["task"])} if _is_folder(each) else {})

    return function(**placed(setting)) if settings is None else function([placed(each) for each in settings])


def items(setting: Setting) -> tuple[Task, list[Any], dict[str, list[Any]]]:
    """The task of a run, the items that it is taught, and those that it is tested on: what stands behind the names of
    the results -> items.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: there are fewer than n items, no such split, or a line is not an item.
    """
    n = setting.n or None
    if setting.task == "facts":
        taught = FACTS.items("new", n, setting.seed)
        return FACTS, taught, {"": taught}
    if setting.task != "sql":
        task = own_task(setting.task)
        train, tests = task.items("train"), {"": task.items("test")}
    else:
        variety = {"frames": setting.frames or None, "tables": setting.tables or None}
        task = sql_task(setting.level, version=setting.version)
        shown = sql_task(setting.level, version=setting.version, **variety)
        drawn = setting.seed if setting.draw is None else setting.draw
        train = shown.items("train", n, drawn) if setting.version > 1 else task.items("train")
        named = {"": setting.test} if isinstance(setting.test, str) else {f"_{split}": split for split in setting.test}
        tests = {}
        for name, split in named.items():
            whole, behind = split.removesuffix("_as_taught"), split.endswith("_as_taught")
            of, seed = (shown, drawn) if behind else (task, 0)
            tests[name] = of.items(whole, None if whole == "stranger" else setting.tested, seed)
    if not setting.n <= len(train):
        raise ValueError(f"expected n up to {len(train)}, the examples of {setting.task!r}, got {setting.n}")
    return task, train[:n], tests


def _one(
    setting: Setting, taught: list[Example], task: Task, tests: dict[str, list[Any]], shared: dict[str, Any]
) -> dict[str, Any]:
    model, tokenizer = load_model(setting.model)
    with seeded(setting.seed):
        if setting.config:
            inject(model, setting.config)
        else:
            model.requires_grad_(True)
    history = fit(
        model,
        taught,
        lr=setting.lr,
        seed=setting.seed,
        loraplus_ratio=setting.loraplus_ratio,
        optimizer=OPTIMIZERS[setting.optimizer],
        **shared,
    )
    return _scores(model, tokenizer, task, tests, setting) | _summary(history, count(model).trainable)


def _summary(history: History, trainable: int) -> dict[str, Any]:
    last = history.loss[-max(1, len(history.loss) // 10) :]
    return {"train_loss": fmean(last), "tokens": sum(history.tokens), "trainable": trainable}


def _scores(
    model: nn.Module, tokenizer: Any, task: Task, tests: dict[str, list[Any]], setting: Setting
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, asked in tests.items():
        examples = task.encode(tokenizer, asked)
        scores = teacher_forced(model, examples, batch_size=256 if task is FACTS else 32, show=False)
        lengths = [sum(label != IGNORE for label in example.labels[1:]) for example in examples]
        found["correct" + name] = fmean(exact for exact, _ in scores)
        found["loss" + name] = sum(nats for _, nats in scores) / sum(lengths)
        if setting.answers:
            exact, most = [each for each, _ in scores], max(lengths) + 4
            right = task.right(model, tokenizer, asked, exact, max_new_tokens=most, show=False)
            found["right" + name] = fmean(right)
    return found | ({"known": recall(model, tokenizer, known_facts())} if task is FACTS else {})
