"""Training data as people keep it: JSON lines with a prompt and its completion, or with a conversation."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit._paths import as_path

Message = Mapping[str, Any]  # role and content, as chat templates take them
FIRST = ("system", "developer")  # roles that say what the conversation is to be
ASSISTANT = "assistant"
TURNS = ("all", "last")  # which of a conversation's turns are learned


@dataclass(frozen=True)
class Row:
    """One row: `prompt` and `completion` if it is a plain pair, else `messages`.

    Args:
        number: of its line, from 1.
        prompt, completion: None of a conversation.
        messages: empty of a plain pair.
        given: how many of the messages are the prompt; None if every assistant's turn is to be learned.
        tools: the functions that a conversation may call, as JSON schemas.
        settings: of the chat template, such as `{"enable_thinking": False}`.
        utf8: whether the line was UTF-8; bytes that were not are U+FFFD here.
    """

    number: int
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] = ()
    given: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
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

    @property
    def learned(self) -> list[int]:
        """Which of the messages are to be learned: the assistant's behind those that are given."""
        return [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT and i >= (self.given or 0)]

    def last_learned(self) -> "Row":
        """The row of whose turns the last that is to be learned is learned alone."""
        return replace(self, given=self.learned[-1]) if self.learned else self

    def without_oldest(self) -> "Row | None":
        """The row without its first question and what follows up to the next; None if no more would be learned, or not
        all of a completion. What the system says stays."""
        start = next((i for i, message in enumerate(self.messages) if message["role"] not in FIRST), 0)
        later = [i for i, message in enumerate(self.messages) if i > start and message["role"] == "user"]
        if not later or not self.learned or later[0] > (self.learned[-1] if self.given is None else self.given):
            return None
        given = None if self.given is None else self.given - (later[0] - start)
        return replace(self, messages=self.messages[:start] + self.messages[later[0] :], given=given)


def texts_of(message: Message) -> list[str]:
    """A message's texts: one, or those of its parts, as vision models have them."""
    content = message.get("content")
    return [str(part.get("text", "")) for part in content] if isinstance(content, list) else [content or ""]


def text_of(message: Message) -> str:
    """A message's text; of parts, their texts together."""
    return "".join(texts_of(message))


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a .jsonl file, each as `row_of` takes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is none of these, or there is no row.
    """
    path, rows = as_path("a file of rows", path), []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        text = line.decode("utf-8", errors="replace")
        try:
            rows.append(_row(json.loads(text), number, text.encode() == line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"expected an object with prompt and completion, or messages, in {path}, line {number}: {said}"
            ) from None
    if not rows:
        raise ValueError(f"expected rows in {path}, got none")
    return rows


def row_of(found: Any) -> Row:
    """A row from a mapping: `prompt` and `completion`, texts or lists of messages, or `messages`.

    Beside messages there may be `tools`, a list of JSON schemas or that list as JSON, and `chat_template_kwargs`. These
    are the words of TRL's data sets.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _row(found, 1, utf8=True)
    except (ValueError, KeyError, TypeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"expected a row with prompt and completion, or messages, got {said}") from None


def in_chat(row: Row) -> Row:
    """A plain pair as a conversation of one question and its answer; others as they are."""
    if row.messages:
        return row
    turns = ({"role": "user", "content": row.prompt}, {"role": ASSISTANT, "content": row.completion})
    return Row(row.number, messages=turns, given=1, utf8=row.utf8)


def _row(found: Any, number: int, utf8: bool) -> Row:
    if not isinstance(found, Mapping):
        raise TypeError(f"a {type(found).__name__}")
    tools, settings = found.get("tools") or (), found.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError("tools is no list of JSON schemas")
    if not isinstance(settings, Mapping):
        raise TypeError("chat_template_kwargs is no object")
    more: dict[str, Any] = {"tools": tuple(tools), "settings": settings, "utf8": utf8}
    if "messages" in found:
        return Row(number, messages=_messages(found["messages"], "messages"), **more)
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": ASSISTANT, "content": completion}]
        given = _messages(prompt, "prompt")
        return Row(number, messages=given + _messages(completion, "completion"), given=len(given), **more)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise TypeError("prompt and completion are texts, or lists of messages")
    return Row(number, _whole(prompt), _whole(completion), utf8=utf8)


def _messages(found: Any, what: str) -> tuple[Message, ...]:
    if not (isinstance(found, list) and found and all(map(_is_message, found))):
        raise TypeError(f"{what} is no list of messages with role and content")
    return tuple(_mended(message) for message in found)


def _is_message(found: Any) -> bool:
    if not (isinstance(found, Mapping) and isinstance(found.get("role"), str)):
        return False
    content = found.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else ()
    return isinstance(content, str | list | None) and all(isinstance(part, Mapping) for part in parts)


def _mended(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": _whole(content)} if isinstance(content, str) else message


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
