"""Settings for training are in force while it lasts, and are taken back."""

import ctypes
import subprocess
import sys

import pytest
import torch

from lorakit.speed import cpu

here = pytest.mark.skipif(not cpu.available(), reason="the C library is not glibc")


@here
def test_the_settings_are_taken_back_when_the_last_user_leaves(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "_set", lambda _, values: calls.append(values))
    with cpu.kept_memory() as outer:
        with cpu.kept_memory() as inner:
            assert (outer, inner) == (True, True)
        assert calls == [cpu.TRAINING]
    assert calls == [cpu.TRAINING, cpu.USUAL]


@here
def test_an_error_inside_takes_them_back_too(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "_set", lambda _, values: calls.append(values))
    with pytest.raises(KeyError), cpu.kept_memory():
        raise KeyError
    assert calls == [cpu.TRAINING, cpu.USUAL]


@here
def test_glibc_takes_every_setting():
    libc = ctypes.CDLL(None)
    for values in (cpu.TRAINING, cpu.USUAL):
        assert all(libc.mallopt(name, value) == 1 for name, value in values.items())


def test_the_user_can_forbid_it(monkeypatch):
    monkeypatch.setenv("LORAKIT_MALLOC", "0")
    assert not cpu.available()
    with cpu.kept_memory() as kept:
        assert not kept


FAULTS = """
import resource, torch
from lorakit.speed.cpu import kept_memory
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


@pytest.mark.long
@here
def test_memory_is_kept_while_it_is_open_and_given_back_afterwards():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    inside, outside = map(int, done.stdout.split())
    assert inside * 20 < outside


def test_fast_takes_back_the_precision(monkeypatch):
    monkeypatch.setattr(cpu, "onednn_gain", lambda: 2.0)
    model = torch.nn.Linear(576, 576)
    for dtype, tokens, inside in (
        (torch.float32, 400, "medium"),
        (torch.float32, 2, "highest"),
        (torch.bfloat16, 400, "highest"),
    ):
        with cpu.fast(model.to(dtype), tokens):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), cpu.fast(model.float(), 400):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("gain", [0.0, 1.1])
def test_onednn_is_not_used_where_it_is_inexact_or_no_faster(gain, monkeypatch):
    monkeypatch.setattr(cpu, "onednn_gain", lambda: gain)
    with cpu.fast(torch.nn.Linear(576, 576), 400):
        assert torch.get_float32_matmul_precision() == "highest"


def test_inexact_products_are_refused(monkeypatch):
    class Rounded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            medium = function.overloadpacket is torch.ops.aten.mm and output.dtype == torch.float32
            return output.bfloat16().float() if medium and cpu.matmul_precision() == "medium" else output

    cpu.onednn_gain.cache_clear()
    with Rounded():
        assert cpu.onednn_gain() == 0
    cpu.onednn_gain.cache_clear()


def test_products_inside_fast_are_float32_exact():
    torch.manual_seed(0)
    x, layer = torch.randn(400, 576), torch.nn.Linear(576, 1536)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad(), cpu.fast(layer, len(x)):
        assert (layer(x) - exact).norm() / exact.norm() < 1e-6


def test_a_precision_that_the_user_has_chosen_stays():
    torch.set_float32_matmul_precision("high")
    cpu.onednn_gain.cache_clear()
    try:
        assert cpu.onednn_gain() == 0
    finally:
        torch.set_float32_matmul_precision("highest")
        cpu.onednn_gain.cache_clear()
