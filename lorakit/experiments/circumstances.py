"""What a result may depend on besides its settings: the device, its threads, versions, and what was done for speed."""

import platform
import sys
from functools import cache
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy", "lorakit")


def circumstances() -> dict[str, Any]:
    """The circumstances of a run in this process, asked when it has ended; plain values.

    Returns:
        `device`, as `device` says; `threads` of torch; `versions` of what is loaded; `speed`, the decisions of
        `lorakit.speed.accelerated`, where there are any.
    """
    torch = sys.modules.get("torch")
    found = {
        "device": device(),
        "threads": torch.get_num_threads() if torch else None,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES if name in sys.modules},
    }
    decisions = getattr(sys.modules.get("lorakit.speed.accelerated"), "decisions", None)
    return found | ({"speed": decisions()} if decisions else {})


def device() -> str:
    """The accelerator on which this process has put tensors; without one the processor, and what torch uses of it."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        return torch.cuda.get_device_name()
    if torch and torch.backends.mps.is_available() and torch.mps.driver_allocated_memory():
        return f"mps, {processor()}"
    return ", ".join(["cpu", processor(), *([torch.backends.cpu.get_cpu_capability()] if torch else [])])


@cache
def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine()
