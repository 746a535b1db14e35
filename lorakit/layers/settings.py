"""How a setting is read, PEFT's or one that somebody types: what it may be, and one sentence if it is not."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorakit._words import short

TASK_HEADS = {  # what PEFT adds to modules_to_save for a task_type
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def integer(value: Any) -> int:
    """An integer, and no truth value."""
    if type(value) is not int:
        raise TypeError(value)
    return value


def number(value: Any) -> float:
    """A number, and no truth value."""
    if type(value) not in (int, float):
        raise TypeError(value)
    return value


def flag(value: Any) -> bool:
    """True or False; None for False."""
    if not isinstance(value, bool | None):
        raise TypeError(value)
    return bool(value)


def text(value: Any) -> str:
    """Words."""
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def listed(read: Callable[[Any], Any], value: Any) -> list[Any]:
    """What `read` makes of each of a list, of a single value, or of none."""
    values = sorted(value) if isinstance(value, set | frozenset) else value
    many = values if isinstance(values, list | tuple) else [] if values is None else [values]
    return [read(each) for each in many]


def several_names(value: Any) -> tuple[str, ...]:
    """Names, each once; a single one is no list of letters."""
    if not isinstance(value, Iterable | None) or isinstance(value, str | bytes | Mapping):
        raise TypeError(value)
    return tuple(dict.fromkeys(listed(text, value if isinstance(value, set | frozenset) else list(value or ()))))


def optional_names(value: Any) -> tuple[str, ...] | None:
    """As `several_names`, where no names are not the same as none being said."""
    return None if value is None else several_names(value)


def token_ids(value: Any) -> Any:
    """Token ids, or a name's; as tuples, so that nobody changes them."""
    if isinstance(value, Mapping):
        return {text(name): token_ids(ids) for name, ids in value.items()}
    if not isinstance(value, Iterable | None) or isinstance(value, str | bytes):
        raise TypeError(value)
    return tuple(integer(getattr(each, "item", lambda each=each: each)()) for each in (() if value is None else value))


def ids_to_peft(ids: Any) -> Any:
    """As PEFT has them: lists, and None for none."""
    return {name: list(own) for name, own in ids.items()} if isinstance(ids, Mapping) else list(ids) or None


def read_setting(key: str, config: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
    """A setting as `read` makes it.

    Raises:
        ValueError: it is not of that kind; says which it is.
    """
    value = config.get(key)
    try:
        return read(value)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"expected a valid {key}, got {short(value)}") from None
