"""What another library's error says, fit for the end of one line; and what somebody has given, if it is long."""

MOST = 300  # characters


def shortened(text: str, most: int = MOST) -> str:
    """The text, or the beginning of a long one."""
    return text if len(text) <= most else f"{text[:most]} ..."


def short(value: object) -> str:
    """What `repr` says of a value in one line, or the beginning of it."""
    return shortened(" ".join(line.strip() for line in repr(value).splitlines()))


def one_line(error: BaseException) -> str:
    """Its words without line breaks, cut if they are many; its class if there are none."""
    return shortened(" ".join(str(error).split())) or type(error).__name__
