"""Settings of this machine that make training on a CPU faster, in one place, and taken back afterwards."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Spin briefly, then sleep: a thread that waits for another does not take its core away. For GNU OpenMP, which torch on
# Linux uses, and only before torch is imported: lorakit's kernels and the Makefile set it.
THREAD_ENV = {"GOMP_SPINCOUNT": "3000"}
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of mallopt's settings, from glibc's malloc.h
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 0}  # glibc's own
TRAINING = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
_users = 0


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
