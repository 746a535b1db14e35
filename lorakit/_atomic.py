"""Files and folders that are never half-written: made in a draft, then switched in one step.

What is locked is the folder itself, with `flock`, and not a file of filelock's: that would lie beside every adapter for
good, or be one more thing that a kill leaves behind, and save_adapter does not need filelock otherwise.
"""

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

if sys.platform != "win32":
    import fcntl

DRAFTS = ".lorakit.tmp"  # how their names end
DRAFT = re.compile(rf"\..+\.[0-9a-f]{{32}}{re.escape(DRAFTS)}")


def write_atomically(contents: Mapping[Path, bytes | Callable[[Path], object]]) -> None:
    """Writes each file beside its place and moves it there, so that a reader never sees half of one.

    A file's content is its bytes, or a function that writes them to the path it is given. All are written before the
    first is moved; they are moved in the order given.

    Raises:
        OSError: a file cannot be written; it names the file's place and the reason.
    """
    with ExitStack() as stack:
        drafts: dict[Path, Path] = {}
        folders: dict[Path, Path] = {}
        for path, content in contents.items():
            with named_errors(path):
                if path.parent not in folders:
                    folders[path.parent] = stack.enter_context(draft_beside(path))
                draft = drafts[path] = folders[path.parent] / path.name
                if callable(content):
                    content(draft)
                else:
                    draft.write_bytes(content)
                with open(draft, "rb+") as file:
                    os.fsync(file.fileno())
        for path, draft in drafts.items():
            with named_errors(path):
                os.replace(draft, path)


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end if nothing has failed; parents that it needs are made.

    Raises:
        FileExistsError: there is something at the place; it stays as it is.
        OSError: it cannot be written, which is found before anything is filled.
    """
    if place.exists() or place.is_symlink():
        raise FileExistsError(f"expected a new folder, got {str(place)!r}, which exists")
    made = [parent for parent in place.parents if not parent.exists()]  # from the inside out
    try:
        with named_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with draft_beside(place) as draft:
                (draft / place.name).mkdir()
                yield draft / place.name
                os.rename(draft / place.name, place)
    finally:
        if not place.exists():
            for parent in made:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()


@contextmanager
def draft_beside(place: Path) -> Iterator[Path]:
    """A new, empty folder beside a place: every call has its own, and it is gone at the end.

    The drafts of processes that were killed go first: each is locked while somebody works in it.
    """
    remove_dead(place.parent)
    while True:
        folder = place.with_name(f".{place.name[:100]}.{uuid4().hex}{DRAFTS}")
        folder.mkdir()
        lock = _lock(folder, wait=True)
        if folder.exists():  # else somebody took it for a dead one, between these lines
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def switch_folder(new: Path, folder: Path) -> None:
    """Gives a finished folder its name in one step. What had that name goes to `new`, to be removed with its draft.

    Where the system cannot exchange two folders, the old one stands aside for a moment; `settle` undoes that.
    """
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchange(new, folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        os.rename(folder, _aside(folder))
        os.rename(new, folder)
        shutil.rmtree(_aside(folder), ignore_errors=True)


def settle(folder: Path) -> None:
    """Puts back, or removes, what a process that was killed inside `switch_folder` has left aside."""
    if _aside(folder).exists() and not folder.exists():
        os.rename(_aside(folder), folder)
    shutil.rmtree(_aside(folder), ignore_errors=True)


@contextmanager
def named_errors(place: Path) -> Iterator[None]:
    """Whatever the system refuses, such as a full disk, as an OSError with the place and the reason."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or str(error.filename).count(DRAFTS)):
            raise  # it says all, or is about another file
        raise OSError(error.errno, os.strerror(error.errno), str(place)) from error
    except Exception as error:  # of a library in Rust, which has its own class for it and keeps the number as text
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process or thread at a time, where the system has such locks."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lorakit.old")


def remove_dead(folder: Path) -> None:
    """Removes the drafts that killed processes have left in a folder."""
    if sys.platform == "win32" or not folder.is_dir():
        return
    for name in os.listdir(folder):
        if DRAFT.fullmatch(name):
            with suppress(OSError):  # alive, another's, or gone by now
                lock = _lock(folder / name, wait=False)
                shutil.rmtree(folder / name, ignore_errors=True)
                _unlock(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """An open, locked handle of a folder; the system frees it when the process ends, however it ends."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        if wait:
            return None
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if wait:  # a file system without locks
            return handle
        os.close(handle)
        raise
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one system call, where there is one: `renameat2` or, on a Mac, `renamex_np`."""
    if sys.platform == "win32":
        return False
    library, paths, swap = ctypes.CDLL(None), (os.fsencode(first), os.fsencode(second)), 2
    if (call := getattr(library, "renamex_np", None)) is not None:
        return call(*paths, swap) == 0
    if (call := getattr(library, "renameat2", None)) is not None:
        here = -100  # AT_FDCWD
        return call(here, paths[0], here, paths[1], swap) == 0
    return False
