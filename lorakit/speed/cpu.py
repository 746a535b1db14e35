"""Settings of this machine that make training on a CPU faster, in one place, and taken back afterwards."""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache

import torch
from torch import nn

# Spin briefly, then sleep: a thread that waits for another does not take its core away. For GNU OpenMP, which torch on
# Linux uses, and only before torch is imported: lorakit's kernels and the Makefile set it.
THREAD_ENV = {"GOMP_SPINCOUNT": "3000"}
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of mallopt's settings, from glibc's malloc.h
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 0}  # glibc's own
TRAINING = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
MIN_PRODUCT = 256**3  # multiplications in the largest product of a step; with fewer oneDNN is no faster
MIN_TOKENS = 256  # with fewer rows oneDNN asks for new memory in every thin product, and is slower
MIN_GAIN = 1.25  # so much faster it must be, to be used: noise must not decide
_users = 0


@contextmanager
def fast(model: nn.Module, tokens: float) -> Iterator[None]:
    """The settings with which a model on a CPU trains and answers fastest, with results exact to float32 rounding.

    `kept_memory`, and oneDNN for float32 products of matrices where MKL is slower, as on AMD processors, and where
    `onednn_gain` has measured that it is as exact. For small products and on other devices nothing changes.

    Args:
        model: what will run.
        tokens: about how many it will see at a time.
    """
    weights = [p for p in model.parameters() if p.ndim == 2]
    on_cpu = bool(weights) and all(p.device.type == "cpu" for p in weights)
    float32 = on_cpu and weights[0].dtype == torch.float32
    large = float32 and tokens >= MIN_TOKENS and tokens * max(p.numel() for p in weights) >= MIN_PRODUCT
    with ExitStack() as settings:
        if on_cpu:
            settings.enter_context(kept_memory())
        if large and onednn_gain() >= MIN_GAIN:
            settings.enter_context(_matmul_precision("medium"))
        yield


@cache
def onednn_gain() -> float:
    """How many times faster oneDNN multiplies float32 matrices than the default, 0 if it is not as exact (or absent).

    torch calls oneDNN for float32 if the precision is "medium", which permits bfloat16 inside. Processors with matrix
    units (AMX) use the permission and are refused here; others compute in float32 all the same.
    """
    if matmul_precision() != "highest" or not torch.backends.mkldnn.is_available():
        return 0.0
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 576, generator=generator) for n in (384, 1536))
    exact, errors, seconds = x.double() @ W.double().T, {}, {}
    for precision in ("highest", "medium"):
        with _matmul_precision(precision):
            errors[precision] = (x @ W.T - exact).norm().item()
            seconds[precision] = min(_seconds(lambda: x @ W.T) for _ in range(10))
    return seconds["highest"] / seconds["medium"] if errors["medium"] <= 4 * errors["highest"] else 0.0


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matmul_precision() -> str | None:
    """torch's precision of float32 products, None if it was set in torch's newer way, device by device."""
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def kept_memory() -> Iterator[bool]:
    """While it is open, freed memory stays with the process, so that the next training step needs no new pages.

    glibc gives every large block back to the system, and each step asks for the same blocks again, page by page. Where
    there is no glibc, or the environment says `LORAKIT_MALLOC=0`, nothing happens. Leaving gives the memory back.

    Yields:
        whether the setting is in force.
    """
    global _users
    libc = _glibc()
    if libc is None:
        yield False
        return
    _users += 1
    if _users == 1:
        _set(libc, TRAINING)
    try:
        yield True
    finally:
        _users -= 1
        if _users == 0:
            _set(libc, USUAL)
            libc.malloc_trim(0)


def available() -> bool:
    """True if `kept_memory` does something here."""
    return _glibc() is not None


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has the settings and the user does not forbid them."""
    if sys.platform != "linux" or os.environ.get("LORAKIT_MALLOC") == "0":
        return None
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        if libc.gnu_get_libc_version and libc.mallopt and libc.malloc_trim:
            return libc
    return None


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for name, value in values.items():
        libc.mallopt(name, value)
