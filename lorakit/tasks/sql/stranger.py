"""Questions that somebody outside the course wrote, on tables of theirs: reported only, see `data/sql/stranger`."""

import hashlib
import json
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

from lorakit._atomic import write_atomically
from lorakit.tasks.sql.files import databases_json, read_items
from lorakit.tasks.sql.questions import Item
from lorakit.tasks.sql.rows import Domain, make_databases
from lorakit.tasks.sql.sandbox import Database

CARD = """# A stranger's questions: data card

{items} questions on {tables} tables, to see what a training on the course's own sentences is worth on somebody else's.

- **Who and when**: written by somebody outside the course, who had seen its sentence patterns and wrote others; before
  2026-11-26, after the training of lesson 00 was fixed. No model was asked meanwhile, and no question was changed after
  a score.
- **Rule**: reported only. Nothing is trained, tuned, chosen or adjusted on them, and none of their sentence patterns,
  table names or column names stands in a training or validation split of the task's second edition (a test compares
  them).
- **Licence**: Apache-2.0, like the code.
- **What they are**: the eight query shapes of level 1, {frames} sentence patterns. Of the tables half are `plain`
  (four columns with names of one word, as the course's), half `wide` (three to seven columns, snake_case, some values
  of two words).

| shape | questions | plain | wide |
|---|---|---|---|
{shapes}

## Files

`lorakit.load_sql("stranger")` reads the questions; `stranger.jsonl` has the fields of the other splits and `kind`.
`tables.json` is the stranger's too: for each column its words, or the smallest and largest number.
`databases.json` is made from it by the course's generator (`lorakit.tasks.sql.stranger.write`), in the form of the
other splits': three populations a table, every word in each; the eleven largest numbers of a column differ, so that no
ranking has ties; every number that a question compares with stands in one of them.

| file | bytes | sha256 |
|---|---|---|
{checksums}
"""
FOLDER = Path(__file__).resolve().parents[3] / "data" / "sql" / "stranger"


def stranger_items() -> list[Item]:
    """The 256 questions, in the order of their file.

    Raises:
        FileNotFoundError: the course's repository is not there.
    """
    return read_items(_folder(), "stranger")


def stranger_tables() -> dict[str, dict[str, Domain]]:
    """Table -> column -> its words or its range, as the stranger wrote them.

    Raises:
        FileNotFoundError: the course's repository is not there.
    """
    tables = json.loads((_folder() / "tables.json").read_text(encoding="utf-8"))
    return {
        table: {
            column: tuple(domain) if isinstance(domain, list) else range(domain["min"], domain["max"] + 1)
            for column, domain in columns.items()
        }
        for table, columns in tables.items()
    }


@cache
def stranger_databases() -> dict[str, list[Database]]:
    """Table -> its populations, from the course's generator; each threshold of a question stands in one of them."""
    bounds: dict[str, dict[str, list[int]]] = {}
    for item in stranger_items():
        if match := re.search(r"(\w+) [<>] (\d+)$", item.answer):
            asked = bounds.setdefault(item.table, {}).setdefault(match[1], [])
            asked.append(int(match[2]))
    return {table: make_databases(table, columns, bounds.get(table)) for table, columns in stranger_tables().items()}


def write(folder: str | os.PathLike = FOLDER) -> None:
    """Writes the populations and the card beside the stranger's two files.

    Args:
        folder: where these lie.
    """
    lines = [json.loads(line) for line in (_folder() / "stranger.jsonl").read_bytes().split(b"\n") if line.strip()]
    kinds = Counter((line["shape"], line["kind"]) for line in lines)
    files = {name: (_folder() / name).read_bytes() for name in ("stranger.jsonl", "tables.json")}
    files["databases.json"] = databases_json(stranger_databases()).encode()
    card = CARD.format(
        items=len(lines),
        tables=len(stranger_tables()),
        frames=len({line["template"] for line in lines}),
        shapes="\n".join(
            f"| {shape} | {sum(each)} | {each[0]} | {each[1]} |"
            for shape in sorted({shape for shape, _ in kinds})
            for each in [(kinds[shape, "plain"], kinds[shape, "wide"])]
        ),
        checksums="\n".join(
            f"| `{name}` | {len(text)} | `{hashlib.sha256(text).hexdigest()}` |" for name, text in files.items()
        ),
    )
    write_atomically({Path(folder) / name: text for name, text in (files | {"README.md": card.encode()}).items()})


def _folder() -> Path:
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"expected the course's repository around lorakit, got no folder {FOLDER}")
    return FOLDER
