"""Whatever a public function is given, it says in a sentence what it expected."""

import json
import math
from functools import partial

import jaxtyping
import pytest
import torch
from helpers.architectures import adapted, build
from helpers.texts import TOKENIZER, examples

import lorakit
from lorakit import LoRAConfig, Recipe, Spec, fit, fit_many, inject
from lorakit.cost.budget import budget, table
from lorakit.experiments import stats, verdicts
from lorakit.experiments.plan import load_plan, read_yaml
from lorakit.experiments.records import frame
from lorakit.experiments.sweep import sweep
from lorakit.merging import arithmetic
from lorakit.merging.export import export_merged
from lorakit.merging.gguf import write_gguf
from lorakit.merging.updates import Update, attach, read_updates
from lorakit.models.load import load_model
from lorakit.tasks import extraction, facts
from lorakit.tasks.sql.sandbox import Database, run_query
from lorakit.tasks.sql.task import generate, near_misses, populations, same_rows
from lorakit.tasks.task import own_task
from lorakit.training import evaluate
from lorakit.training.batch import collate, pack

HUGE = 10**400  # which no float holds
HALF = json.loads('"\\ud800"')  # half of a character, as JSON may have it
NO_PATHS = (None, 3, "", "a\0b", b"x", ["x"])
FOLDERS = {  # what takes a path first of all
    "save_adapter": lambda path: lorakit.save_adapter(adapted("llama"), path),
    "load_adapter": lambda path: lorakit.load_adapter(build("llama"), path),
    "inspect_adapter": lorakit.inspect_adapter,
    "read_updates": read_updates,
    "load_model": load_model,
    "export_merged": lambda path: export_merged("base", "adapter", path),
    "write_gguf": lambda path: write_gguf(path, "out.gguf"),
    "convert_adapter": lambda path: lorakit.convert_adapter("adapter", "base", path),
    "read_rows": lorakit.read_rows,
    "budget": budget,
    "sweep": lambda path: sweep(print, {"x": [1]}, path),
    "frame": frame,
    "load_plan": load_plan,
    "own_task": own_task,
}
UPDATES = {"q_proj": Update(torch.ones(4, 2), torch.ones(2, 4))}
CALLS = {
    "a schedule that is no name": lambda: Recipe(4, schedule=["linear"]),
    "endless steps": lambda: Recipe(HUGE),
    "an endless clip": lambda: Recipe(4, clip=HUGE),
    "an endless weight decay": lambda: Recipe(4, weight_decay=HUGE),
    "an endless rate": lambda: fit(adapted("llama"), examples(2), steps=1, lr=HUGE, show=False),
    "no examples": lambda: fit(adapted("llama"), None, steps=1, show=False),
    "examples that end": lambda: fit(adapted("llama"), iter(examples(2)), steps=1, show=False),
    "a loss that is no function": lambda: fit(adapted("llama"), examples(2), steps=1, loss_fn=3, show=False),
    "an optimizer of nothing": lambda: fit(
        adapted("llama"), examples(2), steps=1, optimizer=lambda groups: None, show=False
    ),
    "many with nothing": lambda: fit_many(build("llama"), None, [Spec(LoRAConfig(2, 4), 1e-3)], steps=1, show=False),
    "many of nothing": lambda: fit_many(build("llama"), examples(2), 3, steps=1, show=False),
    "answers of no model": lambda: lorakit.exact_match(None, examples(2), show=False),
    "prompts that end": lambda: lorakit.greedy(build("llama"), TOKENIZER, iter(["a"]), show=False),
    "half a character": lambda: lorakit.encode(TOKENIZER, HALF, "b"),
    "a length of text": lambda: lorakit.encode(TOKENIZER, "a", "b", max_length="8"),
    "data of nothing": lambda: lorakit.audit_data(3, TOKENIZER),
    "rows of nothing": lambda: lorakit.audit_data([3], TOKENIZER),
    "an audit without a tokenizer": lambda: lorakit.audit_data([], None),
    "a config of nothing": lambda: LoRAConfig.from_peft(3),
    "a layer of another kind": lambda: inject(build("llama"), 2, 4, layer=torch.nn.Bilinear),
    "a layer with wrong settings": lambda: inject(build("llama"), 2, 4, layer=lorakit.PiSSALinear, start=len),
    "no model to keep": lambda: lorakit.prevent_repacking(3),
    "an attention that nobody has": lambda: budget("llama-2-7b", tokens=8, attention="quick"),
    "an attention that is no name": lambda: budget("llama-2-7b", tokens=8, attention=3),
    "targets of nothing": lambda: budget("llama-2-7b", tokens=8, targets=3),
    "a method that is no name": lambda: budget("llama-2-7b", ["lora"]),
    "a split that is no name": lambda: lorakit.load_sql(3),
    "a split that is a list": lambda: generate(["train"]),
    "half a question": lambda: generate("train", 1.5),
    "half a frame": lambda: generate("train", 3, version=2, frames=1.5),
    "a table that is a list": lambda: populations(["orders"]),
    "misses of nothing": lambda: near_misses("SELECT 1"),
    "items of nothing": lambda: lorakit.execution_accuracy(None, []),
    "answers that are no texts": lambda: lorakit.execution_accuracy(generate("iid", 1), [3]),
    "databases without names": lambda: lorakit.execution_accuracy(generate("iid", 1), ["x"], [3]),
    "facts of text": lambda: facts.facts("3"),
    "no facts": lambda: facts.recall(build("llama"), TOKENIZER, []),
    "half a message": lambda: extraction.messages("train", 1.5),
    "updates without names": lambda: attach(build("llama"), [3]),
    "a dtype that is no name": lambda: export_merged("base", "adapter", "out", dtype=["float32"]),
    "nothing to make together": lambda: sweep(print, {"x": [1]}, "records", together=3),
    "runs of text at once": lambda: sweep(print, {"x": [1]}, "records", at_once="2"),
    "log_probabilities of a tensor": lambda: evaluate.log_probabilities(build("llama"), torch.zeros(0)),
    "exact_match None among examples": lambda: lorakit.exact_match(build("llama"), [None], show=False),
    "fit a number as a tensor": lambda: fit(adapted("llama"), torch.tensor(1.0), steps=1, show=False),
    "fit_many a tensor": lambda: fit_many(
        build("llama"), torch.zeros(2, 2), [Spec(LoRAConfig(2, 4), 1e-3)], steps=1, show=False
    ),
    "fit steps, a tensor of two lines": lambda: fit(adapted("llama"), examples(2), steps=torch.zeros(2, 2), show=False),
    "collate none": lambda: collate([]),
    "pack none": lambda: pack([]),
    "KL of NaN": lambda: evaluate.kl_divergence(torch.full((2, 3), math.nan), torch.zeros(2, 3)),
    "KL of nothing": lambda: evaluate.kl_divergence(torch.zeros(0, 3), torch.zeros(0, 3)),
    "budgets, none": lambda: table([]),
    "a query of no rows": lambda: run_query(Database(()), "SELECT 1", max_rows=-1),
    "collate numbers": lambda: collate([1]),
    "pack a text": lambda: pack("abc"),
    "KL of other tokens": lambda: evaluate.kl_divergence(torch.zeros(2, 3), torch.zeros(3, 3)),
    "KL of None": lambda: evaluate.kl_divergence(None, torch.zeros(2, 3)),
    "budgets, a number": lambda: table(3),
    "YAML, a number": lambda: read_yaml(3),
    "a query to no database": lambda: run_query(3, "SELECT 1"),
    "a query of half a step": lambda: run_query(Database(()), "SELECT 1", max_steps=0.5),
    "rows that are none": lambda: same_rows(None, [], ordered=False),
    "rows of numbers": lambda: same_rows([1], [1], ordered=True),
    **{f"a folder {path!r} for {name}": partial(call, path) for name, call in FOLDERS.items() for path in NO_PATHS},
    "sums of nothing": lambda: arithmetic.linear(None, [1.0]),
    "sums of numbers": lambda: arithmetic.linear([3], [1.0]),
    "weights that are words": lambda: arithmetic.linear([UPDATES], ["x"]),
    "a density that is a word": lambda: arithmetic.ties([UPDATES], [1.0], "x", 2),
    "half a rank": lambda: arithmetic.compress(UPDATES, 1.5),
    "a seed of nothing": lambda: arithmetic.dare([UPDATES], [1.0], 0.5, 2, seed=None),
    "a confidence of two": lambda: stats.mean_interval([1.0, 2.0], confidence=2),
    "a mean of words": lambda: stats.mean_interval(["a", "b"]),
    "a difference of numbers": lambda: stats.difference(1.0, 2.0),
    "arms without seeds": lambda: verdicts.compare([0.1, 0.2], [0.2, 0.3]),
    "arms without names": lambda: verdicts.compare_all([{0: 0.1, 1: 0.2}], {0: 0.1, 1: 0.3}),
    "a share of half a question": lambda: stats.share_interval([0.1, 0.2], 0.5),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_is_a_sentence(case, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own check of types
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"\Aexpected [^\n]*\Z"):
        CALLS[case]()
    assert not list(tmp_path.iterdir())
