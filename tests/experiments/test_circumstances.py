"""What is noted of a run's circumstances is what it had."""

import sys
from types import SimpleNamespace

import torch

from lorakit.experiments import circumstances as module
from lorakit.experiments.circumstances import circumstances, device, processor


def test_the_processor_has_its_name():
    assert processor().strip()
    assert device() == f"cpu, {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    found = circumstances()
    assert found["device"] == device()
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "torch", "numpy"} <= set(found["versions"])


def test_an_accelerator_counts_when_it_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert device().startswith("cpu, ")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1_000)
    assert device() == "NVIDIA H100"


def test_an_architecture_where_the_system_tells_no_name(monkeypatch, tmp_path):
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert processor.__wrapped__() == "aarch64"


def test_what_was_done_for_speed_is_told_where_there_is_any(monkeypatch):
    monkeypatch.setitem(sys.modules, "lorakit.speed.accelerated", SimpleNamespace(decisions=lambda: {"onednn": True}))
    assert circumstances()["speed"] == {"onednn": True}
    monkeypatch.setitem(sys.modules, "lorakit.speed.accelerated", SimpleNamespace())
    assert "speed" not in circumstances()
