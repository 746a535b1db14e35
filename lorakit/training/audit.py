"""What is wrong with training data, as a tokenizer and a loss see it."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from lorakit._numbers import check_integer
from lorakit._suggest import check_name
from lorakit._words import short
from lorakit.training.audit_tokens import Tokenizer, Tokens, load_tokenizer
from lorakit.training.rows import ASSISTANT, FIRST, TURNS, Row, in_chat, read_rows, text_of

__all__ = ["Audit", "Finding", "audit_data", "load_tokenizer"]
SHOWN = 60  # characters of an example
ODD = re.compile(  # the replacement sign, controls, byte order marks and no characters, UTF-8 read as Latin-1
    "[\ufffd\ufeff\ufffe\uffff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\u00e2\u20ac|[\u00c2\u00c3][\u0080-\u00bf]"
)
ASKING = ("user", "tool", "function", "ipython")


@dataclass(frozen=True)
class Finding:
    """A fault, the rows that have it by their lines' numbers, and what the first of them shows."""

    fault: str
    what: str
    rows: tuple[int, ...]
    example: str = ""

    def __str__(self) -> str:
        number = f"{len(self.rows)} row{'s' * (len(self.rows) > 1)}"
        example = f": {self.example}" if self.example else ""
        return f"{number}: {self.what}, e.g. row {self.rows[0]}{example}"


@dataclass(frozen=True)
class Audit:
    """What a file of training data is, and what is wrong with it."""

    file: str
    facts: Mapping[str, Any]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [
            f"{name.ljust(width)}  {_shown(value)}" for name, value in self.facts.items() if value not in (None, "")
        ]
        return "\n".join([self.file, *(f"  {line}" for line in lines), *map(str, self.findings or ["nothing found"])])

    def as_record(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)


Check = Callable[[Row, Tokens, Tokenizer], str | None]  # what a row shows of a fault, or ''; None if it has not got it


def audit_data(
    data: str | os.PathLike | Iterable[Row],
    tokenizer: Any,
    max_length: int | None = None,
    chat: bool = False,
    turns: str = "all",
) -> Audit:
    """Reads training data as a tokenizer does, and says what a training would make of it.

    Labelled tokens are those that a loss counts, as `encode_row` labels them: the completion of a pair; in a
    conversation the assistant's turns.

    Args:
        data: a .jsonl file for `read_rows`, or rows.
        tokenizer: a transformers tokenizer; `load_tokenizer` gets one without its model.
        max_length: tokens that a row may have; None for no limit.
        chat: puts the tokenizer's chat template around plain pairs.
        turns: of a conversation's turns, "all" are labelled or the "last", as by `encode_row`.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; max_length is below 1, no such turns, or no chat template.
    """
    if max_length is not None:
        check_integer("max_length", max_length)
    if not callable(tokenizer):
        raise ValueError(f"expected a tokenizer, got {short(tokenizer)}")
    if not isinstance(data, Iterable | os.PathLike):
        raise ValueError(f"expected a file or rows, got {short(data)}")
    rows = read_rows(data) if isinstance(data, str | os.PathLike) else list(data)
    if strange := [row for row in rows if not isinstance(row, Row)]:
        raise ValueError(f"expected Rows, as read_rows() gives them, got {short(strange[0])}")
    check_name("turns", turns, TURNS)
    view = Tokenizer(tokenizer)
    if chat and not view.template:
        raise ValueError("expected a tokenizer with a chat template, got one without")
    kinds = Counter(row.kind for row in rows)
    rows = [in_chat(row) for row in rows] if chat else rows
    rows = [row.last_learned() for row in rows] if turns == "last" else rows
    read = [view.read(row) for row in rows]
    found = [*_single(rows, read, view), *_too_long(rows, read, max_length), *_repeated(rows)]
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else "rows"
    return Audit(name, _facts(rows, read, view, max_length, kinds), tuple(found))


def _facts(
    rows: Sequence[Row], read: Sequence[Tokens], view: Tokenizer, max_length: int | None, kinds: Mapping[str, int]
) -> dict[str, Any]:
    lengths = [len(tokens.ids) for tokens in read if tokens.refused is None] or [0]
    labelled, total = sum(sum(tokens.labelled) for tokens in read), sum(lengths)
    talks = [row for row in rows if row.messages]
    method = "the template's generation marks" if view.marked else "prefixes of the conversation"
    facts: dict[str, Any] = {
        "rows": len(rows),
        "kind": ", ".join(kinds) if len(kinds) == 1 else ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "tokens a row": {"least": min(lengths), "median": median(lengths), "most": max(lengths)},
        "labelled": round(labelled / total, 4) if total else 0.0,
        "labels by": method if talks else "the completion",
        "end labelled": sum(_endless(row, tokens, view) is None for row, tokens in zip(rows, read, strict=True)),
        "limit": max_length,
    }
    if talks:
        bare = sum(talk.messages[0]["role"] not in FIRST for talk in talks)
        facts |= {
            "template adds": median(tokens.added for row, tokens in zip(rows, read, strict=True) if row.messages),
            "generation prompt": view.generation_prompt,
            "system turn by default": view.default_system and f"in {bare} rows: {view.default_system}",
        }
    elif view.template:
        facts["chat template"] = "not used: texts as they are"
    return facts


def _single(rows: Sequence[Row], read: Sequence[Tokens], view: Tokenizer) -> list[Finding]:
    """The faults that a row has by itself."""
    seen: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row, tokens in zip(rows, read, strict=True):
        for fault, (_, check) in CHECKS.items():
            if (example := check(row, tokens, view)) is not None:
                seen[fault].append((row.number, example if fault == "refused" else _short(example)))
    return [
        Finding(fault, what, tuple(number for number, _ in seen[fault]), seen[fault][0][1])
        for fault, (what, _) in CHECKS.items()
        if seen[fault]
    ]


def _not_utf8(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    return None if row.utf8 else ""


def _odd(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    for text in row.texts if row.utf8 else ():
        if match := ODD.search(text):
            return ascii(text[max(match.start() - 12, 0) : match.end() + 12])
    return None


def _roles(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    """Told unless a conversation is: a system's turn or none, then questions and answers in turn, at last an answer."""
    roles = [message["role"] for message in row.messages]
    turns = roles[1:] if roles and roles[0] in FIRST else roles
    right = all(
        (role == ASSISTANT and before in ASKING)
        or (role == "user" and before in (None, ASSISTANT))
        or (role in ASKING[1:] and before in (ASSISTANT, *ASKING[1:]))
        for before, role in pairwise([None, *turns])
    )
    return None if not roles or (right and turns and turns[-1] == ASSISTANT) else ", ".join(roles)


def _refused(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    return tokens.refused


def _empty(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    if row.completion is not None:
        replies = [row.completion]
    else:
        turns = [row.messages[i] for i in row.learned]
        replies = [text_of(message) for message in turns if not message.get("tool_calls")]
    for word in view.special:
        replies = [reply.replace(word, "") for reply in replies]
    return "" if any(not reply.strip() for reply in replies) else None


def _unlabelled(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    return None if tokens.refused is not None or any(tokens.labelled) else ""


def _endless(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    """Told if a labelled run ends in something else than an end token and white space."""
    if tokens.refused is not None or not tokens.spans:
        return ""
    for run in tokens.spans:
        solid = [token for token in run if not view.is_blank(token) or token in view.ends]
        if not solid or solid[-1] not in view.ends:
            return repr(view.tokenizer.decode(run[-6:]))
    return None


def _no_end(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    return _endless(row, tokens, view) if tokens.spans else None


def _two_starts(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    ids = view.ids(row.prompt, special=True) if row.prompt is not None else tokens.ids
    return "" if view.bos is not None and ids[:2] == [view.bos] * 2 else None


def _two_ends(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    for place, (one, other) in enumerate(pairwise(tokens.ids)):
        if one == other and one in view.ends:
            return repr(view.tokenizer.decode(tokens.ids[max(place - 4, 0) : place + 2]))
    return None


def _border(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    return tokens.border


def _control(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    texts = [text_of(message) for message in row.messages]
    return next((repr(word) for word in view.special if any(word in text for text in texts)), None)


def _unknown(row: Row, tokens: Tokens, view: Tokenizer) -> str | None:
    if view.unknown is None or view.unknown not in tokens.ids:
        return None
    words = " ".join(row.texts).replace(view.tokenizer.decode([view.unknown]), " ").split()
    return next((repr(word) for word in words if view.unknown in view.ids(word)), None)


CHECKS: dict[str, tuple[str, Check]] = {  # fault -> what it says of rows, and what finds it
    "not-utf8": ("bytes that are not UTF-8", _not_utf8),
    "odd-characters": ("odd characters, as of a broken conversion", _odd),
    "roles": ("roles out of order", _roles),
    "refused": ("the chat template does not take it as it is", _refused),
    "empty": ("an empty completion", _empty),
    "unlabelled": ("no labelled token, nothing to learn", _unlabelled),
    "no-end": ("labels without an end token, so that generation will not stop", _no_end),
    "two-starts": ("a doubled first token (BOS)", _two_starts),
    "two-ends": ("a doubled end token (EOS)", _two_ends),
    "border": ("prompt and completion are other tokens together than apart", _border),
    "control": ("control tokens inside a message's text", _control),
    "unknown": ("words that the tokenizer does not know", _unknown),
}


def _too_long(rows: Sequence[Row], read: Sequence[Tokens], max_length: int | None) -> list[Finding]:
    if max_length is None:
        return []
    long = [(row, tokens) for row, tokens in zip(rows, read, strict=True) if len(tokens.ids) > max_length]
    lost = [row for row, tokens in long if any(tokens.labelled) and not any(tokens.labelled[:max_length])]
    found = []
    if long:
        size = f"{len(long[0][1].ids)} tokens"
        found.append(Finding("too-long", f"above {max_length} tokens, cut off", _numbers(row for row, _ in long), size))
    if lost:
        found.append(Finding("labels-cut", "all labels are beyond that, nothing to learn", _numbers(lost)))
    return found


def _repeated(rows: Sequence[Row]) -> list[Finding]:
    """Rows that were there before, and rows whose question has another answer elsewhere."""
    counts = Counter((row.question, row.reply) for row in rows)
    answers: dict[str, set[str]] = defaultdict(set)
    seen: set[tuple[str, str]] = set()
    again = []
    for row in rows:
        answers[row.question].add(row.reply)
        if (row.question, row.reply) in seen:
            again.append(row)
        seen.add((row.question, row.reply))
    split = [row for row in rows if len(answers[row.question]) > 1]
    found = []
    if again:
        most = max(counts.values())
        found.append(
            Finding("duplicate", f"the same as an earlier row (up to {most} times)", _numbers(again), _about(again))
        )
    if split:
        found.append(Finding("other-answers", "the same prompt has other completions", _numbers(split), _about(split)))
    return found


def _numbers(rows: Iterable[Row]) -> tuple[int, ...]:
    return tuple(row.number for row in rows)


def _about(rows: Sequence[Row]) -> str:
    return _short(repr(rows[0].texts[0]))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return repr(value) if isinstance(value, str) and "\n" in value else f"{value}"
