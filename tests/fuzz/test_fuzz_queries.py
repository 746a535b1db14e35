"""Whatever a query says, it gives rows or a QueryError, soon and in little memory, and changes nothing."""

import sys
import time
from contextlib import suppress

import pytest
from helpers.fuzz import fuzz
from hypothesis import strategies as st

from lorakit.tasks.sql.sandbox import QueryError, run_query
from lorakit.tasks.sql.task import execution_accuracy, generate, near_misses, populations

KEYWORDS = (
    "SELECT FROM WHERE GROUP BY ORDER LIMIT OFFSET DISTINCT COUNT AVG SUM MAX MIN WITH RECURSIVE AS UNION ALL "
    "EXCEPT LIKE GLOB IN EXISTS NOT BETWEEN CASE WHEN THEN ELSE END JOIN LEFT NATURAL USING ON OVER FILTER CAST "
    "INTERSECT COLLATE NOCASE MATERIALIZED VALUES HAVING ATTACH PRAGMA INSERT DELETE WINDOW"
)
NAMES = (
    "orders customer city price qty a b c rowid sqlite_master group_concat substr upper coalesce printf load_extension "
    "randomblob pragma_table_info json_each"
)
WORDS = f"{KEYWORDS} {NAMES}".split(" ")
SIGNS = [*"(),;'\"`[]=<%*.?", "--", "/*", "*/", ">=", "||", ":a", "@x"]
ATOMS = [
    "1",
    "0",
    "-1",
    "1e9",
    "9223372036854775807",
    "x'00'",
    "'Oslo'",
    "'%a%'",
    "\0",
    "\ud800",
    "é",
    "ſelect",
    "NULL",
]
PARTS = st.lists(st.sampled_from(WORDS + SIGNS + ATOMS), max_size=30).map(" ".join)
NESTED = st.recursive(
    st.sampled_from(["SELECT city FROM orders", "SELECT 1", "SELECT a.qty FROM orders a, orders b", "VALUES (1), (2)"]),
    lambda inner: st.one_of(
        inner.map(lambda q: f"SELECT * FROM ({q})"),
        st.tuples(inner, inner).map(lambda q: f"WITH a AS ({q[0]}) {q[1]}"),
        st.tuples(inner, inner).map(lambda q: f"SELECT city FROM orders WHERE qty IN ({q[0]}) OR EXISTS ({q[1]})"),
        st.tuples(inner, inner).map(lambda q: f"{q[0]} UNION ALL {q[1]}"),
        inner.map(lambda q: f"WITH a AS ({q}) SELECT * FROM a, a AS b, orders"),
    ),
    max_leaves=5,
)
ORDERS = populations("orders")
ITEMS = [item for level in (1, 2, 3) for item in generate("train", 200, level=level) if item.table == "orders"]


def test_queries():
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    before = run_query(ORDERS[0], "SELECT * FROM orders")

    def check(query):
        clock, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with suppress(QueryError):
            assert len(run_query(ORDERS[0], query)) <= 1_000
        assert time.process_time() - clock < 4
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * unit < 150e6
        assert run_query(ORDERS[0], "SELECT * FROM orders") == before

    torn = st.tuples(NESTED, st.integers(0, 90), st.integers(0, 9), PARTS).map(
        lambda edit: edit[0][: edit[1]] + edit[3] + edit[0][edit[1] + edit[2] :]
    )
    fuzz("queries", check, st.one_of(NESTED, PARTS.map("SELECT ".__add__), torn, st.text(max_size=60)), at_once=100)


def test_no_mistake_is_right():
    def check(place):
        item = ITEMS[place]
        misses = near_misses(item)
        assert execution_accuracy([item], [item.answer]) == [True]
        right = execution_accuracy([item] * len(misses), misses)
        assert not any(right), (item.answer, [miss for miss, passes in zip(misses, right, strict=True) if passes])

    fuzz("mistakes", check, st.integers(0, len(ITEMS) - 1), at_once=10)
