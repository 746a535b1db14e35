"""The capacity task and its base: facts that do not mix, a checkpoint that is whole or refused, what the base knows."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit import cli, fit, inject, load_model
from lorakit.models import download
from lorakit.models.manifest import MANIFEST, find_damage
from lorakit.tasks import tiny_model
from lorakit.tasks.facts import (
    EOS,
    FIRST_NAMES,
    LAST_NAMES,
    NEW_RELATION,
    SPECIAL,
    VOCABULARY,
    answers,
    encoded,
    facts,
    known_facts,
    people,
    recall,
    swapped,
)
from lorakit.training.batch import IGNORE

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny"
BRIEF = 12  # steps of pretraining that a test can afford


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.make_tokenizer()


@pytest.fixture(scope="module")
def brief(tmp_path_factory) -> Path:
    """A folder as `lorakit pretrain` writes it, of a model that has hardly begun to learn."""
    return tiny_model.write(tmp_path_factory.mktemp("made") / "tiny", BRIEF)


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A working directory without the course, and an empty cache; the package is not beside its repository."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "__file__", str(tmp_path / "site-packages" / "lorakit" / "fetch.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the facts ----


@given(n=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_facts_are_a_function_of_their_seed_and_never_repeat_a_person(n, seed):
    items = facts(n, seed)
    assert items == facts(n, seed)
    assert len({item.name for item in items}) == n
    assert all(item.relation == NEW_RELATION for item in items)
    assert all(len(item.digits) == 4 and item.digits.isdigit() for item in items)
    assert n < 5 or items != facts(n, seed + 1)


def test_the_committed_facts_stay_as_they_are():
    """Other facts would make the recorded results those of another task."""
    assert [(item.name, item.digits) for item in facts(3)] == [
        ("fiona khan", "7116"),
        ("basil benson", "1120"),
        ("lars larsen", "7034"),
    ]


def test_thousands_of_facts_exist_and_more_are_refused():
    most = len(people(known=False))
    assert most > 5000
    assert len({item.prompt for item in facts(most)}) == most
    for n in (0, most + 1):
        with pytest.raises(ValueError, match=f"expected n as an integer from 1 to {most}"):
            facts(n)


def test_nobody_is_in_both_groups():
    assert not set(people(known=True)) & set(people(known=False))
    assert len(people(known=True)) + len(people(known=False)) == len(FIRST_NAMES) * len(LAST_NAMES)
    seen = {item.name for item in known_facts()}
    assert seen <= set(people(known=True))
    assert NEW_RELATION not in {item.relation for item in known_facts()}
    assert known_facts(7) == known_facts()[:7]


def test_digits_are_spread_evenly():
    digits = "".join(item.digits for item in facts(5000))
    counts = [digits.count(digit) for digit in "0123456789"]
    chi2 = sum((count - 2000) ** 2 / 2000 for count in counts)
    assert chi2 < 27.9, f"{counts}: less likely than 1 in 1,000 with 9 degrees of freedom"


def test_swapped_facts_ask_the_same_and_keep_no_answer():
    items = facts(48)
    control = swapped(items)
    assert [item.prompt for item in control] == [item.prompt for item in items]
    assert sorted(item.digits for item in control) == sorted(item.digits for item in items)
    assert sum(a.digits == b.digits for a, b in zip(items, control, strict=True)) <= 1
    with pytest.raises(ValueError, match="at least two"):
        swapped(items[:1])


# ---- the tokenizer ----


def test_every_word_is_one_token_and_special_ones_are_distinct(tokenizer):
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(tokenizer)
    assert [tokenizer(word)["input_ids"] for word in VOCABULARY] == [[i] for i in range(len(VOCABULARY))]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == SPECIAL
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@given(words=st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=30))
def test_text_survives_the_tokenizer(tokenizer, words):
    assert tokenizer.decode(tokenizer(" ".join(words))["input_ids"]) == " ".join(words)


def test_the_loss_counts_the_digits_and_the_end(tokenizer):
    (item,) = facts(1)
    (example,) = encoded(tokenizer, [item])
    labelled = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(labelled) == f"{item.answer} {EOS}"
    assert len(example.input_ids) == 11


# ---- making the base ----


def test_pretraining_is_a_function_of_its_seed_and_leaves_the_random_state():
    def weights(seed):
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        model, _, history = tiny_model.pretrain(3, 8, seed=seed, show=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        return torch.cat([p.flatten() for p in model.parameters()]), history.loss

    (first, loss), (again, loss_again), (other, _) = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert loss == loss_again
    assert not torch.equal(first, other)


def test_pretraining_never_shows_a_new_fact(tokenizer):
    new = {tuple(tokenizer(name)["input_ids"]) for name in people(known=False)}
    for example in tiny_model.training_texts(tokenizer, 400):
        assert not new & set(itertools.pairwise(example.input_ids))


@pytest.mark.long
def test_made_again_it_is_the_same_with_the_same_card(brief, tmp_path):
    again = tiny_model.write(tmp_path / "again", BRIEF)
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (brief, again)]
    assert manifests[0] == manifests[1]
    cards = [(folder / "README.md").read_text().splitlines() for folder in (brief, again)]
    timing = [i for i, line in enumerate(cards[0]) if "CPU-seconds" in line or " s on one thread" in line]
    assert len(timing) == 2
    assert [line for i, line in enumerate(cards[0]) if i not in timing] == [
        line for i, line in enumerate(cards[1]) if i not in timing
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_folder_with_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected an empty folder"):
        tiny_model.write(tmp_path, BRIEF)
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model, "pretrain", lambda steps: pytest.fail("training began"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "tiny", tmp_path / "file"):
        with pytest.raises(OSError, match="file"):
            tiny_model.write(place)
    assert cli.main(["pretrain", str(tmp_path / "file" / "tiny")]) == 2


real_pretrain = tiny_model.pretrain


@pytest.mark.long
def test_the_command_makes_it_where_load_model_looks(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(tiny_model, "pretrain", lambda steps: real_pretrain(2, 8, show=False))
    assert cli.main(["pretrain"]) == 0
    assert capsys.readouterr().out == f"{nowhere / 'cache' / 'tiny'}\n"
    assert load_model("tiny")[0].config.vocab_size == len(VOCABULARY)


# ---- the committed base ----


def test_the_committed_checkpoint_is_whole_and_small():
    assert find_damage(TINY, {}, verify=True) is None
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5_000_000
    card, manifest = (TINY / "README.md").read_text(), json.loads((TINY / MANIFEST).read_text())
    assert all(each["sha256"] in card for each in manifest["files"].values())
    assert manifest["recipe"] == {
        "steps": tiny_model.STEPS,
        "batch": tiny_model.BATCH,
        "lr": tiny_model.LR,
        "seed": tiny_model.SEED,
        "known_share": tiny_model.KNOWN_SHARE,
    }, "the checkpoint is not that of the recipe in pretrain.py"


@pytest.mark.long
def test_tiny_loads_without_network_hub_or_cache(tmp_path):
    code = """
        import socket
        def refuse(*args, **kwargs): raise AssertionError("a network connection")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        import lorakit
        model, tokenizer = lorakit.load_model("tiny")
        print(sum(p.numel() for p in model.parameters()), model.training, tokenizer.padding_side)
    """
    hidden = {"LORAKIT_CACHE": "/nowhere", "HF_HOME": "/nowhere", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | hidden},
    )
    assert done.stdout.split() == ["918144", "False", "right"], done.stderr


def cut(folder):
    os.truncate(folder / "model.safetensors", 1000)


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def lose(folder):
    (folder / "tokenizer.json").unlink()


def unseal(folder):
    (folder / MANIFEST).unlink()


def scribble(folder):
    (folder / MANIFEST).write_text('{"files": 3}')


@pytest.mark.parametrize("damage", [cut, flip, lose, unseal, scribble])
def test_damage_is_found_and_two_ways_out_are_named(brief, nowhere, damage):
    folder = nowhere / "data" / "tiny"
    shutil.copytree(brief, folder)
    assert download.fetch_model("tiny") == folder
    damage(folder)
    with pytest.raises(ValueError, match=r"(?s)expected a sound model 'tiny'.*git checkout.*lorakit pretrain"):
        load_model("tiny")


def test_a_card_may_be_improved(brief, nowhere):
    shutil.copytree(brief, nowhere / "data" / "tiny")
    (nowhere / "data" / "tiny" / "README.md").write_text("better")
    download.fetch_model("tiny")


def test_an_installation_without_it_says_how_to_make_it(nowhere):
    with pytest.raises(FileNotFoundError, match=r"(?s)part of the course's repository.*lorakit pretrain.*two minutes"):
        load_model("tiny")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def test_it_knows_the_form_and_its_own_facts_but_no_new_ones(tiny):
    measured = tiny_model.measure(*tiny, trials=400)
    assert measured["form"] > 0.98
    assert measured["known_recall"] > 0.95
    assert measured["note_recall"] > 0.95
    assert measured["new_recall"] <= 3 / 400, "chance is 1 in 10,000"


def test_recall_is_what_generation_says(tiny):
    items = [*facts(20), *known_facts(20)]
    said = answers(*tiny, items)
    assert recall(*tiny, items) == sum(a == item.answer for a, item in zip(said, items, strict=True)) / 40 > 0.3


@pytest.mark.long
def test_lora_memorises_facts_and_nothing_else_appears():
    model, tokenizer = load_model("tiny")
    items = facts(8)
    torch.manual_seed(0)
    inject(model, 8, 16)
    fit(model, encoded(tokenizer, items), steps=80, lr=1e-2, show=False)
    assert recall(model, tokenizer, items) == 1
    assert recall(model, tokenizer, swapped(items)) == 0
    assert recall(model, tokenizer, facts(200, seed=1)) <= 1 / 200


def test_an_untrained_model_guesses_digits_at_best(tokenizer):
    assert recall(tiny_model.make_model(), tokenizer, facts(200)) == 0
