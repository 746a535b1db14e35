"""How much memory work takes, measured (Linux)."""

import os
from collections.abc import Callable


def peak_bytes(work: Callable[[], object]) -> int:
    """By how many bytes the process's resident memory grows at most during a call.

    Freed memory that the process still holds hides growth: measure in a process that was started with
    `returning_memory`.

    Raises:
        OSError: the system is not Linux.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def resident_bytes() -> int:
    """The process's resident memory."""
    return _status("VmRSS")


def returning_memory() -> dict[str, str]:
    """The environment of a process whose freed tensors go back to the system at once: resident is in use (glibc)."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "LORAKIT_MALLOC": "0"}


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
