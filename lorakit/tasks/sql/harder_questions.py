"""Draws the questions of the harder levels, whose number is too large for a list of them all."""

import random
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from lorakit.tasks.sql import level_1 as words
from lorakit.tasks.sql import levels_2_to_4 as harder
from lorakit.tasks.sql.questions import (
    FILLINGS,
    GIVEN,
    Item,
    belongs,
    make_item,
    populations,
    slots_of,
    tables_of,
    templates_of,
)
from lorakit.tasks.sql.sandbox import run_query
from lorakit.tasks.task import shuffled

TRIES = 1_000  # at one more question of a shape
SIMPLER = (r" (AND|OR) [^()]+?(?= GROUP|$)", r"(?<=WHERE )[^()]+? (AND|OR) ", r" WHERE [^()]*(?=\))")  # is cut out
COMPARED = re.compile(r" [<>] ")
FUNCTION = re.compile(rf"\b({'|'.join(words.FUNCTIONS)})\(")


def harder_questions(split: str, level: int, n: int, rng: random.Random) -> list[Item]:
    """Draws n different questions of levels 1 to `level`, in equal shares of the shapes as far as they reach.

    Level 4 shows two tables with every question. Each query finds rows on every population, and none of its
    `lookalikes` finds the same.

    Raises:
        ValueError: there are not so many.
    """
    shapes = [s for each in harder.LEVELS[:level] for s in each if split != "values" or GIVEN.search(s.sql)]
    found: dict[str, Item] = {}
    while len(found) < n and shapes:
        for shape in list(shapes)[: n - len(found)]:
            drawn = (_draw(shape, split, level, rng) for _ in range(TRIES))
            fit = (item for item in drawn if item.prompt not in found and belongs(item, split) and _tells(item))
            item = next(fit, None)
            if item is None:
                shapes.remove(shape)
            else:
                found[item.prompt] = item
    if len(found) < n:
        raise ValueError(f"expected n up to about {len(found)}, the questions of {split!r} at level {level}, got {n}")
    return shuffled(found.values(), rng)


def _draw(shape: words.Shape, split: str, level: int, rng: random.Random) -> Item:
    def one(things: Iterable) -> Any:
        things = list(things)
        return things[int(rng.random() * len(things))]

    template, chosen = one(templates_of(shape, split)), {"table": one(tables_of(split))}
    for slot in slots_of(shape, template):
        chosen[slot] = one(FILLINGS[slot](chosen, split == "values"))
    return make_item(shape, template, chosen, joined=level == len(harder.LEVELS))


def lookalikes(query: str) -> Iterator[str]:
    """Queries that ask for less, or for something else: one condition, the other comparison, another function."""
    for pattern in SIMPLER:
        yield re.sub(pattern, "", query)
    yield query.replace(" AND ", " OR ")
    yield query.replace(" OR ", " AND ")
    yield COMPARED.sub(lambda sign: " > " if sign[0] == " < " else " < ", query)
    for name in (*words.FUNCTIONS, "COUNT"):
        yield FUNCTION.sub(f"{name}(", query)


def _tells(item: Item) -> bool:
    rows = _found(item.table, item.answer)
    if not all(rows) or not any(cell for found in rows for row in found for cell in row):
        return False
    return all(near == item.answer or _found(item.table, near) != rows for near in lookalikes(item.answer))


@lru_cache(10_000)
def _found(table: str, query: str) -> list[list]:
    return [sorted(run_query(database, query), key=repr) for database in populations(table)]
