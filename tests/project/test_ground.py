"""The ground floor: whole files or none, near names, optional imports; and the one face of the package."""

import os
import sys
import threading
from pathlib import Path

import pytest

import lorakit
from lorakit import _atomic
from lorakit._atomic import draft_beside, settle, switch_folder, write_atomically
from lorakit._suggest import near_names


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, texts, faults = tmp_path / "file", [b"a" * 200_000, b"b" * 100_000], []
    both = threading.Barrier(2)

    def write(text):
        def draft(place):
            both.wait()  # both have begun
            place.write_bytes(text)

        try:
            for _ in range(10):
                write_atomically({path: draft})
                assert path.read_bytes() in texts
        except Exception as fault:
            faults.append(fault)
            both.abort()

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [each.name for each in tmp_path.iterdir()] == ["file"], "no draft is left"


def test_a_failure_leaves_every_file_as_it_was(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def fail(place):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically({first: lambda place: place.write_text("new"), second: fail})
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"first": "old"}


def test_a_folder_gets_its_name_in_one_step(tmp_path, monkeypatch):
    place = tmp_path / "model"
    monkeypatch.setattr(_atomic.os, "rename", lambda *_: pytest.fail("a moment without a folder"))
    for text in ("old", "new"):
        with draft_beside(place) as draft:
            (draft / "made").mkdir()
            (draft / "made" / "file").write_text(text)
            if sys.platform in ("linux", "darwin"):
                switch_folder(draft / "made", place)
                assert (place / "file").read_text() == text
    assert [each.name for each in tmp_path.iterdir()] in (["model"], [])


@pytest.mark.parametrize("killed_at", [1, 2, None])
def test_where_folders_cannot_be_exchanged_the_next_call_settles_it(tmp_path, monkeypatch, killed_at):
    place, new, calls, real = tmp_path / "model", tmp_path / "new", [], os.rename
    for folder in (place, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    def rename(first, second):
        calls.append(first)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        real(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(_atomic, "_exchange", lambda *_: False)
        patch.setattr(_atomic.os, "rename", rename)
        try:
            switch_folder(new, place)
        except KeyboardInterrupt:
            assert killed_at
    settle(place)
    assert (place / "file").read_text() == ("model" if killed_at else "new")
    assert {each.name for each in tmp_path.iterdir()} <= {"model", "new"}


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_drafts_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = tmp_path / f".file.{'0' * 32}.lorakit.tmp"
    dead.mkdir()
    (dead / "file").write_text("half")
    with draft_beside(tmp_path / "other") as alive:
        write_atomically({tmp_path / "file": b"whole"})
        assert alive.is_dir()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_the_system_refuses_names_the_place(tmp_path):
    path = tmp_path / "file"

    def of_a_rust_library(_):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def of_python(_):
        raise OSError(28, "No space left on device")

    for content in (of_a_rust_library, of_python):
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: .*file'") as caught:
            write_atomically({path: content})
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically({tmp_path / "nowhere" / "file": b""})
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("q_prj", ["v_proj", "q_proj", "up"], "got 'q_prj'; near: q_proj, v_proj; also: up"),
        ("q_prj", ["v_proj", "q_proj", "up", "gate", "down"], "got 'q_prj'; near: q_proj, v_proj"),
        ("xyz", {"a": 1, "b": 2}, "got 'xyz'; known: a, b"),
        ("x", [], "got 'x'; known: none"),
        (3, ["a"], "got 3; known: a"),
    ],
)
def test_near_names(name, known, message):
    assert near_names(name, known) == message


def test_every_public_name_is_there():
    assert [name for name in lorakit.__all__ if not hasattr(lorakit, name)] == []
    assert len(lorakit.__all__) == len(set(lorakit.__all__))


def test_sweep_is_imported_when_it_is_asked_for():
    from lorakit.experiments.sweep import sweep

    assert lorakit.sweep is sweep
    assert "sweep" in dir(lorakit)
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        _ = lorakit.swep


def drawn(text):
    """The files of a tree that is drawn by indentation, with the phrase of each."""
    folders, files = [], {}
    for line in filter(None, text.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, phrase = line.split(maxsplit=1)
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/"):
            files["".join([*folders[:depth], name])] = phrase
    return files


def test_the_picture_of_the_package_shows_every_file_and_invents_none():
    package = Path(lorakit.__file__).parent
    files = drawn((package / "README.md").read_text(encoding="utf-8").split("```")[1])
    there = {path.relative_to(package).as_posix() for path in [*package.rglob("*.py"), package / "py.typed"]}
    rooms = {name for name in there if name.endswith("/__init__.py")} - {"course/checks/__init__.py"}
    assert set(files) == there - rooms
    assert all(files.values())
