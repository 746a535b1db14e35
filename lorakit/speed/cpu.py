"""Settings of this machine that make training on a CPU faster, in one place, and taken back afterwards."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache

import torch
from torch import nn

from lorakit.speed.decision import Decision

# Spin briefly, then sleep: a thread that waits for another does not take its core away. For GNU OpenMP, which torch on
# Linux uses, and only before torch is imported: lorakit's kernels and the Makefile set it.
THREAD_ENV = {"GOMP_SPINCOUNT": "3000"}
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of mallopt's settings, from glibc's malloc.h
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 0}  # glibc's own
TRAINING = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
MIN_PRODUCT = 256**3  # multiplications in the largest product of a step; with fewer oneDNN is no faster
MIN_TOKENS = 32  # with fewer rows oneDNN is slower in the thin products of adapters than it wins in the others
LARGE = 512  # rows, from which on the gain hardly changes
MIN_GAIN = 1.25  # so much faster it must be, to be used: noise must not decide
MAX_ERROR = 4.0  # times the default's error in a trial product: more is not float32 any more, and is refused
PIN = "LORAKIT_ONEDNN"  # 1 or 0 in the environment: used wherever it is exact, or never, whatever the time says
_users = 0
_chosen: list[list[str]] = []  # the precisions that open blocks have chosen, the last of which holds
_before = "highest"  # torch's own, before the first of them
_lock = threading.Lock()  # blocks of several threads need not close in the order in which they opened


@contextmanager
def fast(model: nn.Module, tokens: float, onednn: bool | None = None) -> Iterator[dict[str, Decision]]:
    """The settings with which a model on a CPU trains and answers fastest, with results exact to float32 rounding.

    `kept_memory`, and oneDNN for float32 products of matrices where MKL is slower, as on AMD processors, and where
    `onednn_trial` has measured that it is as exact. For small products and on other devices nothing changes.

    Args:
        model: what will run.
        tokens: about how many it will see at a time.
        onednn: pins the choice, see `PIN`, which it outranks; None lets the environment or the time decide.

    Yields:
        what was decided, by name.
    """
    weights = [p for p in model.parameters() if p.ndim == 2]
    on_cpu = bool(weights) and all(p.device.type == "cpu" for p in weights)
    products = _choose_products(weights, on_cpu, tokens, pinned() if onednn is None else onednn)
    with ExitStack() as settings:
        memory = Decision(False, "not all of the model is on a CPU")
        if on_cpu:
            settings.enter_context(kept_memory())
            memory = judge_memory()
        if products.used:
            settings.enter_context(_matmul_precision("medium"))
        yield {"kept memory": memory, "oneDNN": products}


@contextmanager
def plain_products() -> Iterator[None]:
    """While it is open, float32 products are as they were before `fast` changed them, if it did."""
    with _matmul_precision("highest") if _chosen else nullcontext():
        yield


def pinned() -> bool | None:
    """What the environment says about oneDNN, None if nothing."""
    return {"0": False, "1": True}.get(os.environ.get(PIN, ""))


def _choose_products(weights: list[nn.Parameter], on_cpu: bool, tokens: float, pin: bool | None) -> Decision:
    """Whether oneDNN multiplies; a trial is made only where everything else speaks for it."""
    if not on_cpu or weights[0].dtype != torch.float32:
        return Decision(False, "for float32 on a CPU only")
    largest = max(p.numel() for p in weights)
    if tokens < MIN_TOKENS:
        return Decision(False, f"{tokens:.0f} tokens at a time, needs {MIN_TOKENS}")
    if tokens * largest < MIN_PRODUCT:
        return Decision(False, f"{tokens * largest:.1e} multiplications in a product, needs {MIN_PRODUCT:.1e}")
    if matmul_precision() == "medium" and _chosen:
        return Decision(True, "as in the block around")
    if matmul_precision() != "highest":
        return Decision(False, "you have set torch's precision of products")
    return judge_products(pin, min(LARGE, 1 << int(tokens).bit_length() - 1))


def judge_products(pin: bool | None, rows: int = LARGE) -> Decision:
    """Whether this machine multiplies float32 matrices of so many rows by oneDNN, by a trial if no pin forbids it."""
    if pin is False:
        return Decision(False, "pinned")
    if not torch.backends.mkldnn.is_available():
        return Decision(False, "torch was built without it")
    gain, error = onednn_trial(rows)
    if error > MAX_ERROR:
        return Decision(False, f"{error:.0f} times the error of the default, {MAX_ERROR:.0f} are allowed")
    if pin:
        return Decision(True, f"pinned; {gain:.1f} times as fast")
    needed = "" if gain >= MIN_GAIN else f", needs {MIN_GAIN}"
    return Decision(gain >= MIN_GAIN, f"{gain:.{1 if not needed else 2}f} times as fast{needed}")


@cache
def onednn_trial(rows: int = LARGE) -> tuple[float, float]:
    """How many times as fast oneDNN multiplies float32 matrices as the default here, and how many times its error.

    The products are those of a layer and its adapter, of rank 16, on so many rows.

    torch calls oneDNN for float32 if the precision is "medium", which permits bfloat16 inside. Processors with matrix
    units (AMX) use the permission, and show it in the error; others compute in float32 all the same.
    """
    generator = torch.Generator().manual_seed(0)
    x, W, A = (torch.randn(n, 576, generator=generator, dtype=torch.float32) for n in (rows, 1536, 16))
    B = torch.randn(1536, 16, generator=generator, dtype=torch.float32)
    exact, errors, seconds = x.double() @ W.double().T, {}, {}
    for precision in ("highest", "medium"):
        with _matmul_precision(precision):
            errors[precision] = (x @ W.T - exact).norm().item()
            seconds[precision] = min(_seconds(lambda: (x @ W.T, x @ A.T @ B.T)) for _ in range(10))
    return seconds["highest"] / seconds["medium"], errors["medium"] / errors["highest"]


def _seconds(work: Callable[[], object]) -> float:
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
    global _before
    mine = [precision]
    with _lock:
        if not _chosen:
            _before = torch.get_float32_matmul_precision()
        _chosen.append(mine)
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        with _lock:
            _chosen[:] = [other for other in _chosen if other is not mine]
            torch.set_float32_matmul_precision(_chosen[-1][0] if _chosen else _before)


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
    with _lock:
        _users += 1
        if _users == 1:
            _set(libc, TRAINING)
    try:
        yield True
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(libc, USUAL)
                libc.malloc_trim(0)


def available() -> bool:
    """True if `kept_memory` does something here."""
    return _glibc() is not None


def judge_memory() -> Decision:
    """The same, and why."""
    return Decision(available(), "glibc's settings" if available() else "no glibc, or LORAKIT_MALLOC=0")


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
