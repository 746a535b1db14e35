"""The runs of the ablations: together as one by one, from settings that are checked, on the reader's own data."""

import json
import math

import pytest
import torch
from helpers.tiny_llama import save_tiny_llama

from lorakit.experiments import ablation
from lorakit.experiments.plan import load_plan
from lorakit.experiments.records import expand
from lorakit.experiments.sweep import sweep
from lorakit.models.inject import count, inject
from lorakit.models.load import load_model
from lorakit.tasks.facts import encoded, facts, known_facts, recall
from lorakit.tasks.sql.task import sql_task
from lorakit.training.batch import IGNORE, Example, collate
from lorakit.training.evaluate import exact_match, share_and_nats, teacher_forced
from lorakit.training.fit import fit
from lorakit.training.loss import completion_loss

TASK = sql_task(2)
SHORT = {"task": "facts", "n": 16, "steps": 40, "batch_size": 8, "rank": 4, "alpha": "2r", "lr": 5e-3, "seed": 1}


@pytest.mark.long
def test_together_is_as_one_by_one():
    settings = expand([SHORT | {"rank": [2, 4], "seed": [0, 1]}, SHORT | {"targets": [["q_proj", "v_proj"]]}])
    together, single = ablation.runs(settings), [ablation.run(**setting) for setting in settings]
    for one, other in zip(together, single, strict=True):
        assert one["trainable"] == other["trainable"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert one["correct"] == pytest.approx(other["correct"], abs=1 / 16)
    assert len({result["trainable"] for result in together}) == 3


def test_what_cannot_be_made_together_is_made_beside_the_rest(monkeypatch):
    calls = []
    many = ablation.fit_many
    monkeypatch.setattr(ablation, "fit_many", lambda *a, **k: calls.append(len(a[2])) or many(*a, **k))
    settings = [SHORT | more for more in ({"rank": 0, "lr": 1e-3}, {}, {"dropout": 0.1}, {"rank": 2})]
    found = ablation.runs(settings)
    assert calls == [2]
    assert [each["trainable"] for each in found] == [918144, 40960, 40960, 20480]
    for place in (0, 2):
        assert found[place] == ablation.run(**settings[place])


def test_a_run_is_fit_and_its_scores_are_those_of_the_model():
    model, tokenizer = load_model("tiny")
    torch.manual_seed(1)
    inject(model, 4, 8)
    texts = encoded(tokenizer, facts(16, 1))
    history = fit(model, texts, steps=40, batch_size=8, lr=5e-3, seed=1, show=False)
    found = ablation.run(**SHORT)
    assert found["correct"] == recall(model, tokenizer, facts(16, 1))
    assert found["loss"] == pytest.approx(completion_loss(model, collate(texts)).item(), rel=1e-4)
    assert found["train_loss"] == pytest.approx(sum(history.loss[-4:]) / 4)
    assert found["trainable"] == count(model).trainable
    assert 0 <= found["known"] < 1


def test_settings_that_one_loop_cannot_share_are_refused():
    for more in ({"steps": 41}, {"weight_decay": 0.1}, {"schedule": "cosine"}, {"n": 8}, {"task": "sql"}):
        with pytest.raises(ValueError, match=f"in common, got other {next(iter(more))}"):
            ablation.runs([SHORT, SHORT | more])


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    ablation.run(**SHORT)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        {"rank": 0, "lr": 1e-3},
        {"dropout": 0.2},
        {"weight_decay": 10.0},
        {"optimizer": "sgd", "lr": 1.0},
        {"optimizer": "sgd-momentum", "lr": 0.1},
        {"optimizer": "adamw-8bit-all"},
        {"schedule": "cosine"},
        {"loraplus_ratio": 4.0},
        {"scale_rule": "rslora"},
        {"targets": "q_proj"},
    ],
    ids=lambda more: next(iter(more.values())),
)
def test_every_setting_makes_a_difference_and_learns(more):
    untaught, usual, other = (ablation.run(**SHORT | each) for each in ({"lr": 1e-12}, {}, more))
    assert usual["train_loss"] != other["train_loss"]
    assert other["loss"] < 0.9 * untaught["loss"]


@pytest.mark.long
def test_bitsandbytes_leaves_small_matrices_in_32_bit():
    """The default of 4,096 numbers is more than any matrix of a small adapter has: nothing is stored in 8 bit."""
    usual, default, forced = (ablation.run(**SHORT | {"optimizer": name}) for name in list(ablation.OPTIMIZERS)[:3])
    assert default["loss"] == pytest.approx(usual["loss"], rel=1e-3)
    assert abs(forced["loss"] - usual["loss"]) > abs(default["loss"] - usual["loss"])


def test_alpha_may_be_a_multiple_of_the_rank():
    assert ablation.Setting(rank=8, alpha="2r").scale_alpha == 16
    assert ablation.Setting(rank=8, alpha="r").scale_alpha == 8
    assert ablation.Setting(rank=8, alpha="0.5r").scale_alpha == 4
    assert ablation.Setting(rank=8, alpha=3).scale_alpha == 3


@pytest.mark.parametrize(
    ("more", "error", "word"),
    [
        ({"alpha": "two"}, ValueError, "alpha as a number or a multiple"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, ValueError, "weight_decay with adamw only"),
        ({"optimizer": "adam"}, ValueError, "got 'adam'; near: adamw, adamw-8bit"),
        ({"schedule": "cosin"}, ValueError, "got 'cosin'; near: cosine"),
        ({"lora_rank": 4}, TypeError, "lora_rank"),
        ({"task": "sql", "n": 401}, ValueError, "n up to 400"),
        ({"task": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"rank": -1}, ValueError, "rank"),
    ],
)
def test_wrong_settings_are_refused(more, error, word):
    with pytest.raises(error, match=word):
        ablation.run(**SHORT | more)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.long
def test_a_folder_of_prompts_and_completions_is_a_task(tmp_path):
    rows = [{"prompt": fact.prompt, "completion": fact.completion} for fact in facts(16, 1)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", rows[:8])
    found = ablation.run(**SHORT | {"task": str(tmp_path), "n": 0, "steps": 80})
    assert found["correct"] >= ablation.run(**SHORT)["correct"] - 0.2
    assert found["correct"] * 8 == round(found["correct"] * 8)
    assert "known" not in found
    (tmp_path / "test.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"prompt and completion in .*test.jsonl, line 1"):
        ablation.run(**SHORT | {"task": str(tmp_path), "n": 0})


def test_the_sql_task_has_its_level():
    task, train, tests = ablation.items(ablation.Setting(task="sql", level=2, n=20))
    assert train == TASK.items("train")[:20]
    assert tests == {"": TASK.items("tables", 208)}
    assert task.splits == TASK.splits


def test_the_sql_task_has_its_edition_its_variety_and_several_tests():
    asked = {"task": "sql", "version": 2, "frames": 2, "tables": 3, "n": 48, "tested": 16}
    task, train, tests = ablation.items(ablation.Setting(**asked, test=["ways", "stranger"]))
    assert train == sql_task(version=2, frames=2, tables=3).items("train", 48)
    assert tests == {"_ways": task.items("ways", 16), "_stranger": task.items("stranger")}
    _, other, _ = ablation.items(ablation.Setting(**asked, draw=1))
    assert len(other) == 48
    assert other != train
    for wrong in ("way", "as_taught", "way_as_taught"):
        with pytest.raises(ValueError, match="split"):
            ablation.items(ablation.Setting(**asked, test=wrong))


def test_what_training_shows_changes_only_tests_as_taught():
    asked = {"task": "sql", "version": 2, "n": 48, "tested": 40, "seed": 3, "test": ["tables", "tables_as_taught"]}
    _, train, narrow = ablation.items(ablation.Setting(**asked, frames=1))
    _, _, wide = ablation.items(ablation.Setting(**asked))
    assert narrow["_tables"] == wide["_tables"]
    assert {item.template for item in narrow["_tables_as_taught"]} <= {item.template for item in train}
    assert not {item.table for item in narrow["_tables_as_taught"]} & {item.table for item in train}
    assert len({item.template for item in wide["_tables_as_taught"]}) > 20


def test_several_tests_are_scored_apart(tmp_path):
    how = {"task": "sql", "version": 2, "n": 8, "steps": 1, "tested": 4, "batch_size": 8, "rank": 1}
    how["model"] = str(save_tiny_llama(tmp_path))
    found, one = ablation.run(**how, test=["iid", "tables"], answers=True), ablation.run(**how)
    assert found["loss_iid"] != found["loss_tables"] == one["loss"]
    assert one["correct"] == found["correct_tables"] <= found["right_tables"] <= 1
    task, taught, _ = ablation.items(ablation.Setting(**how))
    texts = task.encode(load_model(how["model"])[1], taught)
    assert one["tokens"] == found["tokens"] == sum(len(text.input_ids) for text in texts)
    assert "right" not in one


@pytest.mark.long
def test_answers_are_scored_as_the_task_does(monkeypatch):
    monkeypatch.setattr(ablation.Task, "right", lambda self, model, tokenizer, items, exact, **_: [True] * len(items))
    found = ablation.run(**SHORT | {"answers": True, "steps": 5})
    assert found["correct"] < 1 == found["right"]


def test_a_task_in_words_that_the_base_does_not_know_is_refused(tmp_path):
    """Each would be three padding tokens, and "correct 1.0" for every rank."""
    write_lines(tmp_path / "train.jsonl", [{"prompt": "what colour ?", "completion": " deep blue"}] * 8)
    write_lines(tmp_path / "test.jsonl", [{"prompt": "room of ada hopper ?", "completion": " 1 2 3 4"}])
    with pytest.raises(ValueError, match="words that the tokenizer knows, got 'what', 'colour', 'deep', 'blue'"):
        ablation.run(**SHORT | {"task": str(tmp_path), "n": 0})


def test_teacher_forcing_gives_the_loss_of_each_example():
    model, tokenizer = load_model("tiny")
    texts = encoded(tokenizer, facts(7, 3))
    found = teacher_forced(model, texts, batch_size=3, show=False)
    assert [exact for exact, _ in found] == exact_match(model, texts, show=False)
    for (_, nats), text in zip(found, texts, strict=True):
        assert nats == pytest.approx(5 * completion_loss(model, collate([text])).item(), rel=1e-4)


def test_a_sweep_of_runs_and_a_plan(tmp_path):
    grid = SHORT | {"steps": 5, "seed": [0, 1]}
    frame = sweep(ablation.runs, grid, tmp_path / "a", together=["seed"], show=False)
    assert list(frame.error) == ["", ""]
    assert frame.correct.between(0, 1).all()
    (tmp_path / "plan.yaml").write_text(f"function: lorakit.experiments.ablation:run\ngrid: {json.dumps(grid)}\n")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.function is ablation.run
    assert len(plan.settings) == 2


def test_a_plan_has_the_words_of_a_config(tmp_path):
    words = {"rank_pattern": {"q_proj": 1}, "exclude_modules": ["down_proj"], "layers_to_transform": [0]}
    grid = SHORT | {"steps": 2, "seed": [0, 1], **{name: [value] for name, value in words.items()}}
    frame = sweep(ablation.runs, grid, tmp_path, together=["seed"], show=False)
    model = load_model("tiny")[0]
    setting = ablation.Setting(**SHORT)
    assert list(frame.error) == ["", ""]
    assert set(frame.trainable) == {count(inject(model, setting.rank, 1, **words)).trainable}


def test_one_that_diverges_does_not_take_the_others_with_it(tmp_path):
    grid = SHORT | {"lr": [1e-3, 1e30], "steps": 8}
    frame = sweep(ablation.runs, grid, tmp_path, together=["lr"], show=False).set_index("lr")
    assert frame.error[1e-3] == ""
    assert "finite" in frame.error[1e30]
    assert math.isfinite(frame.loss[1e-3])


def test_share_and_nats_are_over_all_labelled_tokens():
    model, tokenizer = load_model("tiny")
    texts = encoded(tokenizer, [*known_facts()[:6], *facts(3, 0)])
    texts[0] = Example(texts[0].input_ids, [IGNORE, *texts[0].labels[1:-2], IGNORE, IGNORE])  # fewer tokens than others
    share, nats = share_and_nats(model, texts, show=False)
    assert share == sum(exact_match(model, texts, show=False)) / 9
    assert nats == pytest.approx(completion_loss(model, collate(texts)).item(), rel=1e-4)
    with pytest.raises(ValueError, match="at least one example"):
        share_and_nats(model, [], show=False)
