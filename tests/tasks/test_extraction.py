"""The extraction task: its splits hold out what they say, and only the exact record counts."""

import json
import re

import pytest

from lorakit.tasks.extraction import KINDS, LARGEST, NEW_KINDS, SPLITS, messages, same_records


@pytest.mark.parametrize("split", SPLITS)
def test_messages_are_different_and_hold_their_values(split):
    items = messages(split, LARGEST[split])
    assert len({item.text for item in items}) == LARGEST[split]
    for item in items:
        assert list(item.fields) == list(KINDS[item.kind][0])
        assert all(str(value).lower() in item.text.lower() for value in item.fields.values())
        assert len(set(item.fields.values())) == len(item.fields) or any(
            isinstance(v, int) for v in item.fields.values()
        )
        assert not re.search(r"[{}|]", item.text)
        assert item.completion == json.dumps(item.fields) + "<|im_end|>"
        assert item.prompt.count("<|im_start|>") == 2
        assert ", ".join(item.fields) in item.prompt


def test_the_same_seed_draws_the_same_and_another_seed_others():
    assert messages("train", 50) == messages("train", 50)
    assert {m.text for m in messages("train", 50)} != {m.text for m in messages("train", 50, seed=1)}


def words_of(items):
    return {
        word for item in items for value in item.fields.values() if isinstance(value, str) for word in value.split()
    }


def test_nothing_of_the_tests_is_in_training():
    train = messages("train", LARGEST["train"], seed=3)
    for split in ("phrasings", "kinds"):
        test = messages(split, LARGEST[split], seed=4)
        assert not words_of(train) & words_of(test)
    assert {item.kind for item in train} == set(KINDS) - set(NEW_KINDS)
    assert {item.kind for item in messages("kinds")} == set(NEW_KINDS)
    assert {item.kind for item in messages("phrasings")} == set(KINDS) - set(NEW_KINDS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"dish": "rice", "guests": 3}', True),
        ('{"guests":3,"dish":"rice"}', True),
        ('{"dish": "rice", "guests": "3"}', False),
        ('{"dish": "rice", "guests": 3.0}', False),
        ('{"dish": "rice", "guests": true}', False),
        ('{"dish": "rice"}', False),
        ('{"dish": "rice", "guests": 3, "host": null}', False),
        ('[{"dish": "rice", "guests": 3}]', False),
        ('{"dish": "rice", "guests": 3} and so on', False),
        ("3", False),
        ("", False),
        ("[" * 100_000, False),
        ("9" * 10_000, False),
    ],
)
def test_only_the_exact_record_is_right(answer, right):
    item = messages("train", 1)[0]
    item = type(item)("dinner", "", {"dish": "rice", "guests": 3})
    assert same_records([item], [answer]) == [right]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="phrasings"):
        messages("phrasing")
    for split in SPLITS:
        for n in (-1, LARGEST[split] + 1):
            with pytest.raises(ValueError, match="expected n as an integer from 0 to"):
                messages(split, n)
    assert messages("train", 0) == []
    with pytest.raises(ValueError, match="one answer an item"):
        same_records(messages("train", 2), ["{}"])
