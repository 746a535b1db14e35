"""Makes every question of the text-to-SQL task, and the rows it is asked about, from `level_1` and `levels_2_to_4`."""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from lorakit._suggest import check_name
from lorakit.tasks.sql import level_1 as words
from lorakit.tasks.sql import levels_2_to_4 as harder
from lorakit.tasks.sql.sandbox import Database, Table
from lorakit.tasks.task import ChatFormat, ChatItem, shuffled

CHATML = ChatFormat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")  # SmolLM2's
POPULATIONS = 3  # databases a table
TABLES = words.TABLES | harder.TABLES


@dataclass(frozen=True)
class Item(ChatItem):
    """One question with its query; `shape`, `template` and `table` say how it was made."""

    chat = CHATML
    question: str
    answer: str
    schema: str
    table: str
    shape: str
    template: str

    @property
    def asked(self) -> str:
        """The user's turn: the schema and the question."""
        return f"{self.schema}\n{self.question}"


def _columns(table: str, kind: type) -> list[str]:
    return [column for column, domain in TABLES[table].items() if isinstance(domain, kind)]


def is_held_out(number: int) -> bool:
    """Whether a number stands in questions of the split `values` only."""
    return number % 5 == words.HELD_OUT_REMAINDER


@cache
def _values(table: str, column: str, held_out: bool) -> tuple:
    """The words (8, or 4 held out) or thresholds (the same numbers) that questions about this column use."""
    domain = TABLES[table][column]
    if isinstance(domain, tuple):
        return domain[8:] if held_out else domain[:8]
    margin = len(domain) // 6  # rows of every population lie in the margins, so that no comparison comes out empty
    inner = [number for number in domain[margin:-margin] if is_held_out(number) == held_out]
    return tuple(shuffled(inner, random.Random(f"{table}/{column}/{held_out}"))[: 4 if held_out else 8])


# Slot -> its possible fillings, given the slots above it and whether values are the held-out ones.
FILLINGS: dict[str, Callable[[dict, bool], Iterable]] = {
    "text": lambda chosen, held_out: _columns(chosen["table"], tuple),
    "number": lambda chosen, held_out: _columns(chosen["table"], range),
    "column": lambda chosen, held_out: [c for c in words.TABLES[chosen["table"]] if c not in chosen.values()],
    "value": lambda chosen, held_out: _values(chosen["table"], chosen["text"], held_out),
    "bound": lambda chosen, held_out: _values(chosen["table"], chosen["number"], held_out),
    "limit": lambda chosen, held_out: [n for n in words.LIMITS if is_held_out(n) == held_out],
    "comparison": lambda chosen, held_out: words.COMPARISONS,
    "than": lambda chosen, held_out: words.COMPARISONS[chosen["comparison"]],
    "function": lambda chosen, held_out: words.FUNCTIONS,
    "stat": lambda chosen, held_out: words.FUNCTIONS[chosen["function"]],
    "other": lambda chosen, held_out: [harder.LINKS[chosen["table"]]],
    "key": lambda chosen, held_out: list(TABLES[chosen["other"]])[:1],
    "mark": lambda chosen, held_out: _columns(chosen["other"], tuple)[1:],
    "label": lambda chosen, held_out: _values(chosen["other"], chosen["mark"], held_out),
    "size": lambda chosen, held_out: _columns(chosen["other"], range),
    "least": lambda chosen, held_out: _values(chosen["other"], chosen["size"], held_out),
}
GIVEN = re.compile(r"{(value|bound|limit|label|least)}")  # slots that the values split fills with words of its own


def slots_of(shape: words.Shape, template: str) -> list[str]:
    """The slots that a question of this phrasing and its query have, in the order of `FILLINGS`."""
    named = set(re.findall(r"{(\w+)}", shape.sql + template))
    return [slot for slot in FILLINGS if slot in named or (slot == "other" and "key" in named)]


def make_item(shape: words.Shape, template: str, chosen: dict, joined: bool) -> Item:
    """The question and query of a choice for every slot; `joined` shows the linked table, too."""
    tables = [chosen["table"], harder.LINKS[chosen["table"]]] if joined else [chosen["table"]]
    schema = "\n".join(f"{table}({', '.join(TABLES[table])})" for table in tables)
    texts = template.format(**chosen), shape.sql.format(**chosen)
    return Item(*texts, schema, ", ".join(tables), shape.name, template)


def _filled(shape: words.Shape, template: str, table: str, held_out: bool) -> Iterator[Item]:
    """All questions that one phrasing can ask about one table."""
    choices = [{"table": table}]
    for slot in slots_of(shape, template):
        choices = [{**chosen, slot: filling} for chosen in choices for filling in FILLINGS[slot](chosen, held_out)]
    for chosen in choices:
        yield make_item(shape, template, chosen, joined=False)


@cache
def questions(split: str) -> tuple[Item, ...]:
    """All questions of a split at level 1. A checksum of the prompt deals out those that train and iid could share."""
    items = [
        item
        for shape in words.SHAPES
        if split != "values" or GIVEN.search(shape.sql)
        for template in templates_of(shape, split)
        for table in tables_of(split)
        for item in _filled(shape, template, table, held_out=split == "values")
    ]
    return tuple(item for item in items if belongs(item, split))


def templates_of(shape: words.Shape, split: str) -> tuple[str, ...]:
    """The phrasings that a split uses."""
    return shape.held_out if split == "phrasings" else shape.train


def tables_of(split: str) -> list[str]:
    """The tables that a split asks about."""
    return [table for table in words.TABLES if (table in words.UNSEEN_TABLES) == (split == "tables")]


def belongs(item: Item, split: str) -> bool:
    """Whether a question may be in a split: train and iid, which could share it, are told apart by a checksum."""
    return split not in ("train", "iid") or (zlib.crc32(item.prompt.encode()) % 4 == 0) == (split == "iid")


def _column_rows(table: str, column: str, population: int) -> list[str | int]:
    """One column of one population, in random order; of a table that others are linked to, each word once.

    In the others word i occurs 1 to 3 times: once more than digit number `population` of i in base 3. So all words have
    rows everywhere, and no two words have the same three counts. Numbers never repeat, so that a ranking has no ties.
    """
    rng = random.Random(f"{table}/{column}/{population}")
    counts = [1 if table in harder.TABLES else 1 + i // 3**population % 3 for i in range(12)]
    domain = TABLES[table][column]
    if isinstance(domain, tuple):
        return shuffled([word for word, count in zip(domain, counts, strict=True) for _ in range(count)], rng)
    margin = len(domain) // 6
    bounds = _values(table, column, False) + _values(table, column, True)
    ends = [shuffled(end, rng)[:2] for end in (domain[:margin], domain[-margin:])]
    numbers = dict.fromkeys([*ends[0], *ends[1], *bounds[population::POPULATIONS], *shuffled(domain, rng)])
    return shuffled(list(numbers)[: sum(counts)], rng)


@cache
def _table(table: str, population: int) -> Table:
    domains = TABLES[table]
    columns = tuple((name, "TEXT" if isinstance(domain, tuple) else "INTEGER") for name, domain in domains.items())
    rows = zip(*(_column_rows(table, name, population) for name in domains), strict=True)
    return Table(table, columns, tuple(rows))


def populations(table: str) -> list[Database]:
    """The databases on which queries about one of the task's tables are compared.

    There are three with other rows, since on a single one a wrong query often gives the right rows by accident.

    Args:
        table: name of a table of the task; "orders, mayors" for one and the table that it is linked to.

    Returns:
        Three databases of 24, 21 and 15 rows; a linked table has 12, one for each word of the shared column.

    Raises:
        ValueError: no such table.

    Source: Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites".
    """
    linked = {f"{one}, {other}": (one, other) for one, other in harder.LINKS.items()}
    check_name("a table of the SQL task", table, [*words.TABLES, *linked])
    return [Database(tuple(_table(name, p) for name in linked.get(table, (table,)))) for p in range(POPULATIONS)]
