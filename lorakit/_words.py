"""What another library's error says, fit for the end of one line."""

MOST = 300  # characters


def one_line(error: BaseException) -> str:
    """Its words without line breaks, cut if they are many; its class if there are none."""
    return " ".join(str(error).split())[:MOST] or type(error).__name__
