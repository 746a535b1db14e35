"""The text-to-SQL task: what each split holds out, that the metric sees wrong answers, and that no query does harm."""

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorakit import cli
from lorakit.tasks.sql import edition_2, level_1, levels_2_to_4, tables_2
from lorakit.tasks.sql.harder_questions import lookalikes
from lorakit.tasks.sql.questions import questions
from lorakit.tasks.sql.sandbox import Database, QueryError, Table, run_query
from lorakit.tasks.sql.task import (
    SPLIT_SIZES,
    SPLITS,
    Item,
    execution_accuracy,
    generate,
    load_databases,
    load_sql,
    near_misses,
    populations,
    same_rows,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "sql"
ORDERS = populations("orders")[0]


@cache
def items_of(split: str) -> tuple[Item, ...]:
    return tuple(generate(split))


def tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


# ---- the splits ----


def test_prompt_and_completion_are_the_documented_strings():
    item = Item("average qty of orders per city.", "SELECT 1", "orders(city, qty)", "orders", "group", "")
    assert item.prompt == (
        "<|im_start|>user\norders(city, qty)\naverage qty of orders per city.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert item.completion == "SELECT 1<|im_end|>"


@pytest.mark.parametrize("split", SPLITS)
def test_split_has_its_size_and_all_it_should_cover(split):
    items = items_of(split)
    assert len(items) == len({item.prompt for item in items}) == SPLIT_SIZES[split]
    assert {item.table for item in items} == (
        set(level_1.UNSEEN_TABLES) if split == "tables" else set(level_1.TABLES) - set(level_1.UNSEEN_TABLES)
    )
    with_values = {"where_text", "where_number", "count_where", "top"}
    assert {item.shape for item in items} == (
        with_values if split == "values" else {shape.name for shape in level_1.SHAPES}
    )


def test_training_meets_every_phrasing_and_every_word_for_an_operation():
    train = items_of("train")
    assert {item.template for item in train} == {t for shape in level_1.SHAPES for t in shape.train}
    seen = " ".join(item.question for item in train)
    for synonyms in [*level_1.COMPARISONS.values(), *level_1.FUNCTIONS.values()]:
        assert all(word in seen for word in synonyms)


def test_no_question_that_can_be_drawn_is_shared_between_splits():
    prompts = {split: [item.prompt for item in questions(split)] for split in SPLITS}
    for split in SPLITS:
        assert len(set(prompts[split])) == len(prompts[split])
    for one, other in combinations(SPLITS, 2):
        assert not set(prompts[one]) & set(prompts[other]), (one, other)


def test_values_split_uses_no_word_or_number_of_any_training_question():
    seen = set().union(*(tokens(item.question) | tokens(item.answer) for item in questions("train")))
    for item in questions("values"):
        values = set(re.findall(r"'(\w+)'", item.answer)) | set(re.findall(r"\b\d+\b", item.answer))
        assert values
        assert not values & seen
        assert values <= tokens(item.question)


def test_phrasings_split_uses_other_sentences():
    assert not {item.template for item in questions("phrasings")} & {item.template for item in questions("train")}
    for shape in level_1.SHAPES:
        for new in shape.held_out:
            for old in shape.train:
                likeness = SequenceMatcher(None, new.lower().split(), old.lower().split()).ratio()
                assert likeness < 0.7, (new, old)


def test_tables_split_has_no_name_and_no_word_of_training():
    train = set().union(*(tokens(item.schema) for item in questions("train")))
    train |= {value for item in questions("train") for value in re.findall(r"'(\w+)'", item.answer)}
    for item in questions("tables"):
        assert not tokens(item.schema) & train
        assert not set(re.findall(r"'(\w+)'", item.answer)) & train
    assert {item.template for item in questions("tables")} <= {item.template for item in questions("train")}


def test_no_word_stands_for_two_things():
    domains = [domain for table in level_1.TABLES.values() for domain in table.values() if isinstance(domain, tuple)]
    for one, other in combinations(set(domains), 2):
        assert len(one) == len(set(one)) == 12
        assert not set(one) & set(other)


def test_the_question_names_what_the_query_needs():
    """Every column, word and number of the query stands in the question, so the question determines the query."""
    for split in SPLITS:
        for item in items_of(split):
            names_and_values = {token for token in tokens(item.answer) if not token.isupper()}
            assert names_and_values - {item.table} <= tokens(item.question), item


def test_other_seeds_and_sizes_are_other_data_of_the_same_kind():
    assert generate("train", 50) == generate("train", 50, seed=0)
    first, second = generate("train", 2000, seed=1), generate("train", 2000, seed=2)
    assert first != second
    held_out = {item.prompt for split in SPLITS[1:] for item in generate(split, 1500, seed=3)}
    assert not held_out & {item.prompt for item in first + second}
    assert generate("iid", 0) == []


def test_unknown_split_and_too_many_items_are_refused_with_advice():
    with pytest.raises(ValueError, match="'phrasing'; near: phrasings"):
        generate("phrasing")
    with pytest.raises(ValueError, match=r"between 0 and \d+ \(the different questions of 'iid'\), got 10000000"):
        generate("iid", 10_000_000)
    assert len(generate("iid", len(questions("iid")))) == len(questions("iid"))
    with pytest.raises(ValueError, match="got -1"):
        generate("train", -1)
    with pytest.raises(ValueError, match="near: rivers"):
        populations("river")


# ---- the harder levels ----

each_level = pytest.mark.parametrize("level", [2, 3, 4])


@cache
def harder_items(split: str, level: int) -> tuple[Item, ...]:
    return tuple(generate(split, 200, level=level))


@pytest.mark.long
@each_level
def test_a_level_has_the_shapes_of_those_below_it_in_equal_shares(level):
    shapes = {shape.name for each in levels_2_to_4.LEVELS[:level] for shape in each}
    assert len({shape.name for each in levels_2_to_4.LEVELS for shape in each}) == 20
    for split in ("train", "iid", "phrasings", "tables"):
        items = harder_items(split, level)
        assert len({item.prompt for item in items}) == 200
        share = [sum(item.shape == shape for item in items) for shape in shapes]
        assert min(share) >= 8
        assert {item.shape for item in items} == shapes
        assert len({item.schema.count("\n") for item in items}) == 1
        assert ("\n" in items[0].schema) == (level == 4)


@pytest.mark.long
@each_level
def test_no_harder_question_is_shared_between_splits(level):
    prompts = {split: {item.prompt for item in harder_items(split, level)} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not prompts[one] & prompts[other]
    seen = set().union(*(tokens(item.question) | tokens(item.answer) for item in harder_items("train", level)))
    for item in harder_items("values", level):
        values = set(re.findall(r"'(\w+)'", item.answer)) | set(re.findall(r"\b\d+\b", item.answer))
        assert values
        assert not values & seen
    schemas = set().union(*(tokens(item.schema) for item in harder_items("train", level)))
    words = {word for item in harder_items("train", level) for word in re.findall(r"'(\w+)'", item.answer)}
    for item in harder_items("tables", level):
        assert not (tokens(item.schema) | set(re.findall(r"'(\w+)'", item.answer))) & (schemas | words)


@pytest.mark.long
@each_level
def test_a_harder_question_and_its_schema_name_what_the_query_needs(level):
    for item in (item for split in SPLITS for item in harder_items(split, level)):
        needed = {token for token in tokens(item.answer) if not token.isupper()}
        key = tokens(" ".join(re.findall(r"USING \((\w+)\)", item.answer)))
        assert needed - key - tokens(item.table) <= tokens(item.question), item
        assert key <= set.intersection(*(tokens(line) for line in item.schema.split("\n")))


@each_level
def test_no_lookalike_of_a_harder_query_passes(level):
    tried = 0
    for item in harder_items("tables", level)[::4]:
        assert execution_accuracy([item], [item.answer]) == [True]
        for wrong in set(lookalikes(item.answer)) - {item.answer}:
            tried += 1
            assert execution_accuracy([item], [wrong]) == [False], (item.answer, wrong)
    assert tried > 100


def test_lookalikes_are_what_they_say():
    misses = set(lookalikes("SELECT a FROM t WHERE b = 'x' AND c > 1"))
    expected = {
        "SELECT a FROM t WHERE b = 'x'",
        "SELECT a FROM t WHERE c > 1",
        "SELECT a FROM t WHERE b = 'x' OR c > 1",
    }
    assert expected <= misses
    inner = "SELECT a FROM t WHERE c > (SELECT AVG(c) FROM t WHERE b = 'x')"
    assert {inner.replace(" WHERE b = 'x'", ""), inner.replace("AVG", "MAX"), inner.replace(">", "<")} <= set(
        lookalikes(inner)
    )


def test_linked_tables_share_one_column_and_hold_all_its_words():
    for table, other in levels_2_to_4.LINKS.items():
        columns, linked = level_1.TABLES[table], levels_2_to_4.TABLES[other]
        (key,) = set(columns) & set(linked)
        assert key == next(iter(linked))
        assert columns[key] is linked[key]
        for database in populations(f"{table}, {other}"):
            main, more = database.tables
            assert main == populations(table)[populations(table).index(Database((main,)))].tables[0]
            assert sorted(row[0] for row in more.rows) == sorted(linked[key])
            numbers = [row[2] for row in more.rows]
            assert len(set(numbers)) == len(numbers) == 12


def test_the_new_sentences_of_a_harder_shape_are_new():
    for shape in (shape for each in levels_2_to_4.LEVELS[1:] for shape in each):
        assert (len(shape.train), len(shape.held_out)) == (5, 3)
        for new in shape.held_out:
            for old in shape.train:
                likeness = SequenceMatcher(None, new.lower().split(), old.lower().split()).ratio()
                assert likeness < 0.7, (new, old)


def test_levels_have_seeds_and_limits():
    assert generate("train", 40, level=3) == generate("train", 40, level=3) != generate("train", 40, seed=1, level=3)
    assert generate("iid", 0, level=2) == []
    for level in (0, 5):
        with pytest.raises(ValueError, match="level as an integer from 1 to 4"):
            generate("train", level=level)
    with pytest.raises(ValueError, match="n as an integer >= 0, got -1"):
        generate("train", -1, level=2)


# ---- the files ----


@pytest.mark.parametrize(("version", "folder"), [(1, DATA), (2, DATA / "edition_2")])
def test_rebuilding_gives_the_committed_bytes(tmp_path, version, folder):
    """Python's random hash seed differs from the one of the committed build."""
    assert cli.main(["data", str(tmp_path / "new"), "--version", str(version)]) == 0
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "train.jsonl").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "old"
    monkeypatch.undo()
    write(tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == (DATA / "train.jsonl").read_bytes()


@pytest.mark.parametrize(("sizes", "folder"), [(SPLIT_SIZES, DATA), (edition_2.SPLIT_SIZES, DATA / "edition_2")])
def test_card_tells_true_sizes_and_checksums(sizes, folder):
    card = (folder / "README.md").read_text()
    table = re.findall(r"^\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
    assert {name for name, _, _ in table} == {path.name for path in folder.iterdir() if path.is_file()} - {"README.md"}
    for name, size, digest in table:
        content = (folder / name).read_bytes()
        assert (int(size), digest) == (len(content), hashlib.sha256(content).hexdigest())
    for split, size in sizes.items():
        assert re.search(rf"^\| {split} \| {size} \|", card, re.MULTILINE)


@pytest.mark.parametrize("split", SPLITS)
def test_files_hold_what_the_generator_makes(split):
    assert load_sql(split) == load_sql(split, DATA) == list(items_of(split))


@pytest.mark.parametrize("split", edition_2.SPLITS)
def test_files_of_the_second_edition_hold_what_the_generator_makes(split):
    assert load_sql(split, version=2) == load_sql(split, DATA / "edition_2")


@pytest.mark.parametrize(("tables", "folder"), [(level_1.TABLES, DATA), (tables_2.TABLES, DATA / "edition_2")])
def test_databases_file_holds_the_populations(tables, folder):
    assert load_databases(folder) == {table: populations(table) for table in tables}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "one JSON object in .*mine.jsonl, line 3"),
        ("[1]", "the text fields question, .*mine.jsonl, line 3"),
        ('{"question": "q"}', "the text fields question, .*mine.jsonl, line 3"),
        ('{"question": 5, "answer": "", "schema": "", "table": "", "shape": "", "template": ""}', "line 3"),
        (b"\xff", "line 3"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, complaint):
    good = (DATA / "iid.jsonl").read_bytes().splitlines()[0]
    bad = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "mine.jsonl").write_bytes(good + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=complaint):
        load_sql("mine", tmp_path)
    with pytest.raises(ValueError, match="near: mine"):
        load_sql("mien", tmp_path)


def test_readers_own_items_and_tables(tmp_path):
    record = dict(question="How many cats?", answer="SELECT COUNT(*) FROM cats", table="cats", schema="cats(name)")
    (tmp_path / "own.jsonl").write_text(json.dumps({**record, "shape": "count", "template": "", "more": 1}))
    table = {"columns": {"name": "TEXT"}, "populations": [[["Tom"], ["Tim"]], [["Tom"]]]}
    (tmp_path / "databases.json").write_text(json.dumps({"cats": table}))
    items, databases = load_sql("own", tmp_path), load_databases(tmp_path)
    assert execution_accuracy(items, ["SELECT COUNT(name) FROM cats"], databases) == [True]
    assert execution_accuracy(items, ["SELECT 2"], databases) == [False]  # right on the first population only
    with pytest.raises(ValueError, match="'cats'"):
        execution_accuracy(items, ["SELECT 1"])


# ---- the metric ----


@cache
def rows_of(table: str, query: str, population: int) -> list[tuple]:
    return run_query(populations(table)[population], query)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_finds_rows_on_every_population(split):
    items = items_of(split) + tuple(generate(split, 50, seed=5))
    assert all(rows_of(item.table, item.answer, p) for item in items for p in range(3))
    assert all(execution_accuracy(items, [f" {item.answer} ;\n" for item in items]))


def wrong_answers(item: Item) -> set[str]:
    """Queries like those of a model that has nearly understood."""
    gold, columns = item.answer, re.findall(r"\w+", item.schema)[1:]
    wrong = {re.sub(rf"\b{name}\b", new, gold) for name in level_1.FUNCTIONS for new in [*level_1.FUNCTIONS, "COUNT"]}
    wrong |= {re.sub(rf"\b{name}\b", new, gold) for name in columns for new in columns}
    if item.shape == "count":  # numbers never repeat, so that only distinct words are fewer than rows
        texts = [name for name in columns if isinstance(level_1.TABLES[item.table][name], tuple)]
        wrong |= {gold.replace("COUNT(*)", f"COUNT(DISTINCT {name})") for name in texts}
    wrong |= {gold.replace("COUNT(*)", name) for name in columns}
    wrong |= {re.sub(" [<>] ", f" {new} ", gold) for new in ("<", ">", "<=", ">=", "=", "!=")}
    wrong |= {re.sub(r"LIMIT (\d+)", lambda m, step=step: f"LIMIT {int(m[1]) + step}", gold) for step in (-1, 1)}
    wrong |= {re.sub(f" {part}.*", "", gold) for part in ("WHERE", "ORDER BY", "LIMIT", "GROUP BY")}
    wrong |= {gold.replace(" DESC", ""), gold.replace("DISTINCT ", ""), gold.replace("COUNT(*)", "*")}
    if value := re.search(r"(\w+) = '(\w+)'", gold):
        wrong |= {gold.replace(value[2], word) for word in level_1.TABLES[item.table][value[1]]}
    return wrong - {gold}


def some_of_each_shape(items, n=1) -> list[Item]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.shape, []).append(item)
    return [item for each in found.values() for item in each[:n]]


DRAWN = {
    **{f"level 1, {split}": lambda split=split: items_of(split) for split in SPLITS},
    **{f"level {level}, iid": lambda level=level: harder_items("iid", level) for level in (2, 3, 4)},
    **{f"edition 2, {split}": lambda split=split: load_sql(split, version=2) for split in edition_2.SPLITS},
    "stranger": lambda: load_sql("stranger"),
}


@pytest.mark.parametrize("drawn", DRAWN)
def test_no_near_miss_is_right(drawn):
    tried = 0
    for item in some_of_each_shape(DRAWN[drawn]()):
        misses = near_misses(item)
        right = execution_accuracy([item] * len(misses), misses)
        assert not any(right), (item.answer, [miss for miss, passes in zip(misses, right, strict=True) if passes])
        tried += len(misses)
    assert tried > 60


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (
            "SELECT city FROM orders WHERE qty > 50",
            [
                *("SELECT city FROM orders WHERE qty >= 50", "SELECT city FROM orders WHERE qty < 50"),
                *("SELECT city FROM orders WHERE qty > 49", "SELECT city FROM orders WHERE qty > 51"),
                *("SELECT price FROM orders WHERE qty > 50", "SELECT city FROM orders WHERE price > 50"),
                *("SELECT DISTINCT city FROM orders WHERE qty > 50", "SELECT city FROM orders"),
            ],
        ),
        (
            "SELECT city FROM orders ORDER BY qty DESC LIMIT 3",
            [
                *(f"SELECT city FROM orders ORDER BY qty DESC LIMIT {n}" for n in (2, 4)),
                *("SELECT city FROM orders ORDER BY qty LIMIT 3", "SELECT city FROM orders LIMIT 3"),
                "SELECT city FROM orders ORDER BY qty DESC",
            ],
        ),
        ("SELECT DISTINCT city FROM orders", ["SELECT city FROM orders", "SELECT DISTINCT customer FROM orders"]),
        (
            "SELECT SUM(qty) FROM orders",
            [f"SELECT {each} FROM orders" for each in ("AVG(qty)", "COUNT(qty)", "SUM(price)", "SUM(DISTINCT qty)")],
        ),
        (
            "SELECT COUNT(*) FROM orders",
            [
                *(
                    "SELECT COUNT(DISTINCT qty) FROM orders",
                    "SELECT SUM(qty) FROM orders",
                    "SELECT 24 FROM orders LIMIT 1",
                ),
                *("SELECT 24", "SELECT * FROM (VALUES (24))"),
            ],
        ),
    ],
)
def test_near_misses_are_what_they_say(query, expected):
    misses = near_misses(one_item(query))
    assert set(expected) <= set(misses)
    assert query not in misses
    assert len(set(misses)) == len(misses)


def rewritten(query: str) -> list[str]:
    """Other ways to write a query that find the same rows in the same order, whatever these are."""
    changes = [
        (r" (?=[^']*(?:'[^']*'[^']*)*$)", "\n\t "),
        (r"\b(SELECT|FROM|WHERE|AND|GROUP|ORDER|BY|AVG|SUM|MIN|MAX|COUNT|JOIN|LIMIT)\b", lambda m: m[0].lower()),
        (r"(?<!['\w])([a-z]\w*)\b(?!['\w])", r'"\1"'),
        (r"(?<=WHERE )(?!.*(?:AND|OR|SELECT))(.*)$", r"(\1)"),
        (r"(\w+) > (\d+)", r"NOT (\1 <= \2)"),
        (r"(\w+) < (\d+)", r"NOT \1 >= \2"),
        (r"(\w+) > (\d+)", r"\2 < \1"),
        (r"(?<!\))(\b\w+) > (\d+)", lambda m: f"{m[1]} >= {int(m[2]) + 1}" if "HAVING" not in query else m[0]),
        (r"(\w+) > (\d+)", r"\1 - \2 > 0"),
        (r"(\w+) = ('[^']+')", r"\1 IN (\2)"),
        (r"(\w+) = ('[^']+')", r"\2 == \1"),
        (r"COUNT\(\*\)", "COUNT(1)"),
        (r"COUNT\(\*\)", "SUM(1)" if "WHERE" not in query else "COUNT(*)"),
        (r"AVG\((\w+)\)", r"SUM(\1) * 1.0 / COUNT(\1)"),
        (r"^SELECT DISTINCT (\w+) FROM (\w+)$", r"SELECT \1 FROM \2 GROUP BY \1"),
        (r"^SELECT DISTINCT (\w+) FROM (\w+)$", r"SELECT \1 FROM \2 UNION SELECT \1 FROM \2"),
        (r"^(SELECT .*)$", r"SELECT * FROM (\1)"),
        (r"^(SELECT .*)$", r"WITH found AS (\1) SELECT * FROM found"),
        (r"FROM (\w+) WHERE (?!.*SELECT)(.*)$", r"FROM (SELECT * FROM \1) WHERE \2"),
        (r"FROM (\w+) WHERE (?!.*(?:SELECT|JOIN))(\w+) ", r"FROM \1 AS t WHERE t.\2 "),
        (r" FROM (\w+) JOIN (\w+) USING \((\w+)\)", r" FROM \1 INNER JOIN \2 ON \1.\3 = \2.\3"),
        (r" FROM (\w+) JOIN (\w+) USING \((\w+)\)", r" FROM \2 JOIN \1 USING (\3)"),
        (
            r" FROM (\w+) JOIN (\w+) USING \((\w+)\) WHERE (\w+ [=<>] \S+)$",
            r" FROM \1 WHERE \3 IN (SELECT \3 FROM \2 WHERE \4)",
        ),
        (r" HAVING (.*?) ([<>]) (\d+)$", r" HAVING \1 \2 \3.0"),
        (r" ORDER BY (\w+) DESC", r" ORDER BY -\1 ASC"),
        (r"$", " ;"),
        (r"$", " -- so it is"),
    ]
    texts = [re.sub(pattern, new, query) for pattern, new in changes]
    return [text for text in texts if text != query]


@pytest.mark.parametrize("drawn", DRAWN)
def test_a_right_query_in_other_words_is_right(drawn):
    for item in some_of_each_shape(DRAWN[drawn]()):
        others = rewritten(item.answer)
        assert len(others) > 6
        right = execution_accuracy([item] * len(others), others)
        assert all(right), (item.answer, [text for text, passes in zip(others, right, strict=True) if not passes])


@pytest.mark.long
@pytest.mark.parametrize("split", SPLITS)
def test_wrong_answers_differ_on_some_population(split):
    tried = 0
    for item in items_of(split):
        for wrong in wrong_answers(item):
            tried += 1
            assert not all(
                same_rows(rows_of(item.table, item.answer, p), rows_of(item.table, wrong, p), "ORDER BY" in item.answer)
                for p in range(3)
            ), (item.answer, wrong)
    assert tried > 5 * len(items_of(split))


def test_one_population_alone_would_let_wrong_answers_pass():
    """The reason for three: counting another word gives the same number on the first one."""
    anna, david = (f"SELECT COUNT(*) FROM orders WHERE customer = '{name}'" for name in ("Anna", "David"))
    assert rows_of("orders", anna, 0) == rows_of("orders", david, 0)
    assert rows_of("orders", anna, 1) != rows_of("orders", david, 1)


@pytest.mark.parametrize("table", level_1.TABLES)
def test_numbers_do_not_repeat_so_that_rankings_have_no_ties(table):
    for database in populations(table):
        (content,) = database.tables
        for (_, kind), cells in zip(content.columns, zip(*content.rows, strict=True), strict=True):
            assert kind == "TEXT" or len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("left", "right", "ordered", "expected"),
    [
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], False, True),
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1,), (1,)], [(1,)], False, False),
        ([(1,)], [(1, 1)], False, False),
        ([(2,)], [(2.0,)], True, True),
        ([(2**53,)], [(2**53 + 1,)], True, False),
        ([(5_000_000_001,)], [(5_000_000_002,)], True, False),
        ([(5_000_000_001,)], [(5_000_000_002.0,)], False, False),
        ([(5_000_000_001.0,)], [(5_000_000_002.0,)], False, False),
        ([(2**60,)], [(float(2**60),)], True, True),
        ([(3,)], [(3.0000000000000004,)], True, True),
        ([(0.1 + 0.2,)], [(0.3,)], False, True),
        ([(0.3,)], [(0.3001,)], False, False),
        ([(1,)], [("1",)], False, False),
        ([(None,)], [(None,)], True, True),
        ([(None,)], [(0,)], False, False),
        ([], [], False, True),
    ],
)
def test_same_rows(left, right, ordered, expected):
    assert same_rows(left, right, ordered) is same_rows(right, left, ordered) is expected


def one_item(answer: str) -> Item:
    return Item("", answer, "orders(customer, city, price, qty)", "orders", "", "")


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        ("SELECT city FROM orders", "select o.city as town from orders o;", True),
        ("SELECT city FROM orders", "SELECT city FROM orders ORDER BY qty", True),
        ("SELECT city FROM orders ORDER BY qty", "SELECT city FROM orders", False),
        ("SELECT AVG(qty) FROM orders", "SELECT 1.0 * SUM(qty) / COUNT(*) FROM orders", True),
        ("SELECT city, qty FROM orders", "SELECT qty, city FROM orders", False),
        ("SELECT city FROM orders", "SELECT city, city FROM orders", False),
        ("SELECT city FROM orders", "SELECT city FROM orders; SELECT city FROM orders", False),
        ("SELECT city FROM orders", "The query is SELECT city FROM orders", False),
        ("SELECT city FROM orders", "", False),
    ],
)
def test_execution_accuracy(gold, prediction, right):
    assert execution_accuracy([one_item(gold)], [prediction]) == [right]


def test_failing_gold_is_an_error_and_a_failing_prediction_is_not():
    with pytest.raises(ValueError, match="SELECT nothing"):
        execution_accuracy([one_item("SELECT nothing FROM orders")], ["SELECT city FROM orders"])
    with pytest.raises(ValueError, match="1 answers for 2 items"):
        execution_accuracy([one_item("SELECT 1")] * 2, ["SELECT 1"])


# ---- untrusted queries ----

ALLOWED = [
    "SELECT customer, UPPER(city) FROM orders WHERE city LIKE 'O%' OR qty BETWEEN 1 AND 50",
    "SELECT city FROM orders WHERE qty > (SELECT AVG(qty) FROM orders) GROUP BY city HAVING COUNT(*) > 0",
    "SELECT a.city FROM orders AS a JOIN orders AS b ON a.qty = b.qty AND a.city <> 'with'",
    "SELECT city FROM orders UNION SELECT customer FROM orders ORDER BY 1 LIMIT 3",
    "SELECT CASE WHEN qty > 5 THEN 'many' ELSE 'few' END FROM orders -- WITH a remark",
    "WITH a AS (SELECT AVG(price) AS m FROM orders) SELECT city FROM orders, a WHERE price > a.m",
    "with a as (select city as c from orders), b as (select c from a where c like 'O%') select b.c from b;",
    "SELECT ROUND(AVG(price), 2), COALESCE(MAX(qty), 0), GROUP_CONCAT(city) FROM ORDERS",
]
FORBIDDEN = [
    "INSERT INTO orders VALUES ('a', 'b', 1, 2)",
    "UPDATE orders SET qty = 0",
    "DELETE FROM orders",
    "DROP TABLE orders",
    "CREATE TABLE more (x)",
    "CREATE TABLE more AS SELECT * FROM orders",
    "PRAGMA query_only = OFF",
    "ATTACH 'harm.db' AS harm",
    "VACUUM INTO 'harm.db'",
    "BEGIN",
    "EXPLAIN SELECT 1",
    "VALUES (1)",
    "SELECT 1",
    "SELECT * FROM (VALUES ('Oslo'), ('Rome'))",
    "WITH a AS (SELECT 1) SELECT * FROM a",
    "WITH orders AS (SELECT 1) SELECT * FROM orders",
    "WITH a AS (SELECT city FROM orders) SELECT * FROM a, a AS b",
    "WITH a AS (SELECT city FROM orders) SELECT * FROM a, [A] AS b",
    "WITH a(x) AS (SELECT city FROM orders) SELECT * FROM a",
    "WITH a AS (SELECT city FROM orders UNION ALL SELECT city FROM a) SELECT city FROM a",
    "WITH RECURSIVE a AS (SELECT city FROM orders) SELECT * FROM a",
    "WITH a AS (SELECT city FROM orders",
    "WITH",
    "SELECT * FROM (WITH a AS (SELECT city FROM orders) SELECT * FROM a)",
    "WITH a AS (SELECT 1) DELETE FROM orders",
    "SELECT 1; DELETE FROM orders",
    "SELECT * FROM sqlite_master",
    "SELECT COUNT(*) FROM sqlite_schema",
    "SELECT * FROM pragma_table_info('orders')",
    "SELECT COUNT(*) FROM pragma_query_only",
    "SELECT * FROM json_each('[1]')",
    "SELECT COUNT(*) FROM dbstat",
    "SELECT load_extension('harm')",
    "SELECT readfile('harm')",
    "SELECT writefile('harm.db', 'x')",
    "SELECT sqlite_version()",
    "SELECT randomblob(5)",
    "SELECT zeroblob(5)",
    "SELECT printf('%99999999d', 1)",
    "SELECT replace('a', 'a', 'aa')",
    "SELECT hex('a')",
    "SELECT ?",
    "SELECT :a",
    "SELECT $x('), (WITH a AS (SELECT 1) SELECT 1 FROM a)",
    "SELECT \"'\" FROM (WITH a AS (SELECT 1) SELECT 1 FROM a) WHERE '\"' = 1",
    "SELECT raise(ABORT, 'x')",
    "SELECT abs(-9223372036854775808)",
    "SELECT CAST(x'ff' AS TEXT)",
    "SELECT 'a' LIKE '%aaaaaaaaaaaaaaaaaaaaaaaaaaaa'",
    "SELECT 1\0",
    "SELECT '\ud800'",
    "SELECT " + "1" * 10_000,
    "SELECT '" + "é" * 900 + "'",
    "SELECT " + "(" * 400 + "1" + ")" * 400,
    "SELECT " + "-" + "+-" * 400 + "1",
    "SELECT " + "*, " * 100 + "* FROM orders",
    "/*" * 400,
    "'" * 901,
    "",
    ";",
    "-- SELECT",
    None,
    5,
    b"SELECT 1",
    ["SELECT 1"],
]


@pytest.mark.parametrize("query", ALLOWED)
def test_ordinary_queries_run(query):
    assert run_query(ORDERS, query)


@pytest.mark.parametrize("query", FORBIDDEN, ids=lambda query: repr(query)[:50])
def test_forbidden_queries_are_refused_and_leave_no_trace(query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = run_query(ORDERS, "SELECT * FROM orders")
    with pytest.raises(QueryError) as caught:
        run_query(ORDERS, query)
    assert str(caught.value)
    assert run_query(ORDERS, "SELECT * FROM orders") == before == list(ORDERS.tables[0].rows)
    assert not list(tmp_path.iterdir())


FIVE = "t a, t b, t c, t d, t e"
LONG = "(SELECT group_concat('" + "a" * 79 + "') FROM t)"  # nearly the longest allowed value
EACH = LONG + "||a.n||b.n||c.n||d.n||e.n"  # a new one in every row


def doubled(levels: int) -> str:
    ctes = "".join(f", c{i} AS (SELECT 1 FROM c{i - 1}, c{i - 1})" for i in range(1, levels))
    return f"WITH c0 AS (SELECT 1){ctes} SELECT 1 FROM c{levels - 1}"


def substituted(levels: int) -> str:
    inner = "(SELECT n a FROM t)"
    for _ in range(levels):
        inner = f"(SELECT a IN ({', '.join(['a'] * (700 // levels // 3))}) a FROM {inner})"
    return f"SELECT a FROM {inner}"


BOMBS = {
    "cross join": f"SELECT COUNT(*) FROM {FIVE}, t f, t g",
    "rows": f"SELECT 1 FROM {FIVE}",
    "wide rows": f"SELECT {LONG}, {LONG}, {LONG} FROM t a, t b",
    "one long text": f"SELECT group_concat(a.s) FROM {FIVE}",
    "sorter": f"SELECT {EACH} FROM {FIVE} ORDER BY 1 DESC",
    "sorter, no case": f"SELECT {EACH} FROM {FIVE} ORDER BY 1 COLLATE NOCASE",
    "sorter, long texts": f"SELECT {LONG.replace('FROM t', 'FROM t x, t y')}||a.n||b.n FROM {FIVE} ORDER BY 1, c.n",
    "long query": "SELECT " + "[" * 120_000,
    "distinct": f"SELECT COUNT(DISTINCT {EACH}) FROM {FIVE}",
    "in": f"SELECT 1 WHERE 'x' IN (SELECT {EACH} FROM {FIVE})",
    "window": f"SELECT group_concat({LONG}) OVER (ORDER BY a.n) FROM {FIVE}",
    "like": f"SELECT SUM({EACH} LIKE '%aaaaaaaaaaaaaaaaax') FROM {FIVE}",
    "glob": f"SELECT SUM({EACH} GLOB '*[a-z]*[a-z][a-z]9x') FROM {FIVE}",
    "offset": f"SELECT 1 FROM {FIVE}, t f LIMIT 1 OFFSET 1000000000",
    "recursion": "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r",
    "hidden recursion": "SELECT * FROM (WITH r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT x FROM r)",
    "laughs": doubled(22),
    "hidden laughs": f"SELECT * FROM ({doubled(21)})",
    "wide laughs": "SELECT * FROM (WITH x AS (VALUES(1))"
    + "".join(f", {new} AS (SELECT 1 FROM {','.join([old] * 60)})" for new, old in ("yx", "zy"))
    + f" SELECT 1 FROM {','.join(['z'] * 60)})",
    "substitution, 2 levels": substituted(2),
    "substitution, 4 levels": substituted(4),
    "substitution, 8 levels": substituted(8),
    "many tables": "SELECT 1 FROM " + ",".join(["t"] * 200),
    "planner": "SELECT 1 FROM "
    + ",".join(f"t t{i}" for i in range(40))
    + " WHERE "
    + " AND ".join(f"t{i}.n=t{i + 1}.n+{i}" for i in range(38)),
    "blob": "SELECT hex(zeroblob(1000000000))",
}
GUARDED = """
import resource, sys
from sandbox import Database, QueryError, Table, run_query
table = Table("t", (("n", "INTEGER"), ("s", "TEXT")), tuple((i, f"text {i}") for i in range(24)))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    run_query(Database((table,)), sys.argv[1])
except QueryError as error:
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("refused:", int(peak) // 1024, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_within_four_seconds_and_150_megabytes(name):
    """In a process of its own, whose processor time, address space and files are bounded."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, BOMBS[name]],
        cwd=ROOT / "lorakit" / "tasks" / "sql",  # it needs nothing else of lorakit: no memory of torch is counted
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-300:]
    assert done.stdout.startswith("refused: "), done.stdout
    assert "disk" not in done.stdout  # it may write no file, and has not tried
    assert int(done.stdout.split()[1]) < 150  # MB, of which Python itself takes about 20


def test_steps_are_counted_over_all_rows_of_a_query():
    query = "SELECT a.qty FROM orders a, orders b LIMIT 500"
    assert len(run_query(ORDERS, query, max_steps=5_000)) == 500
    with pytest.raises(QueryError, match="interrupted"):
        run_query(ORDERS, query, max_steps=500)


def test_rows_and_bytes_of_the_result_are_limited():
    query = "SELECT customer FROM orders"
    assert len(run_query(ORDERS, query, max_rows=24)) == 24
    with pytest.raises(QueryError, match="at most 23 rows"):
        run_query(ORDERS, query, max_rows=23)
    with pytest.raises(QueryError, match="50 bytes"):
        run_query(ORDERS, query, max_bytes=50)


def test_odd_names_in_a_readers_database():
    table = Table('my "table"', (("a b", "TEXT"), ("select", "INTEGER")), (("x", 1), (None, 2)))
    assert run_query(Database((table,)), 'SELECT "a b", "select" FROM "my ""table"""') == [("x", 1), (None, 2)]


def test_threads_do_not_disturb_each_other():
    items = items_of("iid")[:64]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda item: rows_of.__wrapped__(item.table, item.answer, 0), items))
    assert parallel == [rows_of(item.table, item.answer, 0) for item in items]


KEYWORDS = [
    "SELECT",
    "FROM",
    "WHERE",
    "GROUP BY",
    "ORDER BY",
    "LIMIT",
    "DISTINCT",
    "COUNT",
    "WITH",
    "AS",
    "UNION",
    "LIKE",
]
NAMES = ["orders", "customer", "city", "qty", "replace", "max", "'Oslo'", "1", "1e9", "x'00'", "(*)"]
SIGNS = ["(", ")", ",", ";", "'", '"', "--", "/*", "=", "<", "||", "%", "\0", "\ud800"]
FRAGMENTS = st.sampled_from(KEYWORDS + NAMES + SIGNS)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text().map(lambda text: "SELECT " + text),
        st.lists(FRAGMENTS, max_size=14).map(lambda parts: "SELECT " + " ".join(parts)),
        st.tuples(st.sampled_from(ALLOWED), st.integers(0, 90), st.integers(0, 20), st.text(max_size=6)).map(
            lambda edit: edit[0][: edit[1]] + edit[3] + edit[0][edit[1] + edit[2] :]
        ),
    )
)
@example("SELECT")
@example("SELECT FROM")
def test_any_text_gives_rows_or_a_query_error(query):
    try:
        rows = run_query(ORDERS, query)
    except QueryError:
        return
    assert all(isinstance(row, tuple) for row in rows)
    assert execution_accuracy([one_item("SELECT city FROM orders")], [query]) in ([True], [False])
