"""A safetensors file, of which names, shapes and dtypes can be seen before a tensor is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorakit._words import one_line

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # plain numbers


@contextmanager
def tensor_file(path: Path, refusal: type[ValueError] = ValueError) -> Iterator[Any]:
    """The open file, of which only the header has been read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, as a `refusal`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise refusal(f"expected a safetensors file, got a damaged one at {path}: {one_line(error)}") from None
