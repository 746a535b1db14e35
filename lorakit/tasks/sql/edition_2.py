"""The second edition of the text-to-SQL task: many ways of asking, many tables of many forms; level 1 only.

How many ways and tables training shows is an argument, so that variety can be studied: `draw("train", 400, frames=5,
tables=14)`. Data: `frames_train`, `frames_held_out` and `tables_2`; rows: `rows`.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

from lorakit._numbers import check_integer
from lorakit._suggest import check_name
from lorakit.tasks.sql import frames_held_out, frames_train, tables_2
from lorakit.tasks.sql.level_1 import LIMITS, SHAPES
from lorakit.tasks.sql.questions import Item, belongs, is_held_out
from lorakit.tasks.sql.rows import Columns, inner, longest_ranking, make_databases
from lorakit.tasks.sql.sandbox import Database
from lorakit.tasks.task import shuffled

SPLIT_SIZES = {"train": 400, "validation": 256, "iid": 256, "values": 256, "ways": 256, "tables": 256}
SPLITS = tuple(SPLIT_SIZES)
SQL = {shape.name: shape.sql for shape in SHAPES}
TRIES = 500  # at one more question of a shape

# SQL -> the words for it; `sign` and `func` are for those who ask in symbols
THAN = {
    ">": ("over", "more than", "above", "greater than", "higher than", "larger than"),
    "<": ("under", "less than", "below", "smaller than", "lower than"),
}
STATS = {
    "AVG": ("average", "mean", "average value of the"),
    "SUM": ("total", "sum of the", "summed", "combined"),
    "MAX": ("highest", "maximum", "largest", "biggest", "greatest", "top"),
    "MIN": ("lowest", "minimum", "smallest", "least"),
}
FUNCS = {
    "AVG": ("avg", "AVG", "mean"),
    "SUM": ("sum", "SUM", "total"),
    "MAX": ("max", "MAX", "maximum"),
    "MIN": ("min", "MIN", "minimum"),
}
NUMERALS = dict(zip(LIMITS, ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], strict=True))


@dataclass(frozen=True)
class Frame:
    """A way of asking: its template, and the function or comparison that it fixes by its words, or ""."""

    template: str
    fixed: str = ""


def read_frames(text: str) -> dict[str, tuple[Frame, ...]]:
    """Shape -> its frames, from the form of `frames_train`."""
    found: dict[str, list[Frame]] = {}
    for line in text.strip().splitlines():
        if line.startswith("["):
            frames = found.setdefault(line.strip("[]"), [])
        elif line:
            fixed, bar, template = line.partition("|")
            frames.append(Frame(template, fixed) if bar else Frame(line))
    return {shape: tuple(frames) for shape, frames in found.items()}


FRAMES = {
    "train": read_frames(frames_train.FRAMES),
    "validation": read_frames(frames_held_out.VALIDATION),
    "ways": read_frames(frames_held_out.WAYS),
}
TABLES = {"train": tables_2.TRAIN, "validation": tables_2.VALIDATION, "tables": tables_2.NEW}


def draw(
    split: str, n: int | None = None, seed: int = 0, frames: int | None = None, tables: int | None = None
) -> list[Item]:
    """Draws n different questions, in equal shares of the shapes as far as they reach.

    Every frame of a shape is used before one is used again, and so are the tables.

    Args:
        split: "train"; "iid", the same with other questions; "values", with words and numbers that train never has;
            "ways", ways of asking that train never has; "tables", other tables; "validation", other tables and other
            ways of asking, to tune on.
        n: number of items; None for the size in `SPLIT_SIZES`.
        seed: other seeds draw other items, and other frames and tables where they are limited.
        frames: ways of asking a shape, for those of train; None for all. The first k of a seed are among its first
            k + 1, the same in all splits that use them.
        tables: how many, for those of train; likewise.

    Raises:
        ValueError: there is no such split, or it has not so many questions, frames or tables.
    """
    check_name("a split of the SQL task's second edition", split, SPLITS)
    n = SPLIT_SIZES[split] if n is None else n
    check_integer("n", n, 0)
    rng, held_out = random.Random(f"2/{split}/{seed}"), split == "values"
    shown = _first(TABLES.get(split, TABLES["train"]), None if split in TABLES and split != "train" else tables, seed)
    decks = {}
    for shape, all_frames in FRAMES.get(split, FRAMES["train"]).items():
        if not held_out or re.search(r"{(value|bound|limit)}", SQL[shape]):
            chosen = _first(all_frames, frames if split not in ("validation", "ways") else None, f"{shape}/{seed}")
            decks[shape] = _deck(chosen, rng), _deck(shown, rng)
    found: dict[str, Item] = {}
    while len(found) < n and decks:
        for shape, (framing, asking) in list(decks.items())[: n - len(found)]:
            frame = next(framing)
            for attempt in range(TRIES):
                item = _item(shape, frame, next(asking), held_out, rng)
                if item and item.prompt not in found and belongs(item, split):
                    found[item.prompt] = item
                    break
                frame = next(framing) if attempt % 20 == 19 else frame
            else:
                del decks[shape]
    if len(found) < n:
        raise ValueError(f"expected n between 0 and about {len(found)}, the questions of {split!r} like these, got {n}")
    return shuffled(found.values(), rng)


def _first(things: Iterable, k: int | None, seed: object) -> list:
    things = list(things)
    if k is not None:
        check_integer("frames or tables", k, 1, len(things))
    return shuffled(things, random.Random(f"2/{seed}"))[:k]


def _deck(things: list, rng: random.Random) -> Iterator:
    while True:
        yield from shuffled(things, rng)


def _item(shape: str, frame: Frame, table: str, held_out: bool, rng: random.Random) -> Item | None:
    """A question of one frame about one table; None if it has no such column, value or number."""
    chosen: dict = {"table": table}
    named = set(re.findall(r"{(\w+)}", SQL[shape] + frame.template))
    for slot, fillings in FILLINGS.items():
        if slot in named:
            options = [each for each in fillings(chosen, held_out) if slot not in FIXABLE or frame.fixed in ("", each)]
            if not options:
                return None
            chosen[slot] = options[int(rng.random() * len(options))]
    schema = f"{table}({', '.join(tables_2.TABLES[table])})"
    question = _typed(frame.template, rng).format(**_spoken(chosen, rng))
    return Item(question, SQL[shape].format(**chosen), schema, table, shape, frame.template)


def _spoken(chosen: dict, rng: random.Random) -> dict:
    """Names as people write them: half the time with blanks; one limit in five as a word."""
    blanks, words = rng.random() < 0.5, rng.random() < 0.2
    names = {slot: chosen[slot].replace("_", " ") for slot in NAMES if slot in chosen and blanks}
    return chosen | names | ({"limit": NUMERALS[chosen["limit"]]} if words and "limit" in chosen else {})


def _typed(template: str, rng: random.Random) -> str:
    """Sentences as people type them: one in five begins with a small letter, one in five lacks its full stop."""
    small, bare = rng.random() < 0.2, rng.random() < 0.2
    template = template[:1].lower() + template[1:] if small else template
    return template.rstrip(".?") if bare else template


def _of_kind(table: str, kind: type) -> list[str]:
    return [column for column, domain in tables_2.TABLES[table].items() if isinstance(domain, kind)]


@cache
def _values(table: str, column: str, held_out: bool) -> tuple[str, ...]:
    words = cast(tuple[str, ...], tables_2.TABLES[table][column])
    cut = len(words) - len(words) // 3
    return words[cut:] if held_out else words[:cut]


def _range(table: str, column: str) -> range:
    return cast(range, tables_2.TABLES[table][column])


@cache
def _bounds(table: str, column: str, held_out: bool) -> tuple[int, ...]:
    """Thresholds that questions about this column use: up to 8, or 4 held out."""
    numbers = [number for number in inner(_range(table, column)) if is_held_out(number) == held_out]
    return tuple(shuffled(numbers, random.Random(f"2/{table}/{column}"))[: 4 if held_out else 8])


def _limits(table: str, column: str, held_out: bool) -> list[int]:
    longest = longest_ranking(_range(table, column))
    return [limit for limit in LIMITS if limit <= longest and is_held_out(limit) == held_out]


# Slot -> its possible fillings, given the slots above it and whether values are the held-out ones.
FILLINGS: dict[str, Callable[[dict, bool], Iterable]] = {
    "text": lambda chosen, held_out: _of_kind(chosen["table"], tuple),
    "number": lambda chosen, held_out: _of_kind(chosen["table"], range),
    "column": lambda chosen, held_out: [c for c in tables_2.TABLES[chosen["table"]] if c not in chosen.values()],
    "value": lambda chosen, held_out: _values(chosen["table"], chosen["text"], held_out),
    "bound": lambda chosen, held_out: _bounds(chosen["table"], chosen["number"], held_out),
    "limit": lambda chosen, held_out: _limits(chosen["table"], chosen["number"], held_out),
    "comparison": lambda chosen, held_out: THAN,
    "than": lambda chosen, held_out: THAN[chosen["comparison"]],
    "sign": lambda chosen, held_out: [chosen["comparison"]],
    "function": lambda chosen, held_out: STATS,
    "stat": lambda chosen, held_out: STATS[chosen["function"]],
    "func": lambda chosen, held_out: FUNCS[chosen["function"]],
}
FIXABLE = ("comparison", "function")
NAMES = ("table", "column", "text", "number")


@cache
def databases(table: str) -> list[Database]:
    """The populations of one of the edition's tables."""
    columns: Columns = tables_2.TABLES[table]
    bounds = {c: _bounds(table, c, False) + _bounds(table, c, True) for c in _of_kind(table, range)}
    return make_databases(table, columns, bounds)
