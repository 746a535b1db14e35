"""Settings for training are in force while it lasts, and are taken back."""

import ctypes
import subprocess
import sys

import pytest

from lorakit import machine

here = pytest.mark.skipif(not machine.available(), reason="the C library is not glibc")


@here
def test_the_settings_are_taken_back_when_the_last_user_leaves(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "_set", lambda _, values: calls.append(values))
    with machine.kept_memory() as outer:
        with machine.kept_memory() as inner:
            assert (outer, inner) == (True, True)
        assert calls == [machine.TRAINING]
    assert calls == [machine.TRAINING, machine.USUAL]


@here
def test_an_error_inside_takes_them_back_too(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "_set", lambda _, values: calls.append(values))
    with pytest.raises(KeyError), machine.kept_memory():
        raise KeyError
    assert calls == [machine.TRAINING, machine.USUAL]


@here
def test_glibc_takes_every_setting():
    libc = ctypes.CDLL(None)
    for values in (machine.TRAINING, machine.USUAL):
        assert all(libc.mallopt(name, value) == 1 for name, value in values.items())


def test_the_user_can_forbid_it(monkeypatch):
    monkeypatch.setenv("LORAKIT_MALLOC", "0")
    assert not machine.available()
    with machine.kept_memory() as kept:
        assert not kept


FAULTS = """
import resource, torch
from lorakit.machine import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12_000_000)  # 48 MB: glibc asks the system for it every time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with kept_memory():
    faults()
    print(faults())
print(faults())
"""


@here
def test_memory_is_kept_while_it_is_open_and_given_back_afterwards():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    inside, outside = map(int, done.stdout.split())
    assert inside * 20 < outside
