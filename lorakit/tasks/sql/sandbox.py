"""Runs one untrusted SQL query on a throw-away sqlite3 database, within fixed limits of rights, steps and memory.

A language model writes the query, so it may be anything. Four fences, from the outside in:

1. the text: short, one statement, begins with SELECT, no WITH and few SELECTs (sqlite copies a named or nested query
   for each use of it: a few lines of them multiply past any memory before the first step is counted);
2. the rights: an authorizer that knows only SELECT, the columns of the given tables and a list of harmless functions;
3. the work: a number of virtual machine steps (not seconds: the verdict is the same on every machine), and limits on
   the length of a value, so that no single step is long and the steps together cannot fill the memory;
4. the answer: a number of rows and of bytes.

Each call builds its own copy in memory and drops it: nothing outlives a query, and threads share nothing.
"""

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from functools import partial

Value = str | int | float | bytes | None

AGGREGATES = {"avg", "count", "group_concat", "max", "min", "sum", "total"}
TEXT_FUNCTIONS = {"glob", "length", "like", "lower", "substr", "upper"}
FUNCTIONS = AGGREGATES | TEXT_FUNCTIONS | {"abs", "coalesce", "ifnull", "iif", "nullif", "round"}
MAX_SELECTS = 4
MAX_QUERY_BYTES = 1_000
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 2_000,  # bytes of one value or one sorted row; x max_steps bounds the memory
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_QUERY_BYTES,
    sqlite3.SQLITE_LIMIT_COLUMN: 32,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 40,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 4,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 5_000,  # length of the compiled program
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 8,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 20,  # bytes; a pattern costs pattern x value in one step
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
# sqlite's own lexical rules: quoted text, quoted names, comments and words (a word inside quotes is no keyword)
TOKEN = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|(\w+)|\S""", re.DOTALL)


class QueryError(ValueError):
    """A query that was refused, stopped or wrong; the message is the reason."""


@dataclass(frozen=True)
class Table:
    """One table: its name, its columns as (name, sqlite type) pairs, and its rows."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Database:
    """The tables that a query may read. It is only a description: every query runs on a fresh copy of it."""

    tables: tuple[Table, ...]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _authorize(tables: set[str], action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """What sqlite asks for each thing that a query would do: may it?"""
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and (first or "").lower() in tables)
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _open(database: Database, max_steps: int) -> sqlite3.Connection:
    """A filled in-memory copy of `database`, with all fences up."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for table in database.tables:
        columns = ", ".join(f"{_quoted(name)} {kind}" for name, kind in table.columns)
        connection.execute(f"CREATE TABLE {_quoted(table.name)} ({columns})")
        marks = ", ".join("?" * len(table.columns))
        connection.executemany(f"INSERT INTO {_quoted(table.name)} VALUES ({marks})", table.rows)
    connection.execute("PRAGMA temp_store = MEMORY")  # a large sort never makes a file
    connection.execute("PRAGMA query_only = ON")  # the authorizer forbids writing as well
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    names = {table.name.lower() for table in database.tables}
    connection.set_authorizer(partial(_authorize, names))
    connection.set_progress_handler(lambda: 1, max_steps)  # called after max_steps steps; 1 means stop
    return connection


def _checked(query: object) -> str:
    """The query's text without surrounding white space, if its words may be shown to sqlite at all."""
    if not isinstance(query, str):
        raise QueryError(f"expected the query as str, got {type(query).__name__}")
    if len(query) > MAX_QUERY_BYTES:
        raise QueryError(f"expected at most {MAX_QUERY_BYTES} characters, got {len(query)}")
    words = [token[1].upper() for token in TOKEN.finditer(query) if token[1]]
    if words[:1] != ["SELECT"] or "WITH" in words or words.count("SELECT") > MAX_SELECTS:
        raise QueryError(f"expected one query that begins with SELECT, no WITH, at most {MAX_SELECTS} SELECTs")
    return query.strip()


def run_query(
    database: Database, query: object, *, max_rows: int = 1_000, max_bytes: int = 1_000_000, max_steps: int = 100_000
) -> list[tuple[Value, ...]]:
    """Runs one SELECT that nobody has checked on a copy of `database`.

    Args:
        database: the tables that the query may read.
        query: the model's text; white space around it and one semicolon behind it do not matter.
        max_rows: rows in the result.
        max_bytes: bytes of the result, written as text.
        max_steps: steps of sqlite's virtual machine (one scan of 20 rows takes about 100).

    Returns:
        The rows, in the order in which sqlite gives them.

    Raises:
        QueryError: the query is malformed, not allowed, too costly, or its result too large.
    """
    text = _checked(query)
    with closing(_open(database, max_steps)) as connection:
        try:
            rows: list[tuple[Value, ...]] = []
            size = 0
            for row in connection.execute(text):
                size += sum(len(str(cell).encode()) for cell in row)
                if len(rows) == max_rows or size > max_bytes:
                    raise QueryError(f"expected at most {max_rows} rows and {max_bytes} bytes in the result")
                rows.append(row)
            return rows
        except (sqlite3.Error, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, QueryError):
                raise
            raise QueryError(f"{type(error).__name__}: {error}") from error
