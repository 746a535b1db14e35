"""The stranger's questions: as they came, with populations on which wrong queries show, and a true card."""

import hashlib
import json
import re
from collections import Counter

import pytest
from helpers.queries import wrong_answers

from lorakit import SQL, execution_accuracy, load_sql
from lorakit.tasks.sql import stranger
from lorakit.tasks.sql.rows import RANKED, ROWS
from lorakit.tasks.sql.sandbox import QueryError, run_query
from lorakit.tasks.sql.task import load_databases, populations, same_rows

ITEMS = load_sql("stranger")
TABLES = stranger.stranger_tables()


def test_they_are_read_as_any_split():
    assert len(ITEMS) == len({item.prompt for item in ITEMS}) == 256
    assert len(TABLES) == 12
    assert len({item.template for item in ITEMS}) == 64
    assert ITEMS == load_sql("stranger", stranger.FOLDER) == SQL.items("stranger")
    assert SQL.items("stranger", 5) == ITEMS[:5]
    for item in ITEMS:
        assert item.schema == f"{item.table}({', '.join(TABLES[item.table])})"
    with pytest.raises(ValueError, match="n up to 256"):
        SQL.items("stranger", 257)


def test_every_answer_finds_rows_and_is_right():
    assert all(run_query(database, item.answer) for item in ITEMS for database in populations(item.table))
    assert all(execution_accuracy(ITEMS, [item.answer for item in ITEMS]))


def found(database, query):
    try:
        return run_query(database, query)
    except QueryError:
        return None


def test_wrong_answers_differ_on_some_population():
    tried = 0
    for item in ITEMS:
        words = {column: each for column, each in TABLES[item.table].items() if isinstance(each, tuple)}
        for wrong in wrong_answers(item.answer, item.schema, words):
            tried += 1
            pairs = [(run_query(d, item.answer), found(d, wrong)) for d in populations(item.table)]
            ordered = "ORDER BY" in item.answer
            assert any(other is None or not same_rows(one, other, ordered) for one, other in pairs), (item, wrong)
    assert tried > 5 * len(ITEMS)


@pytest.mark.parametrize("table", TABLES)
def test_a_population_has_every_word_and_no_tie_where_it_is_ranked(table):
    databases = populations(table)
    assert [len(database.tables[0].rows) for database in databases] == list(ROWS)
    for i, (column, domain) in enumerate(TABLES[table].items()):
        columns = [[row[i] for row in database.tables[0].rows] for database in databases]
        for cells in columns:
            assert set(cells) <= set(domain)
            if isinstance(domain, tuple):
                assert set(cells) == set(domain), column
            else:
                top = sorted(cells)[-min(RANKED + 1, len(domain)) :]
                assert len(set(top)) == len(top)
                assert len(set(cells)) < len(cells)  # so that counting different numbers is not counting rows
        if isinstance(domain, tuple):
            assert max(Counter(tuple(cells.count(word) for cells in columns) for word in domain).values()) == 1


def test_each_threshold_stands_in_a_population():
    for item in ITEMS:
        if match := re.search(r"(\w+) [<>] (\d+)$", item.answer):
            place = list(TABLES[item.table]).index(match[1])
            assert any(int(match[2]) == row[place] for d in populations(item.table) for row in d.tables[0].rows)


def test_files_and_card_are_what_the_generator_makes(tmp_path):
    stranger.write(tmp_path)
    for path in stranger.FOLDER.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert load_databases(tmp_path) == {table: populations(table) for table in TABLES}
    card = (tmp_path / "README.md").read_text()
    sums = re.findall(r"^\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
    assert len(sums) == 3
    for name, size, digest in sums:
        content = (stranger.FOLDER / name).read_bytes()
        assert (int(size), digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_what_the_stranger_wrote_is_untouched():
    digests = {
        "stranger.jsonl": "8261edcd96a545b6cd88a378bb3191217bca13ee0659626df05186bfa48e8f44",
        "tables.json": "a524b700bc6f069fe408ddc511daf99012c7015c772aa12f79e3f0b47628614d",
    }
    for name, digest in digests.items():
        assert hashlib.sha256((stranger.FOLDER / name).read_bytes()).hexdigest() == digest
    assert set(json.loads((stranger.FOLDER / "tables.json").read_text())) == {item.table for item in ITEMS}


def test_without_the_repository_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(stranger, "FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="the course's repository around lorakit"):
        load_sql("stranger")
