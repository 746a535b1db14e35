"""Rows for any table: every word in every population, no tie in a ranking, and numbers on both sides of each threshold.

A column is a tuple of words or a range of whole numbers, as in `level_1`, but there may be 3 to 12 words, and fewer
different numbers than rows.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import count

from lorakit.tasks.sql.sandbox import Database, Table
from lorakit.tasks.task import shuffled

Domain = tuple[str, ...] | range
Columns = Mapping[str, Domain]
ROWS = (24, 21, 18)  # in each population of a table
RANKED = 10  # the so many largest numbers of a column, and the one after them, occur once if there are so many


def make_databases(name: str, columns: Columns, bounds: Mapping[str, Sequence[int]] | None = None) -> list[Database]:
    """The three databases of one table on which its queries are compared.

    Args:
        name: the table's.
        columns: column -> its words or its range.
        bounds: column -> numbers that questions compare it with; each stands in some population, so that "more than"
            and "at least" find other rows.
    """
    bounds = bounds or {}
    filled = [
        _words(name, column, domain)
        if isinstance(domain, tuple)
        else _numbers(name, column, domain, bounds.get(column, ()))
        for column, domain in columns.items()
    ]
    kinds = tuple((column, "TEXT" if isinstance(domain, tuple) else "INTEGER") for column, domain in columns.items())
    return [
        Database((Table(name, kinds, tuple(zip(*(column[i] for column in filled), strict=True))),))
        for i in range(len(ROWS))
    ]


def _words(table: str, column: str, words: tuple[str, ...]) -> list[list[str]]:
    """A column of words in each population: no two words are equally frequent in all three."""
    for attempt in count():
        rng = random.Random(f"{table}/{column}/{attempt}")
        cells = [[*words, *(words[int(rng.random() * len(words))] for _ in range(n - len(words)))] for n in ROWS]
        frequencies = {tuple(each.count(word) for each in cells) for word in words}
        if len(frequencies) == len(words):
            return [shuffled(each, rng) for each in cells]
    raise AssertionError("unreachable")


def inner(domain: range) -> range:
    """The numbers with which a column may be compared: every population has smaller and larger ones."""
    margin = max(1, len(domain) // 6)
    return domain[margin:-margin]


def longest_ranking(domain: range) -> int:
    """How many rows a question may ask for in the order of a column, so that no two of them are equal."""
    return min(RANKED, len(domain) - 1)


def _numbers(table: str, column: str, domain: range, bounds: Sequence[int]) -> list[list[int]]:
    """A column of numbers in each population; what repeats is small, and something always does.

    So `COUNT(DISTINCT number)` does not pass for `COUNT(*)`.
    """
    margin = max(1, len(domain) // 6)
    cells = []
    for i, n in enumerate(ROWS):
        rng = random.Random(f"{table}/{column}/{i}")
        ends = [number for end in (domain[:margin], domain[-margin:]) for number in shuffled(end, rng)[:2]]
        numbers = sorted(list(dict.fromkeys([*ends, *bounds[i :: len(ROWS)], *shuffled(domain, rng)]))[: n - 1])
        small = numbers[: max(1, len(numbers) - RANKED - 1)]
        again = [small[k % len(small)] for k in range(n - len(numbers))]
        cells.append(shuffled([*numbers, *again], rng))
    return cells
