"""A conversation in its tokenizer's chat template, in parts: what the assistant has written, and what it was given."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorakit._optional import need
from lorakit._words import one_line
from lorakit.training.rows import ASSISTANT, FIRST, Message, Row, texts_of

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASKED, ANSWERED = {"role": "user", "content": "ASKED"}, {"role": ASSISTANT, "content": "ANSWERED"}  # to try one
MARKED = "or mark what the assistant writes by {% generation %} in the template"


def spoken(tokenizer: Any, row: Row) -> list[tuple[str, bool]]:
    """The conversation in the template, in parts: each text, and whether it is a turn to be learned.

    Raises:
        ValueError: there is no template; it refuses the conversation, leaves out its tools, or shows a turn otherwise
            than its beginning.
    """
    template = template_of(tokenizer, row)
    if template is None:
        raise ValueError("expected a tokenizer with a chat template, got one without")
    text = shown(tokenizer, row.messages, row)
    hidden = next((words for words in _must_be_shown(row) if words not in text), None)
    if hidden is not None:
        raise ValueError(
            f"expected a chat template that shows all of a conversation, got one that leaves out {hidden!r}"
        )
    spans = _marked(tokenizer, template, row, text) if MARK.search(template) else _by_prefixes(tokenizer, row, text)
    parts, place = [], 0
    for start, end in spans:
        parts += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [(part, learned) for part, learned in [*parts, (text[place:], False)] if part]


def shown(tokenizer: Any, messages: Sequence[Message], row: Row | None = None, prompt: bool = False) -> str:
    """Messages in the chat template, with a row's tools and settings, and the beginning of a reply if `prompt`.

    Raises:
        ValueError: the template refuses them.
    """
    tools, settings = (list(row.tools) or None, row.settings) if row else (None, {})
    with _refusals():
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **settings
        )


def template_of(tokenizer: Any, row: Row | None = None) -> str | None:
    """The template that a conversation gets; a tokenizer may have one for those with tools."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return tokenizer.get_chat_template(tools=list(row.tools) or None if row else None)


def generation_prompt(tokenizer: Any) -> str:
    """What the template adds for a reply to begin."""
    return shown(tokenizer, [ASKED], prompt=True).removeprefix(shown(tokenizer, [ASKED]))


def special_words(tokenizer: Any) -> list[str]:
    """The tokenizer's control tokens, such as those that begin and end a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [str(token) for token in added if token.special]


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template may raise anything
        raise ValueError(f"expected a conversation that the chat template takes, got {one_line(error)!r}") from error


def _must_be_shown(row: Row) -> Iterator[str]:
    """Names of the functions that a conversation has or calls, and the last line of each text.

    What stands before that line may be thoughts, which templates leave out; what a tool says may be written otherwise.
    """
    calls = [call for message in row.messages for call in message.get("tool_calls") or ()]
    for function in (call.get("function", call) for call in (*row.tools, *calls)):
        if "name" in function:
            yield function["name"]
    for message in row.messages:
        if message["role"] in (*FIRST, "user", ASSISTANT):
            yield from (text.strip().splitlines()[-1] for text in texts_of(message) if text.strip())


def _by_prefixes(tokenizer: Any, row: Row, text: str) -> list[tuple[int, int]]:
    """Where each turn stands: behind the prompt for it, up to the end of the conversation that it ends."""
    spans = []
    for turn in row.learned:
        before = shown(tokenizer, row.messages[:turn], row, prompt=True) if turn else generation_prompt(tokenizer)
        end = shown(tokenizer, row.messages[: turn + 1], row)
        whole = _beginning(end, text, special_words(tokenizer))
        if not end.startswith(before):
            raise ValueError(
                f"expected a chat template whose prompt begins the reply, got {before[-24:]!r} before turn {turn + 1}: "
                f"give chat_template_kwargs that make them alike, {MARKED}"
            )
        if not whole.startswith(before):
            raise ValueError(
                f"expected a chat template that shows turn {turn + 1} alike all along, got one that changes it later: "
                f"label the last turn alone, {MARKED}"
            )
        spans.append((len(before), len(whole)))
    return spans


def _beginning(whole: str, text: str, special: Sequence[str]) -> str:
    """The shorter conversation as the longer one begins: without what a template puts at the end of every one, such as
    eos; '' if it does not begin so."""
    while whole and not text.startswith(whole):
        end = next((word for word in special if whole.endswith(word)), whole[-1] if whole[-1].isspace() else "")
        whole = whole.removesuffix(end) if end else ""
    return whole


def _marked(tokenizer: Any, template: str, row: Row, text: str) -> list[tuple[int, int]]:
    """Where the template's marks are, behind those of the messages that are given."""
    render = need("transformers.utils.chat_template_utils").render_jinja_template

    def marks(messages: Sequence[Message]) -> list[tuple[int, int]]:
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        with _refusals():
            (found,), (places,) = render(
                conversations=[plain],
                tools=list(row.tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **row.settings},
            )
        if len(plain) == len(row.messages) and found != text:
            raise ValueError("expected a chat template that shows a conversation the same each time, got another")
        return places

    given = len(marks(row.messages[: row.given])) if row.given else 0
    return [(start, end) for start, end in marks(row.messages)[given:] if start < end]
