"""Runs one untrusted SQL query on a throw-away sqlite3 database, within fixed limits of rights, steps and memory.

A language model writes the query, so it may be anything. Four fences, from the outside in:

1. the text: short, one statement, few SELECTs, and a query that WITH names is used at most once (sqlite copies a named
   query for each use of it: a few lines of them multiply past any memory before the first step is counted);
2. the rights: an authorizer that knows only SELECT, the columns of the given tables and a list of harmless functions.
   It sees what is read, too: a query that reads no table is a constant, and no answer to a question about tables;
3. the work: a number of virtual machine steps (not seconds: the verdict is the same on every machine), and limits on
   the length of a value, so that no single step is long and the steps together cannot fill the memory;
4. the answer: a number of rows and of bytes.

Each call builds its own copy in memory and drops it: nothing outlives a query, and threads share nothing. This file
needs the standard library alone, so that it can run in a process that has little memory.
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


def _authorize(
    tables: set[str], read: set[str], action: int, first: str | None, second: str | None, *_: str | None
) -> int:
    """What sqlite asks for each thing that a query would do: may it? Tables that it reads are added to `read`."""
    if action == sqlite3.SQLITE_READ:
        read.add((first or "").lower())
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and (first or "").lower() in tables)
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _open(database: Database, max_steps: int, read: set[str]) -> sqlite3.Connection:
    """A filled in-memory copy of `database`, with all fences up; what queries read of it is added to `read`."""
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
    connection.set_authorizer(partial(_authorize, names, read))
    connection.set_progress_handler(lambda: 1, max_steps)  # called after max_steps steps; 1 means stop
    return connection


def _checked(query: object) -> str:
    """The query's text without surrounding white space, if its words may be shown to sqlite at all."""
    if not isinstance(query, str):
        raise QueryError(f"expected the query as str, got {type(query).__name__}")
    if len(query) > MAX_QUERY_BYTES:
        raise QueryError(f"expected at most {MAX_QUERY_BYTES} characters, got {len(query)}")
    tokens = [token[0].upper() for token in TOKEN.finditer(query) if not token[0].startswith(("--", "/*"))]
    start = _behind_with(tokens)
    if tokens[start : start + 1] != ["SELECT"] or "WITH" in tokens[1:] or tokens.count("SELECT") > MAX_SELECTS:
        raise QueryError(
            f"expected one query that begins with SELECT, or WITH and names used once, of at most {MAX_SELECTS} SELECTs"
        )
    return query.strip()


def _behind_with(tokens: list[str]) -> int:
    """Where the query behind `WITH name AS (...), ...` begins; 0 if that is not its form, or a name is used twice."""
    if tokens[:1] != ["WITH"]:
        return 0
    names, i = [], 0
    while i == 0 or tokens[i : i + 1] == [","]:
        if not re.fullmatch(r"\w+", "".join(tokens[i + 1 : i + 2])) or tokens[i + 2 : i + 4] != ["AS", "("]:
            return 0
        names.append(tokens[i + 1])
        i, depth = i + 4, 1
        while depth and i < len(tokens):
            depth += {"(": 1, ")": -1}.get(tokens[i], 0)
            i += 1
    plain = [token.strip("'\"`[]") for token, after in zip(tokens, [*tokens[1:], ""], strict=True) if after != "."]
    return i if all(plain.count(name) <= 2 for name in names) else 0


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
        QueryError: the query is malformed, not allowed, too costly, reads no table, or its result is too large.
        ValueError: the database is none, or a limit no integer above 0.
    """
    if not isinstance(database, Database):
        raise ValueError(f"expected a Database, got {type(database).__name__}")
    for name, limit in (("max_rows", max_rows), ("max_bytes", max_bytes), ("max_steps", max_steps)):
        if not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < 2**31:  # which sqlite counts to
            raise ValueError(f"expected {name} as an integer from 1 to {2**31 - 1}, got {limit!r}")
    text, read = _checked(query), set[str]()
    with closing(_open(database, max_steps, read)) as connection:
        try:
            rows: list[tuple[Value, ...]] = []
            size = 0
            found = connection.execute(text)
            if not read:
                raise QueryError("expected a query that reads a table, got a constant")
            for row in found:
                size += sum(len(str(cell).encode()) for cell in row)
                if len(rows) == max_rows or size > max_bytes:
                    raise QueryError(f"expected at most {max_rows} rows and {max_bytes} bytes in the result")
                rows.append(row)
            return rows
        except (sqlite3.Error, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, QueryError):
                raise
            raise QueryError(f"{type(error).__name__}: {error}") from error
