"""What every task is: items by split, how they are encoded, how answers are scored, and the chat format around a text.

An item has a `prompt`, what the model reads, and a `completion`, what it must write. Those of a task for chat models
also have `asked`, the user's turn alone, and `answer`, the reply alone, so that any chat format can be put around them.
"""

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorakit._numbers import check_list
from lorakit._paths import as_path
from lorakit._suggest import check_name
from lorakit.training.batch import Example
from lorakit.training.chat import ANSWERED, ASKED, shown
from lorakit.training.encode import encode
from lorakit.training.evaluate import exact_match
from lorakit.training.generate import greedy


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the user's turn and behind the reply.

    Args:
        opening: before the user's turn, with the system's turn if there is one.
        closing: behind it, up to where the reply begins.
        end: ends the reply.
    """

    opening: str
    closing: str
    end: str

    def prompt(self, asked: str) -> str:
        """What the model reads."""
        return f"{self.opening}{asked}{self.closing}"

    def completion(self, answer: str) -> str:
        """What the model must write: the reply and the end of its turn."""
        return f"{answer}{self.end}"

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """The format of a tokenizer's own chat template, its default system turn and first token included.

        What the template puts before every reply, such as empty thoughts, is part of the prompt.

        Raises:
            ValueError: the tokenizer has no chat template, or one that does not show a turn as it is.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("expected a tokenizer with a chat template, got one without: describe it by ChatFormat")
        asked, answer = ASKED["content"], ANSWERED["content"]
        prompt, whole = shown(tokenizer, [ASKED], prompt=True), shown(tokenizer, [ASKED, ANSWERED])
        if whole.count(asked) != 1 or whole.count(answer) != 1 or not whole.startswith(prompt):
            raise ValueError(
                f"expected a chat template that shows each turn once, as its prompt begins it, got {whole!r}"
            )
        before, _, behind = whole.partition(answer)
        opening, closing = before.split(asked)
        return cls(opening, closing, behind.split()[0] if behind.strip() else tokenizer.eos_token or "")


class ChatItem:
    """The texts of an item that has `asked` and `answer`, in its class's format; `Task.chat` puts another around."""

    chat: ClassVar[ChatFormat]
    asked: Any
    answer: Any

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.chat.prompt(self.asked)

    @property
    def completion(self) -> str:
        """What the model must write."""
        return self.chat.completion(self.answer)


def encoded(tokenizer: Any, items: Iterable[Any]) -> list[Example]:
    """Items, or anything else with `prompt` and `completion`, as `fit` and `exact_match` take them.

    Raises:
        ValueError: a text cannot be encoded; see `encode`.
    """
    return [encode(tokenizer, item.prompt, item.completion) for item in items]


@dataclass(frozen=True)
class Task:
    """Items by split, and what makes an answer right.

    Args:
        name: in messages.
        splits: names of the splits.
        draw: (split, n, seed) -> n different items of a split; n is None for as many as usual.
        score: (items, answers) -> for each answer whether it is right.
        chat: the format around `item.asked` and `item.answer`; None takes `item.prompt` and `item.completion` as they
            are. `replace(task, chat=ChatFormat.of(tokenizer))` asks any chat model.
        end: ends an answer where there is no chat format; None for the tokenizer's eos.
    """

    name: str
    splits: tuple[str, ...]
    draw: Callable[[str, int | None, int], list[Any]]
    score: Callable[[Sequence[Any], Sequence[str]], list[bool]]
    chat: ChatFormat | None = None
    end: str | None = None

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Any]:
        """Items of a split.

        Raises:
            ValueError: there is no such split, or there are not so many.
        """
        check_name(f"a split of the task {self.name}", split, self.splits)
        return self.draw(split, n, seed)

    def prompt(self, item: Any) -> str:
        """What the model reads."""
        return self.chat.prompt(item.asked) if self.chat else item.prompt

    def completion(self, item: Any) -> str:
        """What the model must write."""
        return self.chat.completion(item.answer) if self.chat else item.completion

    def encode(self, tokenizer: Any, items: Iterable[Any]) -> list[Example]:
        """The items as `fit` and `exact_match` take them.

        Raises:
            ValueError: a text cannot be encoded; see `encode`.
        """
        return [encode(tokenizer, self.prompt(item), self.completion(item)) for item in items]

    def answers(self, model: Any, tokenizer: Any, items: Sequence[Any], **settings: Any) -> list[str]:
        """What the model says to each item, for `score`; settings as for `greedy`."""
        stop = self.chat.end if self.chat else self.end
        return greedy(model, tokenizer, [self.prompt(item) for item in items], **{"stop": stop} | settings)

    def right(
        self, model: Any, tokenizer: Any, items: Sequence[Any], exact: Sequence[bool] | None = None, **settings: Any
    ) -> list[bool]:
        """For each item whether the model answers it rightly; only what it does not give exactly is generated.

        Args:
            model, tokenizer: who is asked.
            items: what is asked.
            exact: what `exact_match` says of them; None asks it.
            settings: as for `greedy`.
        """
        if exact is None:
            exact = exact_match(model, self.encode(tokenizer, items), show=False)
        rest = [item for item, done in zip(items, exact, strict=True) if not done]
        found = iter(self.score(rest, self.answers(model, tokenizer, rest, **settings)))
        return [done or next(found) for done in exact]


@dataclass(frozen=True)
class Line:
    """A line of a reader's own file; with a chat format its prompt is the user's turn and its completion the reply."""

    prompt: str
    completion: str

    @property
    def asked(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def answer(self) -> str:
        """The completion."""
        return self.completion


def own_task(folder: str | os.PathLike, chat: ChatFormat | None = None) -> Task:
    """A task from a folder with `train.jsonl` and `test.jsonl`, one object with `prompt` and `completion` a line.

    An answer is right if it is the completion, apart from white space around both.

    Args:
        folder: where the files lie; any other .jsonl in it is a split, too.
        chat: put around the texts; None takes them as they are, and an answer ends at the tokenizer's eos.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks one of the two.
    """
    folder = as_path("a task's folder", folder)
    for split in ("train", "test"):
        if not (folder / f"{split}.jsonl").is_file():
            raise FileNotFoundError(f"expected a folder with train.jsonl and test.jsonl, got {str(folder)!r}")
    splits = tuple(sorted(path.stem for path in folder.glob("*.jsonl")))

    def draw(split: str, n: int | None, seed: int) -> list[Line]:
        """The first n lines, whatever the seed."""
        lines = _lines(folder / f"{split}.jsonl")
        if not 0 <= (n or 0) <= len(lines):
            raise ValueError(f"expected n up to {len(lines)}, the lines of {split}.jsonl in {folder}, got {n}")
        return lines[:n]

    return Task(str(folder), splits, draw, same_texts, chat)


def same_texts(items: Sequence[Any], answers: Sequence[str]) -> list[bool]:
    """Tells for each answer whether it is the item's, apart from white space around both.

    Raises:
        ValueError: the lengths differ.
    """
    return [item.answer.strip() == answer.strip() for item, answer in paired(items, answers)]


def paired(items: Sequence[Any], answers: Sequence[str]) -> list[tuple[Any, str]]:
    """Each item with its answer.

    Raises:
        ValueError: the lengths differ, or an answer is no text.
    """
    check_list("items", items)
    check_list("answers", answers)
    if any(not isinstance(answer, str) for answer in answers):
        raise ValueError("expected answers as texts, got something else")
    if len(items) != len(answers):
        raise ValueError(f"expected one answer an item, got {len(answers)} answers for {len(items)} items")
    return list(zip(items, answers, strict=True))


def _lines(path: Path) -> list[Line]:
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion):
                raise ValueError("both are texts, and a completion is not empty")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected an object with prompt and completion in {path}, line {number}: {error}"
            ) from None
        found.append(Line(prompt, completion))
    return found


def shuffled(things: Iterable, rng: random.Random) -> list:
    """A random order from `rng.random()` alone, whose stream is the same in all versions of Python."""
    return sorted(things, key=lambda _: rng.random())
