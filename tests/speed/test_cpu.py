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


@pytest.fixture
def trial(monkeypatch):
    """Sets what the trial of oneDNN finds: its gain and its error, as multiples of the default's."""
    monkeypatch.delenv(cpu.PIN, raising=False)
    return lambda gain, error=1.0: monkeypatch.setattr(cpu, "onednn_trial", lambda rows=512: (gain, error))


def products(layer, tokens, **settings):
    """The precision inside of `fast`, and what it says about oneDNN."""
    with cpu.fast(layer, tokens, **settings) as decisions:
        return torch.get_float32_matmul_precision(), str(decisions["oneDNN"])


def test_fast_takes_back_the_precision(trial):
    trial(2.0)
    model = torch.nn.Linear(576, 576)
    for dtype, tokens, inside, words in (
        (torch.float32, 400, "medium", "used: 2.0 times as fast"),
        (torch.float32, 2, "highest", "not used: 2 tokens at a time, needs 32"),
        (torch.bfloat16, 400, "highest", "not used: for float32 on a CPU only"),
    ):
        assert products(model.to(dtype), tokens) == (inside, words)
        assert torch.get_float32_matmul_precision() == "highest"
    assert "needs 1.7e+07" in products(torch.nn.Linear(8, 8), 400)[1]
    with pytest.raises(KeyError), cpu.fast(model.float(), 400):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("gain", "error", "words"), [(9.0, 40.0, "40 times the error"), (1.1, 1.0, "1.10 times as fast, needs 1.25")]
)
def test_onednn_is_not_used_where_it_is_inexact_or_no_faster(gain, error, words, trial):
    trial(gain, error)
    precision, why = products(torch.nn.Linear(576, 576), 400)
    assert precision == "highest"
    assert words in why


@pytest.mark.parametrize(
    ("environment", "argument", "gain", "error", "used"),
    [
        ("1", None, 1.0, 1.0, True),
        ("0", None, 3.0, 1.0, False),
        ("0", True, 1.0, 1.0, True),
        ("1", False, 3.0, 1.0, False),
        ("1", None, 3.0, 40.0, False),  # a pin is no leave to be inexact
    ],
)
def test_the_choice_can_be_pinned(environment, argument, gain, error, used, trial, monkeypatch):
    trial(gain, error)
    monkeypatch.setenv(cpu.PIN, environment)
    precision, why = products(torch.nn.Linear(576, 576), 400, onednn=argument)
    assert (precision == "medium") == used
    assert error > 1 or "pinned" in why


def test_a_pin_against_it_needs_no_trial(monkeypatch):
    monkeypatch.setattr(cpu, "onednn_trial", lambda rows: pytest.fail("timed for nothing"))
    assert products(torch.nn.Linear(576, 576), 400, onednn=False) == ("highest", "not used: pinned")


def test_the_trial_is_made_with_as_many_rows_as_come(monkeypatch):
    monkeypatch.delenv(cpu.PIN, raising=False)
    asked = []
    monkeypatch.setattr(cpu, "onednn_trial", lambda rows: asked.append(rows) or (2.0, 1.0))
    for tokens in (52.5, 64, 400, 9000):
        products(torch.nn.Linear(2048, 2048), tokens)
    assert asked == [32, 64, 256, 512]


def test_the_trial_sees_inexact_products():
    class Rounded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            medium = function.overloadpacket is torch.ops.aten.mm and output.dtype == torch.float32
            return output.bfloat16().float() if medium and cpu.matmul_precision() == "medium" else output

    cpu.onednn_trial.cache_clear()
    with Rounded():
        assert cpu.onednn_trial()[1] > cpu.MAX_ERROR
    cpu.onednn_trial.cache_clear()


def test_products_inside_fast_are_float32_exact():
    torch.manual_seed(0)
    x, layer = torch.randn(400, 576), torch.nn.Linear(576, 1536)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad(), cpu.fast(layer, len(x)):
        assert (layer(x) - exact).norm() / exact.norm() < 1e-6


def test_a_precision_that_the_user_has_chosen_stays(trial):
    trial(2.0)
    torch.set_float32_matmul_precision("high")
    try:
        assert products(torch.nn.Linear(576, 576), 400) == (
            "high",
            "not used: you have set torch's precision of products",
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert products(torch.nn.Linear(576, 576), 400)[0] == "medium", "the answer is not kept for ever"


def test_plain_products_are_those_from_before(trial):
    trial(2.0)
    with cpu.fast(torch.nn.Linear(576, 576), 400):
        with cpu.plain_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
