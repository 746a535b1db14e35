"""Queries like those of a model that has nearly understood, and names as a comparison sees them."""

import re

FUNCTIONS = ("AVG", "SUM", "MAX", "MIN", "COUNT")
ARTICLES = {"a", "an", "the"}


def wrong_answers(answer, schema, words):
    """Other functions, columns, comparisons, limits and values, and parts left out.

    Args:
        answer: the right query.
        schema: the table as a prompt shows it.
        words: text column -> its words.
    """
    columns = re.findall(r"\w+", schema)[1:]
    wrong = {re.sub(rf"\b{name}\b", new, answer) for name in FUNCTIONS[:4] for new in FUNCTIONS}
    wrong |= {re.sub(rf"\b{name}\b", new, answer) for name in columns for new in columns}
    if answer.startswith("SELECT COUNT(*)") and "WHERE" not in answer:
        wrong |= {answer.replace("COUNT(*)", f"COUNT(DISTINCT {name})") for name in columns}
    wrong |= {answer.replace("COUNT(*)", name) for name in columns}
    wrong |= {re.sub(" [<>] ", f" {new} ", answer) for new in ("<", ">", "<=", ">=", "=", "!=")}
    wrong |= {re.sub(r"LIMIT (\d+)", lambda m, step=step: f"LIMIT {int(m[1]) + step}", answer) for step in (-1, 1)}
    wrong |= {re.sub(f" {part}.*", "", answer) for part in ("WHERE", "ORDER BY", "LIMIT", "GROUP BY")}
    wrong |= {answer.replace(" DESC", ""), answer.replace("DISTINCT ", ""), answer.replace("COUNT(*)", "*")}
    if value := re.search(r"(\w+) = '([^']+)'", answer):
        wrong |= {answer.replace(f"'{value[2]}'", f"'{word}'") for word in words[value[1]]}
    return wrong - {answer}


def skeleton(template):
    """A sentence pattern in small letters, its slots marks, without punctuation and articles."""
    bare = re.sub(r"{\w+}", " # ", template.lower())
    return tuple(word for word in re.findall(r"#|[\w<>=]+", bare) if word not in ARTICLES)
