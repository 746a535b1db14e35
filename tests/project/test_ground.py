"""The ground floor: whole files or none, near names, optional imports; and the one face of the package."""

import threading
from pathlib import Path

import pytest

import lorakit
from lorakit._atomic import write_atomically
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


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("q_prj", ["v_proj", "q_proj", "up"], "got 'q_prj'; near: q_proj, v_proj"),
        ("xyz", {"a": 1, "b": 2}, "got 'xyz'; known: a, b"),
        ("x", [], "got 'x'; known: none"),
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
