"""The text-to-SQL task: questions over tables, in four levels, five splits, the prompt, execution accuracy on sqlite3.

`lorakit data FOLDER --version 2` writes the data files, the same bytes each time.

Behind this module: `sandbox` runs a query that nobody has checked, `edges` has the databases on which those that are
nearly right fail, `mistakes` writes such, `level_1` and `levels_2_to_4` hold tables, values
and phrasings, `questions` and `harder_questions` combine them to questions and rows, `files` reads and writes. The
second edition is `edition_2`, from `frames_train`, `frames_held_out` and `tables_2`, its rows from `rows`; `stranger`
has what somebody else asked.
"""

import math
import os
import random
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lorakit._numbers import check_integer, check_list
from lorakit._suggest import check_name, near_names
from lorakit._words import short
from lorakit.tasks.sql import edition_2
from lorakit.tasks.sql import level_1 as words
from lorakit.tasks.sql import levels_2_to_4 as harder
from lorakit.tasks.sql import questions as edition_1
from lorakit.tasks.sql.edges import edge_databases
from lorakit.tasks.sql.files import load_databases, read_items, write_files
from lorakit.tasks.sql.harder_questions import harder_questions
from lorakit.tasks.sql.mistakes import near_misses as _near_misses
from lorakit.tasks.sql.questions import CHATML, Item, questions
from lorakit.tasks.sql.sandbox import Database, QueryError, Value, run_query
from lorakit.tasks.sql.stranger import FOLDER, stranger_databases, stranger_items, stranger_tables
from lorakit.tasks.task import Task, paired, shuffled

SPLIT_SIZES = {"train": 400, "iid": 256, "values": 256, "phrasings": 256, "tables": 256}  # items
SPLITS = tuple(SPLIT_SIZES)
__all__ = ["SPLITS", "SPLIT_SIZES", "SQL", "Item", "execution_accuracy", "generate", "load_databases", "load_sql"]
__all__ += ["near_misses", "populations", "same_rows", "sql_task", "write"]


def generate(
    split: str,
    n: int | None = None,
    seed: int = 0,
    level: int = 1,
    *,
    version: int = 1,
    frames: int | None = None,
    tables: int | None = None,
) -> list[Item]:
    """Draws items of one split, in equal shares of the query shapes as far as their distinct questions reach.

    Whatever the seeds and sizes, no prompt of a held-out split occurs in train.

    Args:
        split: one of `SPLITS`; of version 2, of `edition_2.SPLITS`.
        n: number of items; None for the size in `SPLIT_SIZES`.
        seed: other seeds give other items of the same kind.
        level: how hard: 1 has one table and at most one condition, 2 adds two conditions and HAVING, 3 nested queries,
            4 joins of two tables. Each holds the kinds of query of those below it.
        version: the edition: 1 has five ways of asking a shape in training and 14 tables, 2 over forty of both, see
            `edition_2.draw`; 2 has level 1 only.
        frames, tables: of version 2, how many ways of asking a shape and how many tables; None for all.

    Returns:
        n different items in random order.

    Raises:
        ValueError: the split, level or version is unknown, or has fewer than n different questions.
    """
    if version not in (1, 2) or (version == 2 and level != 1):
        raise ValueError(f"expected version 1, or version 2 at level 1, got version {version!r} at level {level!r}")
    if version == 2:
        return edition_2.draw(split, n, seed, frames, tables)
    if frames is not None or tables is not None:
        raise ValueError(f"expected frames and tables with version 2 only, got {frames} and {tables} with version 1")
    check_name("a split of the SQL task", split, SPLITS)
    n = SPLIT_SIZES[split] if n is None else n
    check_integer("n", n, 0)
    if level != 1:
        check_integer("level", level, 1, len(harder.LEVELS))
        return harder_questions(split, level, n, random.Random(f"{split}/{level}/{seed}"))
    pool = questions(split)
    if n > len(pool):
        raise ValueError(f"expected n between 0 and {len(pool)} (the different questions of {split!r}), got {n}")
    rng = random.Random(f"{split}/{seed}")
    by_shape = [shuffled((q for q in pool if q.shape == shape.name), rng) for shape in words.SHAPES]
    dealt = [item for row in zip_longest(*by_shape) for item in row if item is not None]
    return shuffled(dealt[:n], rng)


def _same_cell(left: Value, right: Value) -> bool:
    """Fractions may differ by rounding, whole numbers may not, and 2 equals 2.0."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        if _is_whole(left) and _is_whole(right):
            return left == right
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)
    return type(left) is type(right) and left == right


def _is_whole(number: float) -> bool:
    """Whether it is exact: an int, or a float that is whole and smaller than those that are whole by rounding."""
    return isinstance(number, int) or (number.is_integer() and abs(number) < 2**53)


def _same_row(left: Sequence[Value], right: Sequence[Value]) -> bool:
    return len(left) == len(right) and all(map(_same_cell, left, right))


def same_rows(left: Sequence[Sequence[Value]], right: Sequence[Sequence[Value]], ordered: bool) -> bool:
    """Tells whether two results hold the same rows, equally often.

    Args:
        left: rows of one query.
        right: rows of the other.
        ordered: True compares row by row; False lets the rows stand in any order.

    Returns:
        True for equal results. Column names do not count, the number and order of columns do.

    Raises:
        ValueError: one of them is no list of rows.
    """
    for rows in (left, right):
        check_list("rows", rows)
        for row in rows:
            check_list("values as a row", row)
    if len(left) != len(right):
        return False
    if ordered:
        return all(map(_same_row, left, right))
    remaining = list(right)
    for row in left:
        partner = next((i for i, other in enumerate(remaining) if _same_row(row, other)), None)
        if partner is None:
            return False
        del remaining[partner]
    return True


def _is_right(item: Item, answer: str, databases: Sequence[Database]) -> bool:
    ordered = "ORDER BY" in item.answer.upper()
    for i, database in enumerate(chain(databases, edge_databases(item.answer, databases))):
        try:
            expected = run_query(database, item.answer)
        except QueryError as error:
            raise ValueError(f"expected a query that runs as the answer of {item}, got {error}") from error
        if i >= len(databases) and any(cell is None for row in expected for cell in row):
            continue  # the sum of no rows: there equal queries may differ
        try:
            rows = run_query(database, answer)
        except QueryError:
            return False
        if not same_rows(expected, rows, ordered):
            return False
    return True


def populations(table: str) -> list[Database]:
    """The databases on which queries about one of the task's tables are compared.

    There are three with other rows, since on a single one a wrong query often gives the right rows by accident.

    Args:
        table: name of a table of the task, the stranger's included; "orders, mayors" for one and the table that it is
            linked to.

    Raises:
        ValueError: no such table.

    Source: Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites".
    """
    if not isinstance(table, str):
        raise ValueError(f"expected the name of a table, got {short(table)}")
    if table in edition_2.tables_2.TABLES:
        return edition_2.databases(table)
    if FOLDER.is_dir() and table in stranger_tables():
        return stranger_databases()[table]
    return edition_1.populations(table)


def execution_accuracy(
    items: Sequence[Item], answers: Sequence[str], databases: Mapping[str, Sequence[Database]] | None = None
) -> list[bool]:
    """Tells for each predicted query whether it finds the same rows as the item's own query, on all populations.

    And on changed copies of them at the query's own edges, see `edges.edge_databases`: `>=` is wrong for `>`, whatever
    rows there are. Rows are compared as multisets, and in order only where the item's query has ORDER BY. A prediction
    that fails, is refused or reads no table is wrong.

    Args:
        items: the questions.
        answers: one predicted query an item; untrusted, see `sandbox.run_query`.
        databases: table name -> its populations, for items about other tables than the task's own.

    Returns:
        One bool an item; their mean is the execution accuracy.

    Raises:
        ValueError: the lengths differ, a table is unknown, or an item's own query fails.
    """
    pairs = paired(items, answers)
    for item in items:
        _check_item(item)
    if not isinstance(databases, Mapping | None):
        raise ValueError(f"expected databases by the name of their table, got {short(databases)}")
    known = databases if databases is not None else {table: populations(table) for table in {i.table for i in items}}
    for item in items:
        if not known.get(item.table):
            raise ValueError(f"expected a table with databases, {near_names(item.table, known)}")
    return [_is_right(item, answer, known[item.table]) for item, answer in pairs]


def near_misses(item: Item) -> list[str]:
    """Queries that are nearly the item's own, none of which `execution_accuracy` takes for right; see `mistakes`.

    Args:
        item: of the task's own tables.

    Raises:
        ValueError: its table is unknown.
    """
    _check_item(item)
    return _near_misses(item, populations(item.table))


def _check_item(item: Any) -> None:
    if not isinstance(item, Item):
        raise ValueError(f"expected Items, as generate() draws them, got {short(item)}")


def load_sql(split: str, folder: str | os.PathLike | None = None, version: int = 1) -> list[Item]:
    """Gives one split of the task, generated or read from a folder.

    Args:
        split: one of `SPLITS`, or "stranger" (see `data/sql/stranger`: to report, not to train or choose on); with a
            folder, the name of any .jsonl file in it.
        folder: where to read; None generates the committed data anew.
        version: of the data that is generated; see `generate`.

    Returns:
        The items, in the order of the file.

    Raises:
        ValueError: the split is unknown, or a line is not an item (the message names file and line).
    """
    if folder is None:
        return stranger_items() if split == "stranger" else generate(split, version=version)
    return read_items(folder, split)


def sql_task(level: int = 1, *, version: int = 1, frames: int | None = None, tables: int | None = None) -> Task:
    """The task at one of its levels or in its second edition; see `generate` and `execution_accuracy`."""
    splits = edition_2.SPLITS if version == 2 else SPLITS
    draw = partial(_draw, level=level, version=version, frames=frames, tables=tables)
    return Task("sql", (*splits, "stranger") if level == 1 else splits, draw, execution_accuracy, CHATML)


def _draw(split: str, n: int | None, seed: int, **kind: Any) -> list[Item]:
    if split != "stranger":
        return generate(split, n, seed, **kind)
    items = stranger_items()
    if not 0 <= (n or 0) <= len(items):
        raise ValueError(f"expected n up to {len(items)}, the stranger's questions, got {n}")
    return items[:n]


SQL = sql_task()


def write(folder: str | os.PathLike, version: int = 1) -> None:
    """Writes the data files of an edition and their card, see `files.write_files`.

    Args:
        folder: where to write; made if missing.
        version: the edition, 1 or 2.

    Raises:
        ValueError: there is no such edition.
        OSError: the folder cannot be made, which is tried before the work.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    splits = {split: generate(split, version=version) for split in (edition_2.SPLITS if version == 2 else SPLITS)}
    tables = edition_2.tables_2.TABLES if version == 2 else words.TABLES
    write_files(folder, version, splits, {table: populations(table) for table in tables})
