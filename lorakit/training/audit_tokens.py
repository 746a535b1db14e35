"""Rows of training data as a tokenizer sees them: their tokens, and which of them a loss would count."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from lorakit._optional import need, quiet
from lorakit._paths import as_path
from lorakit.models.download import MODELS, fetch_model
from lorakit.training.chat import (
    ANSWERED,
    ASKED,
    MARK,
    generation_prompt,
    shown,
    special_words,
    spoken,
    template_of,
)
from lorakit.training.encode import in_parts, unknown_id
from lorakit.training.rows import Row

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
        self.tokenizer, self.template = tokenizer, template_of(tokenizer)
        self.marked = self.template is not None and MARK.search(self.template) is not None
        self.bos, self.unknown = getattr(tokenizer, "bos_token_id", None), unknown_id(tokenizer)
        self.special = special_words(tokenizer)
        self.ends = {end for end in (*ends, getattr(tokenizer, "eos_token_id", None)) if end is not None}
        if self.template and (end := self._template_end()) is not None:
            self.ends.add(end)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds itself if they are wanted."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def is_blank(self, token: int) -> bool:
        """True for a token of white space."""
        return not self.tokenizer.decode([token]).strip()

    def read(self, row: Row) -> Tokens:
        """A row's tokens and labels, as `encode_row` has them."""
        if row.prompt is not None and row.completion is not None:
            return self._tokens([(row.prompt, False), (row.completion, True)])
        try:
            return self._tokens(spoken(self.tokenizer, row), sum(len(self.ids(text)) for text in row.texts))
        except ValueError as error:
            return Tokens([], [], refused=str(error))

    def _tokens(self, parts: Sequence[tuple[str, bool]], written: int = 0) -> Tokens:
        """Args: written: how many of the tokens are not the template's."""
        texts = [text for text, _ in parts]
        tokens = in_parts(self.tokenizer, texts)
        pairs = [(token, learned) for part, (_, learned) in zip(tokens, parts, strict=True) for token in part]
        ids, whole = [token for token, _ in pairs], self.ids("".join(texts))
        border = None
        if ids != whole:
            ends = accumulate(texts)
            cuts = (i for i, text in enumerate(ends, 1) if whole[: len(head := self.ids(text))] != head)
            if (cut := next(cuts, None)) is not None:  # else cut apart at an unknown word, which is told itself
                border = f"{texts[cut - 1][-12:]!r} and {texts[cut][:12]!r}"
        return Tokens(ids, [learned for _, learned in pairs], len(ids) - written if written else 0, border)

    def _template_end(self) -> int | None:
        """The token with which the template ends a reply."""
        try:
            text = shown(self.tokenizer, [ASKED, ANSWERED])
        except ValueError:
            return None
        behind = self.ids(text.rpartition(ANSWERED["content"])[2])
        return next((token for token in behind if self.tokenizer.decode([token]) in self.special), None)

    @cached_property
    def default_system(self) -> str:
        """The system's turn that the template puts before a conversation without one, '' if it does not."""
        try:
            opening = shown(self.tokenizer, [ASKED]).partition(ASKED["content"])[0]
            between = shown(self.tokenizer, [ASKED, ANSWERED, ASKED]).rpartition(ANSWERED["content"])[2]
        except ValueError:
            return ""
        between = between.partition(ASKED["content"])[0]
        usual = next((i for i in range(len(between)) if opening.endswith(between[i:])), len(between))
        rest = opening.removesuffix(between[usual:])
        for word in self.special:
            rest = rest.replace(word, " ")
        return " ".join(rest.split()).removeprefix("system ")

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds for a reply to begin."""
        try:
            return generation_prompt(self.tokenizer)
        except ValueError:
            return ""


def load_tokenizer(model: str | os.PathLike) -> tuple[Any, int | None]:
    """A model's tokenizer, and how many tokens the model takes, None if nothing says it; no weights are loaded.

    Args:
        model: a name in `MODELS`, a folder with a tokenizer, or a hub id.

    Raises:
        OSError, ValueError, ConnectionError: there is no tokenizer.
    """
    as_path("a model with a tokenizer (or its name)", model)
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
