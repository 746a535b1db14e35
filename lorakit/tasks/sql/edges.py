"""Databases at a query's own edges, on which a query that is nearly the same finds other rows.

The populations of a table are drawn without knowing what will be asked. `x > 50` and `x >= 50` differ on them only
where a row has 50, `HAVING SUM(x) > 50` only where a group adds up to it, and constants only where the answer changes.

Source: Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites", section 3.2: there the
databases hold the query's numbers and their neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorakit.tasks.sql.sandbox import TOKEN, Database, Table, Value

Row = tuple[Value, ...]
COMPARISONS = {"<", ">", "=", "!"}  # how one begins or ends


def edge_databases(query: str, databases: Sequence[Database]) -> Iterator[Database]:
    """Changed copies of a table's populations, on all of which a right query is right, too.

    The smallest one, where groups are small, is taken with its first row alone, and with one that shares nothing with
    it; with each column that the query compares with a number at one less than that in all rows, at that number, and at
    one more; at 0, as are then its average, sum, maximum and minimum, if it is compared with a query's result; with one
    value in a column that it groups by; and for a query that ranks, with one value in all columns that it does not rank
    by. For a query that does not, each population is taken with every row of its first table several times.

    Args:
        query: the right one, in which each column stands before what it is compared with.
        databases: the populations of its table, the first in each; it has no key, so that its rows may be repeated.
    """
    if not databases:
        return
    small = min(databases, key=lambda database: len(database.tables[0].rows))
    rows = small.tables[0].rows
    for row in [*rows[:1], *[row for row in rows if not set(row) & set(rows[0])][:1]]:
        yield _with_rows(small, [row])
    ranked = _behind("order", query)
    if ranked:
        yield _with_one_value(small, [n.lower() for n, _ in small.tables[0].columns if n.lower() not in ranked])
    else:
        for database in databases:
            yield _with_rows(database, [row for i, row in enumerate(database.tables[0].rows) for _ in range(2 + i % 2)])
    if grouped := _behind("group", query)[:1]:
        yield _with_one_value(small, grouped)
    for column, bound in _compared(query):
        if column not in ranked:  # in which no two may be equal
            for number in (0,) if bound is None else (bound - 1, bound, bound + 1):
                yield _with_number(small, column, number)


def _words(query: str) -> list[str]:
    """Its tokens as sqlite sees them, in small letters; names without their quotes."""
    return [token[0].strip('"`[]').lower() for token in TOKEN.finditer(query)]


def _behind(word: str, query: str) -> list[str]:
    """All words behind the first ORDER BY or GROUP BY; none if there is no such thing."""
    words = _words(query)
    starts = [i for i in range(len(words) - 1) if words[i : i + 2] == [word, "by"]]
    return words[starts[0] + 2 :] if starts else []


def _compared(query: str) -> list[tuple[str, int | None]]:
    """Column and number of each comparison, each once; None for the result of a query."""
    found: dict[tuple[str, int | None], None] = {}
    words, column = _words(query), ""
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word.isdecimal():
            if before not in ("limit", "offset"):
                found[column, -int(word) if before == "-" else int(word)] = None
        elif word == "select" and before == "(" and words[i - 2] in COMPARISONS:
            found[column, None] = None
        elif word[:1].isalpha() and word not in ("and", "between", "in", "not"):
            column = word
    return list(found)


def _with_rows(database: Database, rows: Sequence[Row]) -> Database:
    first, *others = database.tables
    return Database((replace(first, rows=tuple(rows)), *others))


def _with_number(database: Database, column: str, number: int) -> Database:
    """With that number in all rows of the columns of a name, if numbers are what they have."""

    def changed(table: Table) -> Table:
        places = {i for i, (name, _) in enumerate(table.columns) if name.lower() == column}
        cells = [cell for row in table.rows for i, cell in enumerate(row) if i in places]
        if not cells or not all(isinstance(cell, int | float) for cell in cells) or abs(number) >= 2**62:
            return table  # sqlite's numbers have 64 bits
        return replace(
            table, rows=tuple(tuple(number if i in places else c for i, c in enumerate(row)) for row in table.rows)
        )

    return Database(tuple(map(changed, database.tables)))


def _with_one_value(database: Database, columns: Sequence[str]) -> Database:
    """With the first row's values in these columns of every row, except where two tables share a column's name."""
    names = [name.lower() for table in database.tables for name, _ in table.columns]

    def changed(table: Table) -> Table:
        same = [name.lower() in columns and names.count(name.lower()) == 1 for name, _ in table.columns]
        rows = (
            tuple(first if one else cell for cell, first, one in zip(row, table.rows[0], same, strict=True))
            for row in table.rows
        )
        return replace(table, rows=tuple(rows))

    return Database(tuple(map(changed, database.tables)))
