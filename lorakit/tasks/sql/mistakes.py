"""What somebody writes who has nearly understood a question: the near misses of a query, none of which may be right."""

import re
from collections.abc import Iterator, Sequence

from lorakit.tasks.sql.questions import Item
from lorakit.tasks.sql.sandbox import MAX_QUERY_BYTES, Database, QueryError, run_query

FUNCTIONS = ("AVG", "SUM", "MAX", "MIN", "COUNT")
FUNCTION = re.compile(rf"\b({'|'.join(FUNCTIONS[:4])})\(")
CLAUSE = re.compile(
    r" (WHERE|GROUP BY|HAVING|ORDER BY|LIMIT) [^()]*?(?= (?:WHERE|GROUP BY|HAVING|ORDER BY|LIMIT) |\)|$)"
)
NUMBER = re.compile(r"(?<![\w'.])(?<!LIMIT )\d+(?![\w'.])")


def near_misses(item: Item, databases: Sequence[Database]) -> list[str]:
    """Queries that are nearly an item's own and ask for something else, each once.

    They have another comparison, one that has or lacks the equal, a number or a limit one off, another function or
    column, a word more or less of DISTINCT and DESC, a part left out, AND for OR; or are the rows of one population as
    constants, with and without a table beside them.

    Left out are those that are right in truth: `>= 51` for `> 50`, since the course's numbers are whole; DISTINCT for
    rows that differ anyway, in MAX and MIN, and in a query behind IN; COUNT(column) for COUNT(*), since no cell is
    empty. And AVG(DISTINCT column) beside WHERE and HAVING, where the rows may be too few to differ.

    Args:
        item: with its right query, of the course's shapes.
        databases: the populations of its table.
    """
    query, columns = item.answer, sorted(set(re.findall(r"\w+(?=[,)])", item.schema)))
    found = [
        *_comparisons(query),
        *_functions(query, columns),
        *_other_columns(query, columns),
        *_words(query),
        *(query[: part.start()] + query[part.end() :] for part in CLAUSE.finditer(query)),
        *(re.sub(pattern, "", query) for pattern in (r" (AND|OR) .*", r"(?<=WHERE ).*? (AND|OR) ")),
        *(query.replace(f" {one} ", f" {other} ") for one, other in (("AND", "OR"), ("OR", "AND"))),
        *(text for database in databases for text in _constants(item, database)),
    ]
    return [text for text in dict.fromkeys(found) if text != query and len(text.encode()) <= MAX_QUERY_BYTES]


def _each(pattern: str | re.Pattern, query: str, others: Sequence[str]) -> Iterator[str]:
    """The query with each part that fits the pattern, one at a time, changed to each of the others."""
    for part in re.finditer(pattern, query):
        for other in others:
            yield query[: part.start()] + other + query[part.end() :]


def _comparisons(query: str) -> Iterator[str]:
    for sign, others in (("<", ("<=", ">", ">=", "=", "!=")), (">", (">=", "<", "<=", "=", "!="))):
        yield from _each(f"(?<= ){sign}(?= )", query, others)
    for part in NUMBER.finditer(query):
        for step in (-1, 1):
            yield query[: part.start()] + str(int(part[0]) + step) + query[part.end() :]
    for part in re.finditer(r"(?<=LIMIT )\d+", query):
        for step in (-1, 1):
            yield query[: part.start()] + str(int(part[0]) + step) + query[part.end() :]


def _functions(query: str, columns: Sequence[str]) -> Iterator[str]:
    yield from _each(FUNCTION, query, [f"{name}(" for name in FUNCTIONS])
    distinct = re.search(r"\bSUM\((?!DISTINCT)", query) or (
        not re.search("WHERE|HAVING", query) and re.search(r"\bAVG\(", query)
    )
    if distinct:
        yield query[: distinct.end()] + "DISTINCT " + query[distinct.end() :]
    counted = [f"COUNT(DISTINCT {column})" for column in columns]
    yield from _each(r"COUNT\(\*\)", query, [*counted, "*", *(f"{f}({c})" for f in FUNCTIONS[:4] for c in columns)])


def _other_columns(query: str, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        others = [other for other in columns if other != column]
        yield from _each(rf"(?<!')\b{column}\b(?!')", query, others)
        yield from (re.sub(rf"(?<!')\b{column}\b(?!')", other, query) for other in others)


def _words(query: str) -> Iterator[str]:
    yield query.replace("DISTINCT ", "")
    if not re.match(r"SELECT (DISTINCT|COUNT|AVG|SUM|MAX|MIN)\b", query) and "GROUP BY" not in query:
        yield query.replace("SELECT ", "SELECT DISTINCT ", 1)
    yield query.replace(" DESC", "")
    if "DESC" not in query:
        yield re.sub(r"(ORDER BY \w+)", r"\1 DESC", query)


def _constants(item: Item, database: Database) -> Iterator[str]:
    try:
        rows = run_query(database, item.answer)
    except QueryError:
        return
    values = ", ".join(f"({', '.join(map(_literal, row))})" for row in rows)
    table = item.table.split(", ")[0]
    yield f"SELECT * FROM (VALUES {values})"
    yield f"SELECT * FROM (VALUES {values}) WHERE EXISTS (SELECT * FROM {table})"
    if len(rows) == 1:
        cells = ", ".join(map(_literal, rows[0]))
        yield f"SELECT {cells}"
        yield f"SELECT {cells} FROM {table} LIMIT 1"
        yield f"SELECT MAX({cells}) FROM {table}" if len(rows[0]) == 1 else f"SELECT {cells} FROM {table} GROUP BY 1"


def _literal(cell: object) -> str:
    return "NULL" if cell is None else repr(cell) if not isinstance(cell, str) else "'" + cell.replace("'", "''") + "'"
