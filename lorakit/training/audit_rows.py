"""Training data as people keep it: JSON lines with a prompt and its completion, or with a conversation."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]  # role and content, as chat templates take them


@dataclass(frozen=True)
class Row:
    """One row: `prompt` and `completion` if it is a plain pair, else `messages`.

    Args:
        number: of its line, from 1.
        prompt, completion: None of a conversation.
        messages: empty of a plain pair.
        given: how many of the messages are the prompt; None if every assistant's turn is to be learned.
        utf8: whether the line was UTF-8; bytes that were not are U+FFFD here.
    """

    number: int
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] = ()
    given: int | None = None
    utf8: bool = True

    @property
    def kind(self) -> str:
        """What kind of row it is, in words."""
        if not self.messages:
            return "plain prompt and completion"
        return "messages" if self.given is None else "prompt and completion in messages"

    @property
    def texts(self) -> list[str]:
        """Every text in it."""
        if self.prompt is not None and self.completion is not None:
            return [self.prompt, self.completion]
        return [text_of(message) for message in self.messages]

    @property
    def question(self) -> str:
        """What is asked, as a key: the prompt, or everything before the last turn."""
        return self.prompt if self.prompt is not None else json.dumps(self.messages[:-1], sort_keys=True)

    @property
    def reply(self) -> str:
        """What is answered, as a key: the completion, or the last turn."""
        return self.completion if self.completion is not None else json.dumps(self.messages[-1:], sort_keys=True)


def text_of(message: Message) -> str:
    """A message's text; of parts, as vision models have them, their texts together."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a .jsonl file: `prompt` and `completion`, texts or lists of messages, or `messages`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is none of these, or there is no row.
    """
    path, rows = Path(path), []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        text = line.decode("utf-8", errors="replace")
        try:
            rows.append(_row(number, json.loads(text), text.encode() == line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"expected an object with prompt and completion, or messages, in {path}, line {number}: {said}"
            ) from None
    if not rows:
        raise ValueError(f"expected rows in {path}, got none")
    return rows


def in_chat(row: Row) -> Row:
    """A plain pair as a conversation of one question and its answer; others as they are."""
    if row.messages:
        return row
    turns = ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})
    return Row(row.number, messages=turns, given=1, utf8=row.utf8)


def _row(number: int, found: Any, utf8: bool) -> Row:
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}")
    if "messages" in found:
        return Row(number, messages=_messages(found["messages"], "messages"), utf8=utf8)
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        given = _messages(prompt, "prompt")
        return Row(number, messages=given + _messages(completion, "completion"), given=len(given), utf8=utf8)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise TypeError("prompt and completion are texts, or lists of messages")
    return Row(number, _whole(prompt), _whole(completion), utf8=utf8)


def _messages(found: Any, what: str) -> tuple[Message, ...]:
    if not (isinstance(found, list) and found and all(map(_is_message, found))):
        raise TypeError(f"{what} is no list of messages with role and content")
    return tuple(_mended(message) for message in found)


def _is_message(found: Any) -> bool:
    if not (isinstance(found, dict) and isinstance(found.get("role"), str)):
        return False
    content = found.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else ()
    return isinstance(content, str | list | None) and all(isinstance(part, dict) for part in parts)


def _mended(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": _whole(content)} if isinstance(content, str) else message


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
