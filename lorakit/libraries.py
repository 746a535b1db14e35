"""Optional libraries: imported when they are needed, with the way to get them, and kept quiet."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any


def need(module: str) -> Any:
    """Imports an optional dependency, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error.name or module} is needed: pip install 'lorakit[models]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and warnings out of a notebook, then restores its settings."""
    logging = need("transformers").utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
