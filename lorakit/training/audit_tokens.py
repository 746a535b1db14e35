"""Rows of training data as a tokenizer sees them: their tokens, and which of them a loss would count."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from lorakit._optional import need, quiet
from lorakit._words import one_line
from lorakit.models.download import MODELS, fetch_model
from lorakit.training.audit_rows import Message, Row, text_of
from lorakit.training.batch import _unknown_id

ENDLESS = 10**9  # a tokenizer that knows no limit says more


@dataclass(frozen=True)
class Tokens:
    """A row's tokens: which are labelled, how many the template added, and what went wrong."""

    ids: list[int]
    labelled: list[bool]
    added: int = 0
    border: str | None = None  # two texts that are tokenised otherwise together than apart
    refused: str | None = None  # what the chat template said

    @property
    def spans(self) -> list[list[int]]:
        """The labelled tokens in runs."""
        runs = groupby(zip(self.labelled, self.ids, strict=True), key=lambda pair: pair[0])
        return [[token for _, token in run] for labelled, run in runs if labelled]


class Tokenizer:
    """A tokenizer with what a row is held against: its special tokens, and what its chat template does."""

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()):
        self.tokenizer, self.template = tokenizer, getattr(tokenizer, "chat_template", None)
        self.marked = bool(self.template) and re.search(r"\{%-?\s*generation\b", str(self.template)) is not None
        self.bos, self.unknown = getattr(tokenizer, "bos_token_id", None), _unknown_id(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.special = [str(token) for token in added if token.special]
        self.ends = {end for end in (*ends, getattr(tokenizer, "eos_token_id", None)) if end is not None}
        if self.template and (end := self._template_end()) is not None:
            self.ends.add(end)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds itself if they are wanted."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def is_blank(self, token: int) -> bool:
        """True for a token of white space."""
        return not self.tokenizer.decode([token]).strip()

    def shown(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The conversation in the chat template, with the beginning of a reply if `prompt`."""
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    def read(self, row: Row) -> Tokens:
        """A row's tokens and labels: a plain pair as `encode` has them, a conversation as its template does."""
        if row.prompt is not None and row.completion is not None:
            return self._pair(row.prompt, row.completion)
        if not self.template:
            return Tokens([], [], refused="the tokenizer has no chat template")
        try:
            return self._chat(row)
        except Exception as error:  # a template may raise anything
            return Tokens([], [], refused=one_line(error))

    def _pair(self, prompt: str, completion: str) -> Tokens:
        before, after = self.ids(prompt), self.ids(completion)
        together = self.ids(prompt + completion)
        border = None if together == before + after else _around(prompt, completion)
        return Tokens(before + after, [False] * len(before) + [True] * len(after), border=border)

    def _chat(self, row: Row) -> Tokens:
        text = self.shown(row.messages)
        ids = self.ids(text)
        added = len(ids) - sum(len(self.ids(text_of(message))) for message in row.messages)
        turns = [
            i for i, message in enumerate(row.messages) if message["role"] == "assistant" and i >= (row.given or 0)
        ]
        if self.marked:
            mask = self._mask(row)
            start = len(self.ids(self.shown(row.messages[: row.given], prompt=True))) if row.given else 0
            return Tokens(ids, [bool(m) and i >= start for i, m in enumerate(mask)], added)
        labelled, border = [False] * len(ids), None
        for turn in turns:
            before = self.shown(row.messages[:turn], prompt=True) if turn else self.generation_prompt
            whole = self.shown(row.messages[: turn + 1])
            upto = _common(whole, text)  # less than the whole where a template ends every conversation by something
            cut = upto != whole and text_of(row.messages[turn]).strip() not in upto[len(before) :]
            if cut or not text.startswith(before):
                return Tokens(ids, [False] * len(ids), added, refused=f"it shows turn {turn + 1} otherwise later on")
            first, last = self.ids(before), self.ids(upto)
            if ids[: len(first)] != first or ids[: len(last)] != last:
                border = _around(before, text[len(before) :])
            labelled[len(first) : len(last)] = [True] * (len(last) - len(first))
        return Tokens(ids, labelled, added, border)

    def _mask(self, row: Row) -> list[int]:
        with quiet():
            found = self.tokenizer.apply_chat_template(
                list(row.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        return found["assistant_masks"]

    def _template_end(self) -> int | None:
        """The token with which the template ends a reply."""
        try:
            text = self.shown([{"role": "user", "content": "ASKED"}, {"role": "assistant", "content": "ANSWERED"}])
        except Exception:
            return None
        behind = self.ids(text.rpartition("ANSWERED")[2])
        return next((token for token in behind if self.tokenizer.decode([token]) in self.special), None)

    @cached_property
    def default_system(self) -> str:
        """The system's turn that the template puts before a conversation without one, '' if it does not."""
        user, reply = {"role": "user", "content": "ASKED"}, {"role": "assistant", "content": "ANSWERED"}
        try:
            opening = self.shown([user]).partition("ASKED")[0]
            between = self.shown([user, reply, user]).rpartition("ANSWERED")[2].partition("ASKED")[0]
        except Exception:
            return ""
        usual = _common(opening[::-1], between[::-1])[::-1]
        rest = opening.removesuffix(usual)
        for word in self.special:
            rest = rest.replace(word, " ")
        return " ".join(rest.split()).removeprefix("system ")

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds for a reply to begin."""
        asked = [{"role": "user", "content": "ASKED"}]
        try:
            return self.shown(asked, prompt=True).removeprefix(self.shown(asked))
        except Exception:
            return ""


def load_tokenizer(model: str | os.PathLike) -> tuple[Any, int | None]:
    """A model's tokenizer, and how many tokens the model takes, None if nothing says it; no weights are loaded.

    Args:
        model: a name in `MODELS`, a folder with a tokenizer, or a hub id.

    Raises:
        OSError, ValueError, ConnectionError: there is no tokenizer.
    """
    name = fetch_model(os.fspath(model)) if os.fspath(model) in MODELS else model
    transformers, limits = need("transformers"), []
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            said = f"{error}".split("\n")[0]
            raise ValueError(f"expected a model with a tokenizer, got {os.fspath(model)!r}: {said}") from None
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
            limits.append(getattr(config, "max_position_embeddings", None))
        except (OSError, ValueError, KeyError):
            pass  # a folder that holds a tokenizer alone
    limits.append(tokenizer.model_max_length)
    return tokenizer, min((limit for limit in limits if limit and limit < ENDLESS), default=None)


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _around(before: str, after: str) -> str:
    return f"{before[-12:]!r} and {after[:12]!r}"
