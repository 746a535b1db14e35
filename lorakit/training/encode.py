"""Texts and conversations as examples: their tokens, of which those to be learned are labelled."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorakit._numbers import check_integer
from lorakit._suggest import check_name
from lorakit.training.batch import IGNORE, Example
from lorakit.training.chat import spoken
from lorakit.training.rows import TURNS, Row, row_of


def encode(tokenizer: Any, prompt: str, completion: str, max_length: int | None = None) -> Example:
    """Tokenises a prompt and its completion as generation will see them, and labels the completion only.

    Args:
        max_length: tokens at most: what is too much goes from the prompt's start, behind a token that begins texts.
            The completion is never cut. None for any number.

    Raises:
        ValueError: the completion alone is longer than `max_length`; or the tokenizer gives words that it does not know
            the id of another token, or a completion holds words that it does not know: a model would learn something
            else, and could look perfect at it.
    """
    if not callable(tokenizer) or not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError("expected a tokenizer and two texts, got something else")
    if max_length is not None:
        check_integer("max_length", max_length, 0)
    return _example(tokenizer, [(prompt, False), (completion, True)], max_length)


def encode_row(
    tokenizer: Any, row: Row | Mapping[str, Any], turns: str = "all", max_length: int | None = None
) -> Example:
    """Tokenises a row of training data; of a conversation, the assistant's turns are labelled.

        examples = [lorakit.encode_row(tokenizer, row) for row in lorakit.read_rows("chat.jsonl")]

    A conversation is put into the tokenizer's own chat template. What the assistant has written is what stands between
    the template's `{% generation %}` marks. Without such marks it is what a turn adds to the prompt before it, if the
    whole conversation shows both as they are; the end of the turn is part of it.

    Args:
        row: `prompt` and `completion`, as texts or lists of messages, or `messages`; with `tools` and
            `chat_template_kwargs` where the template takes them. Plain texts are taken as they are.
        turns: "all" for every assistant's turn of `messages` or of a completion, "last" for its last alone.
        max_length: tokens at most. Of a conversation the oldest questions go first, with all that follows up to the
            next one; then, as for `encode`, the start of the prompt. The last reply is never cut. None for any number.

    Raises:
        ValueError: it is no such row; the tokenizer has no chat template; the template refuses the conversation, leaves
            out its tools, or shows a turn otherwise later on, so that nobody could say which tokens are the turn's; or
            as for `encode`.
    """
    check_name("turns", turns, TURNS)
    if max_length is not None:
        check_integer("max_length", max_length, 0)
    row = row if isinstance(row, Row) else row_of(row)
    if row.prompt is not None and row.completion is not None:
        return encode(tokenizer, row.prompt, row.completion, max_length)
    row = row.last_learned() if turns == "last" else row
    parts = spoken(tokenizer, row)
    while max_length is not None and sum(map(len, in_parts(tokenizer, [text for text, _ in parts]))) > max_length:
        if (shorter := row.without_oldest()) is None:
            break
        row = shorter
        parts = spoken(tokenizer, row)
    return _example(tokenizer, parts, max_length)


def in_parts(tokenizer: Any, parts: Sequence[str], begins: bool = True) -> list[list[int]]:
    """The tokens of a text in parts: those of the whole, but apart where one would reach from a part into the next.

    So what stands before each part is tokenised as generation will see it.

    Args:
        begins: whether a text begins here, or goes on.
    """
    ids, unknown = _ids if begins else _ids_behind, unknown_id(tokenizer)
    whole, ends = ids(tokenizer, "".join(parts)), [0]
    for k in range(1, len(parts)):
        head = ids(tokenizer, "".join(parts[:k]))
        if whole[: len(head)] != head or (head and head[-1] == unknown):  # one unknown word may reach over the border
            return in_parts(tokenizer, parts[:k], begins) + in_parts(tokenizer, parts[k:], begins=False)
        ends.append(len(head))
    return [whole[start:end] for start, end in pairwise([*ends, len(whole)])]


def unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for words without one; the tokenizer may give them another token's and not say so."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None)
    return getattr(tokenizer, "unk_token_id", None) if token is None else tokenizer.convert_tokens_to_ids(token)


def _ids(tokenizer: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a character
        raise ValueError(f"expected text that UTF-8 can write, got {text[error.start]!r} at {error.start}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ids_behind(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on another, without the space that some tokenizers put before a text's first word."""
    line, ids = _ids(tokenizer, "\n"), _ids(tokenizer, "\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else _ids(tokenizer, text)


def _example(tokenizer: Any, parts: Sequence[tuple[str, bool]], max_length: int | None) -> Example:
    texts = in_parts(tokenizer, [text for text, _ in parts])
    ids = [token for tokens in texts for token in tokens]
    labels = [
        token if learned else IGNORE for tokens, (_, learned) in zip(texts, parts, strict=True) for token in tokens
    ]
    _check_known(tokenizer, " ".join(text for text, _ in parts), ids, labels)
    if max_length is not None and len(ids) > max_length:
        start = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
        kept = _shortened(ids[:start], max_length - len(ids[start:]), getattr(tokenizer, "bos_token_id", None))
        ids, labels = kept + ids[start:], [IGNORE] * len(kept) + labels[start:]
    return Example(ids, labels)


def _check_known(tokenizer: Any, text: str, ids: list[int], labels: list[int]) -> None:
    declared, unknown = getattr(tokenizer, "unk_token_id", None), unknown_id(tokenizer)
    if unknown is not None and (unknown in labels or (unknown != declared and unknown in ids)):
        words = text.replace(tokenizer.decode([unknown]), " ").split()
        strange = [word for word in dict.fromkeys(words) if unknown in _ids(tokenizer, word)]
        if strange:  # the token may also stand in the text by its name
            raise ValueError(f"expected words that the tokenizer knows, got {', '.join(map(repr, strange[:8]))}")


def _shortened(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` ids, the first of which is `bos` if that was the first of all."""
    if room < 0:
        raise ValueError(f"expected a completion of at most max_length tokens, got {-room} more")
    if len(ids) <= room:
        return ids
    kept = ids[:1] if room and ids[0] == bos else []
    return kept + ids[len(ids) - room + len(kept) :]
