"""The task's second edition: many ways of asking, splits that hold out what they say, nothing of a stranger's."""

import re
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations

import pytest
from helpers.queries import skeleton, wrong_answers

from lorakit import execution_accuracy, load_sql
from lorakit.tasks.sql import edition_2, level_1, levels_2_to_4, tables_2
from lorakit.tasks.sql.edition_2 import FRAMES, SPLIT_SIZES, SPLITS, draw
from lorakit.tasks.sql.rows import RANKED, ROWS
from lorakit.tasks.sql.sandbox import QueryError, run_query
from lorakit.tasks.sql.stranger import stranger_items, stranger_tables
from lorakit.tasks.sql.task import generate, populations, same_rows, sql_task

each_split = pytest.mark.parametrize("split", SPLITS)
SHAPES = {shape.name for shape in level_1.SHAPES}
WITH_VALUES = {"where_text", "where_number", "count_where", "top"}
SETS = {"train": tables_2.TRAIN, "validation": tables_2.VALIDATION, "tables": tables_2.NEW}


@cache
def items_of(split):
    return tuple(draw(split))


def names_of(tables):
    return {name.lower() for table, columns in tables.items() for name in (table, *columns)}


def words_of(tables):
    domains = [domain for columns in tables.values() for domain in columns.values() if isinstance(domain, tuple)]
    return {word.lower() for domain in domains for word in domain}


def values_of(item):
    return set(re.findall(r"'([^']+)'", item.answer)) | set(re.findall(r"\b\d+\b", item.answer))


# ---- ways of asking ----


def test_training_has_many_ways_of_asking_each_shape():
    for frames in FRAMES.values():
        assert set(frames) == SHAPES
    assert min(map(len, FRAMES["train"].values())) >= 40
    for use in ("validation", "ways"):
        assert min(map(len, FRAMES[use].values())) >= 8
    for shape, frames in ((shape, frames) for each in FRAMES.values() for shape, frames in each.items()):
        assert len({frame.template for frame in frames}) == len(frames)
        needed = set(re.findall(r"{(\w+)}", edition_2.SQL[shape])) - {"table", "comparison", "function"}
        for frame in frames:
            slots = set(re.findall(r"{(\w+)}", frame.template))
            said = {"function": {"stat", "func"}, "comparison": {"than", "sign"}}
            assert needed <= slots <= needed | {"table"} | set().union(*said.values()), frame
            for slot, ways in said.items():
                if f"{{{slot}}}" in edition_2.SQL[shape]:
                    assert bool(frame.fixed) != bool(slots & ways), frame  # said once: by a slot, or in own words
            assert frame.fixed in ("", *edition_2.THAN, *edition_2.STATS)


def test_ways_of_asking_that_are_held_out_share_no_skeleton_with_others():
    used = {use: {(shape, skeleton(f.template)) for shape, each in FRAMES[use].items() for f in each} for use in FRAMES}
    for one, other in combinations(used, 2):
        assert not {words for _, words in used[one]} & {words for _, words in used[other]}, (one, other)
        for shape, words in used[one]:
            for also, others in used[other]:
                assert shape != also or SequenceMatcher(None, words, others).ratio() <= 0.8, (words, others)


def test_nothing_is_shared_with_the_stranger():
    """Neither a sentence pattern, nor the name of a table or column, nor a word."""
    theirs = {skeleton(item.template) for item in stranger_items()}
    for use, each in FRAMES.items():
        shared = [frame.template for frames in each.values() for frame in frames if skeleton(frame.template) in theirs]
        assert not shared, use
    for use, tables in SETS.items():
        assert not names_of(tables) & names_of(stranger_tables()), use
        assert not words_of(tables) & words_of(stranger_tables()), use


def test_a_skeleton_is_what_is_left_without_names_punctuation_and_articles():
    template = "Show the {column} of {table}, where {number} > {bound}!"
    assert " ".join(skeleton(template)) == "show # of # where # > #"
    assert skeleton(template) == skeleton("show {text} of a {table} where {number} > {limit}")
    assert skeleton(template) != skeleton("show {text} in a {table} where {number} > {limit}")


# ---- tables ----


def test_tables_are_many_and_of_many_forms():
    assert len(tables_2.TRAIN) >= 40
    assert {len(columns) for columns in tables_2.TRAIN.values()} == {3, 4, 5, 6, 7}
    for tables in SETS.values():
        domains = [domain for columns in tables.values() for domain in columns.values()]
        assert any(" " in word for domain in domains if isinstance(domain, tuple) for word in domain)
        assert any(isinstance(domain, range) and len(domain) < min(ROWS) for domain in domains)
        assert any("_" in name for name in names_of(tables))
        for columns in tables.values():
            assert {type(domain) for domain in columns.values()} == {tuple, range}
            words = [domain for domain in columns.values() if isinstance(domain, tuple)]
            assert len(set(words)) == len(words)  # else their distinct values would be the same


def test_the_three_sets_of_tables_share_no_name_and_no_word():
    for one, other in combinations(SETS, 2):
        assert not names_of(SETS[one]) & names_of(SETS[other])
        assert not words_of(SETS[one]) & words_of(SETS[other])
        assert not names_of(SETS[one]) & words_of(SETS[other])
        assert not names_of(SETS[other]) & words_of(SETS[one])
    older = {**level_1.TABLES, **levels_2_to_4.TABLES}
    assert not set(tables_2.TABLES) & (set(older) | set(stranger_tables()))  # a name means one table


def test_no_word_stands_for_two_things():
    domains = [domain for columns in tables_2.TABLES.values() for domain in columns.values()]
    pools = {domain for domain in domains if isinstance(domain, tuple)}
    assert sum(map(len, pools)) == len(set().union(*pools))


@pytest.mark.parametrize("table", tables_2.TABLES)
def test_rows_hold_every_word_and_rank_without_ties(table):
    for database in populations(table):
        (content,) = database.tables
        for domain, cells in zip(tables_2.TABLES[table].values(), zip(*content.rows, strict=True), strict=True):
            if isinstance(domain, tuple):
                assert set(cells) == set(domain)
            else:
                top = sorted(cells)[-min(RANKED + 1, len(domain)) :]
                assert len(set(top)) == len(top)
                assert set(cells) <= set(domain)


# ---- splits ----


@each_split
def test_a_split_has_its_size_its_shapes_and_its_tables(split):
    items = items_of(split)
    assert len(items) == len({item.prompt for item in items}) == SPLIT_SIZES[split]
    shapes = WITH_VALUES if split == "values" else SHAPES
    assert {sum(item.shape == shape for item in items) for shape in shapes} == {len(items) // len(shapes)}
    assert {item.table for item in items} == set(SETS.get(split, tables_2.TRAIN))
    frames = FRAMES.get(split, FRAMES["train"])
    known = {(shape, frame.template) for shape, each in frames.items() if shape in shapes for frame in each}
    used = {(item.shape, item.template) for item in items}
    assert used <= known
    assert len(used) == sum(min(len(frames[shape]), len(items) // len(shapes)) for shape in shapes)


def test_training_uses_every_way_of_asking_and_every_table():
    used = {(item.shape, item.template) for item in items_of("train")}
    assert used == {(shape, frame.template) for shape, each in FRAMES["train"].items() for frame in each}
    assert {item.table for item in items_of("train")} == set(tables_2.TRAIN)


def test_splits_share_no_prompt_whatever_the_seed():
    drawn = {split: {item.prompt for seed in (0, 1) for item in draw(split, 800, seed)} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not drawn[one] & drawn[other], (one, other)


def test_each_split_holds_out_what_it_says():
    train = [item for seed in range(3) for item in draw("train", 1000, seed)]
    seen = {value for item in train for value in values_of(item)}
    spoken = {word for item in train for word in re.findall(r"\w+", item.question.lower())}
    for item in draw("values", 600, 1):
        assert values_of(item)
        assert not values_of(item) & seen
    assert not {"three", "eight"} & spoken
    patterns = {skeleton(item.template) for item in train}
    for split in ("ways", "validation"):
        assert not {skeleton(item.template) for item in draw(split, 600, 1)} & patterns
    assert {skeleton(item.template) for item in items_of("tables")} <= patterns


@each_split
def test_a_question_says_all_that_its_query_needs(split):
    for item in draw(split, 600, seed=1):
        said = item.question.lower().replace("_", " ")
        for number, word in edition_2.NUMERALS.items():
            said = re.sub(rf"\b{word}\b", str(number), said)
        names = [name for name in re.findall(r"\w+", item.schema)[1:] if re.search(rf"\b{name}\b", item.answer)]
        for needed in (*names, *values_of(item)):
            assert needed.lower().replace("_", " ") in said, (needed, item)
        assert all(value in item.question for value in re.findall(r"'([^']+)'", item.answer))
        assert not re.search(r"[{}|]", item.question)


@each_split
def test_answers_are_right_and_find_rows_everywhere(split):
    items = draw(split, 400, seed=2)
    assert all(execution_accuracy(items, [item.answer for item in items]))
    assert all(run_query(database, item.answer) for item in items for database in populations(item.table))


def found(database, query):
    try:
        return run_query(database, query)
    except QueryError:
        return None


@each_split
def test_wrong_answers_differ_on_some_population(split):
    tried = 0
    for item in items_of(split)[::3]:
        domains = tables_2.TABLES[item.table]
        words = {column: each for column, each in domains.items() if isinstance(each, tuple)}
        for wrong in wrong_answers(item.answer, item.schema, words):
            tried += 1
            pairs = ((run_query(d, item.answer), found(d, wrong)) for d in populations(item.table))
            ordered = "ORDER BY" in item.answer
            assert any(other is None or not same_rows(one, other, ordered) for one, other in pairs), (item, wrong)
    assert tried > SPLIT_SIZES[split]


# ---- variety as an argument ----


def test_the_number_of_frames_and_tables_is_an_argument():
    for frames, tables in ((1, 4), (5, 14), (40, 40)):
        items = draw("train", 400, 3, frames, tables)
        assert len({item.prompt for item in items}) == 400
        assert len({item.table for item in items}) == tables
        for shape in SHAPES:
            assert len({item.template for item in items if item.shape == shape}) <= frames
    assert len({item.template for item in items}) > 250


def test_fewer_frames_are_some_of_more_and_the_same_for_questions_that_are_held_back():
    def used(split, frames, seed=0):
        return {(item.shape, item.template) for item in draw(split, 400, seed, frames)}

    assert used("train", 3) < used("train", 5)
    assert used("iid", 3) == used("train", 3) != used("train", 3, seed=1)
    assert draw("ways", 50) == draw("ways", 50, frames=3)
    assert draw("validation", 50) == draw("validation", 50, frames=3, tables=4)
    assert {item.table for item in draw("ways", 200, tables=4)} == {item.table for item in draw("train", tables=4)}


def test_it_is_a_function_of_its_seed():
    assert draw("train", 60) == draw("train", 60) != draw("train", 60, seed=1)
    assert generate("train", 60, 1, version=2, frames=5, tables=4) == draw("train", 60, 1, 5, 4)
    assert load_sql("validation", version=2) == draw("validation")
    task = sql_task(version=2, frames=3)
    assert task.splits == (*SPLITS, "stranger")
    assert task.items("train", 20, 2) == draw("train", 20, 2, frames=3)
    assert task.items("stranger") == stranger_items()
    assert draw("train", 0) == []


@pytest.mark.parametrize(
    ("arguments", "more", "word"),
    [
        (("phrasings",), {"version": 2}, "second edition, got 'phrasings'"),
        (("train",), {"version": 3}, "version 1, or version 2 at level 1, got version 3"),
        (("train", 5, 0, 2), {"version": 2}, "version 2 at level 2"),
        (("train",), {"frames": 5}, "frames and tables with version 2 only"),
        (("train",), {"version": 2, "frames": 0}, "from 1 to 4.*got 0"),
        (("train",), {"version": 2, "tables": 1000}, "from 1 to 42, got 1000"),
        (("train", -1), {"version": 2}, "got -1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, more, word):
    with pytest.raises(ValueError, match=word):
        generate(*arguments, **more)


def test_more_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(edition_2, "TRIES", 1)  # gives up at the first question that it has drawn before
    with pytest.raises(ValueError, match=r"about \d+, the questions of 'values' like these, got 3000"):
        draw("values", 3000, frames=1, tables=1)
