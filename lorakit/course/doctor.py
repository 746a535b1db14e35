"""What this machine has: versions, processor, memory, the base model's cache, and the traps known to be set here."""

import os
import platform
import re
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lorakit.speed import accelerated
from lorakit.speed.cpu import THREAD_ENV

VERSIONS = (
    *("lorakit", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"),
    *("safetensors", "gguf", "papermill", "nbval", "jupyterlab"),
)
CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE")
MIN_MEMORY_BYTES = 4e9
MIN_DISK_BYTES = 2e9


def examine() -> dict[str, Any]:
    """Looks at this machine without a network and without loading a model.

    Returns:
        A report of plain values: `versions`, `machine`, `model`, `speed` (what makes training faster here, and why),
        `missing` (packages the course needs) and `traps`.
    """
    missing, outside = check_requirements()
    machine, model = _machine(), _model()
    report: dict[str, Any] = {
        "versions": _versions(),
        "machine": machine,
        "model": model,
        "speed": accelerated.explain(),
    }
    report["missing"] = missing
    return report | {
        "traps": [f"{each}: outside the range that lorakit asks for" for each in outside] + find_traps(report)
    }


def render(report: dict[str, Any]) -> str:
    """Returns the report as text for people."""
    lines = []
    for title in ("versions", "machine", "model", "speed"):
        lines.append(title)
        lines += [f"  {_label(name):<17} {_words(name, value)}" for name, value in report[title].items()]
    for title, none in (("missing", "nothing that the course needs"), ("traps", "none known on this machine")):
        lines += [title, *(f"  - {line}" for line in report[title] or [none])]
    if report["missing"]:
        lines.append("install what is missing: pip install 'lorakit[course]'")
    return "\n".join(lines)


def _label(name: str) -> str:
    return name if name.isupper() else name.removesuffix("_bytes").replace("_", " ")


def _words(name: str, value: Any) -> str:
    if value is None:
        return "not installed" if name in VERSIONS else "none"
    if name.endswith("_bytes"):
        return f"{value / 1e9:.1f} GB"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# ---- packages ----


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_requirements(extra: str = "course") -> tuple[list[str], list[str]]:
    """Compares what is installed with lorakit's own requirements.

    Args:
        extra: the set of optional packages that counts as needed.

    Returns:
        Requirements that are missing, and installed packages ("torch 2.1.0") that are outside their range.
    """
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires("lorakit") or []]
    except (ImportError, metadata.PackageNotFoundError) as error:
        return [f"{error.name or error} (nothing can be checked without it)"], []
    extras, missing, outside = {"", extra}, [], []
    for each in requirements:  # "course" may ask for lorakit[models]: those extras count too
        if each.name == "lorakit" and each.marker and each.marker.evaluate({"extra": extra}):
            extras |= each.extras
    for each in requirements:
        needed = each.marker is None or any(each.marker.evaluate({"extra": name}) for name in extras)
        version = _version(each.name)
        if each.name != "lorakit" and needed and version is None:
            missing.append(f"{each.name}{each.specifier}")
        elif version is not None and not each.specifier.contains(version, prereleases=True):
            outside.append(f"{each.name} {version}")
    return missing, sorted(set(outside))


# ---- hardware ----


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_name(), "cores": cores}
    with suppress(ImportError):
        import psutil

        memory = psutil.virtual_memory()
        found["physical_cores"] = psutil.cpu_count(logical=False)
        found |= {"memory_bytes": memory.total, "free_memory_bytes": min(memory.available, _container_bytes())}
    with suppress(ImportError):
        import torch

        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        found["cpu_flags"] = " ".join(flag for flag in CPU_FLAGS if able.get(flag)) or "none of " + " ".join(CPU_FLAGS)
        found |= {"torch_threads": torch.get_num_threads(), "torch_cuda_build": torch.version.cuda}
        found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        found["mps"] = torch.backends.mps.is_available()
    return found | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def _cpu_name() -> str:
    with suppress(OSError):
        if name := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return name[1]
    return platform.processor() or "unknown"


def _container_bytes() -> float:
    """What the control group of a container still allows; infinite elsewhere."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such file; or the limit is the word "max"
        return float((group / "memory.max").read_text()) - float((group / "memory.current").read_text())
    return float("inf")


def _model() -> dict[str, Any]:
    try:
        from lorakit.models import download
    except ImportError:
        return {"cached": False}
    folder = download.cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    wheels = [name for name, source in download.MODELS.items() if isinstance(source, download.WheelModel)]
    cached = {f"{name}_cached": (folder / name / download.MANIFEST).is_file() for name in wheels}
    return {"cache": str(folder)} | cached | {"free_disk_bytes": shutil.disk_usage(existing).free}


# ---- traps ----


def find_traps(report: dict[str, Any]) -> list[str]:
    """Returns a sentence for every trap that is set for a machine with such a report."""
    versions, machine, traps = report["versions"], report["machine"], []
    if versions.get("bitsandbytes") and "avx512_bf16" in machine.get("cpu_flags", "").split():
        traps.append(
            "bitsandbytes on a CPU with AVX512-BF16: the first forward in eval mode repacks 4-bit weights in place; "
            "merging and dequantising are then wrong, and training gets no gradient through them: call "
            "lorakit.layers.bnb.prevent_repacking() before loading in 4 bits (lorakit's own layers see to it)"
        )
    if versions.get("bitsandbytes") and "avx512_f" in machine.get("cpu_flags", "").split():
        traps.append(
            "bitsandbytes 0.50 on a CPU with AVX-512: 4-bit layers whose rows are not a whole number of blocks (of 64 "
            "by default) are dequantised with wrong scales; lorakit's NF4Linear is right there"
        )
    if machine.get("torch_cuda_build") and not machine.get("gpu"):
        traps.append("torch is a CUDA build but sees no GPU: it works, and takes gigabytes more than the CPU build")
    threads, cores = machine.get("torch_threads", 0), machine["cores"]
    omp = re.match(r"\d+", machine.get("OMP_NUM_THREADS") or "")
    if max(threads, int(omp[0]) if omp else 0) > cores:
        traps.append(f"more threads than the {cores} cores: steps get several times slower (see OMP_NUM_THREADS)")
    if threads == 1 < cores:
        traps.append(f"torch uses 1 of {cores} cores (see OMP_NUM_THREADS)")
    if (machine.get("system") or "").startswith("Linux") and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(machine):
        settings = " ".join(f"{name}={value}" for name, value in THREAD_ENV.items())
        traps.append(
            f"{settings} is not set: beside another busy program, threads that wait for each other make a step several "
            "times slower; set it before Python starts (make and lorakit run do)"
        )
    if (machine.get("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE"):
        traps.append(
            "HF_HUB_OFFLINE is set: models and data from the hub load only if they are cached (the course needs none)"
        )
    if machine.get("free_memory_bytes", MIN_MEMORY_BYTES) < MIN_MEMORY_BYTES:
        traps.append("less than 4 GB of memory are free: lessons that train the base model may be killed")
    if report["model"].get("free_disk_bytes", MIN_DISK_BYTES) < MIN_DISK_BYTES:
        traps.append("less than 2 GB are free where the base model is cached")
    return traps
