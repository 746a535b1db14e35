"""Optional libraries: imported when they are needed, with the way to get them, and kept quiet."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def need(module: str, extra: str = "models") -> Any:
    """Imports a module that the extra of lorakit brings, or that needs it, without warnings.

    Raises:
        ImportError: something is missing; says how to get it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        if missing.split(".")[0] == "lorakit":  # no extra would bring it
            raise
        raise ImportError(f"{missing} is needed: pip install 'lorakit[{extra}]'", name=missing) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings, log lines and bars of transformers, peft and bitsandbytes out of a notebook while it lasts."""
    transformers_log, bitsandbytes_log = need("transformers").utils.logging, logging.getLogger("bitsandbytes")
    verbosity, level = transformers_log.get_verbosity(), bitsandbytes_log.level
    had_bars = transformers_log.is_progress_bar_enabled()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    bitsandbytes_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_log.set_verbosity(verbosity)
        bitsandbytes_log.setLevel(level)
        if had_bars:
            transformers_log.enable_progress_bar()
