"""Measures lorakit against PEFT and TRL on this machine, and writes results.json and the README's table.

    python tests/benchmarks              all, about 25 minutes on two cores
    python tests/benchmarks step many    some of them; the others' results stay
    ROUNDS=1 python tests/benchmarks     fewer rounds

Nothing else should run meanwhile. Results are kept after every case.
"""

import json
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from cases import CASES  # noqa: E402

from lorakit._atomic import write_atomically  # noqa: E402
from lorakit.course import doctor  # noqa: E402

RESULTS, README = HERE / "results.json", HERE.parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ROWS = {  # what stands in the README: the comparison, the arm
    "whole SQL training, float32, against TRL's SFTTrainer": ("whole SQL training", "lorakit, float32"),
    "whole SQL training, bfloat16, against TRL's SFTTrainer": ("whole SQL training", "lorakit, bfloat16"),
    "whole SQL training, float32, against a plain PEFT loop": (
        "training, against the loop",
        "lorakit, float32",
    ),
    "whole SQL training, bfloat16, against a plain PEFT loop": ("training, against the loop", "lorakit, bfloat16"),
    "a LoRA step of the same arithmetic, float32": ("LoRA step, float32", "lorakit"),
    "of this, with PEFT's layers and lorakit's settings": ("LoRA step, float32", "PEFT, lorakit's settings"),
    "a LoRA step of the same arithmetic, bfloat16": ("LoRA step, bfloat16", "lorakit"),
    "memory that a step adds, float32": ("memory a step adds, float32", "lorakit"),
    "memory that a step adds, bfloat16": ("memory a step adds, bfloat16", "lorakit"),
    "eight adapters of the tiny base at once, against one by one": ("eight adapters of the tiny base", "lorakit"),
    "ten short runs recorded by sweep, against a loop": ("sweep of ten short runs", "sweep"),
    "merge and unmerge": ("merge + unmerge", "lorakit"),
    "save and load an adapter": ("save + load", "lorakit"),
    "a QLoRA step (NF4, double quantisation), float32, against PEFT on bitsandbytes": (
        "QLoRA step, float32",
        "lorakit",
    ),
    "a QLoRA step, bfloat16": ("QLoRA step, bfloat16", "lorakit"),
    "quantise to NF4, against bitsandbytes": ("quantise to NF4", "lorakit"),
    "dequantise to float32": ("dequantise from NF4, float32", "lorakit"),
    "dequantise to bfloat16": ("dequantise from NF4, bfloat16", "lorakit"),
    "a DoRA step, float32": ("DoRA step, float32", "lorakit"),
    "a DoRA step, bfloat16": ("DoRA step, bfloat16", "lorakit"),
    "memory that a DoRA step adds, float32": ("memory a DoRA step adds, float32", "lorakit"),
    "memory that a DoRA step adds, bfloat16": ("memory a DoRA step adds, bfloat16", "lorakit"),
    "a step of one DoRA layer, float32": ("step of one DoRA layer", "lorakit"),
    "memory that it adds": ("memory that a step of one DoRA layer adds", "lorakit"),
    "eight rows with eight adapters, a pass, against PEFT": ("a pass of eight rows, against PEFT", "eight adapters"),
    "of generating 16 tokens": ("eight rows generated, against PEFT", "eight adapters"),
    "eight rows with eight adapters, a pass, against one adapter for all": (
        "a pass of eight rows, against one adapter",
        "eight adapters",
    ),
    "of generating 16 tokens, against one": ("eight rows generated, against one adapter", "eight adapters"),
    "two adapters added and cut to rank 16, 4096 wide, against PEFT's svd": ("two adapters to rank 16", "lorakit"),
}


def circumstances() -> dict:
    """What a figure depends on besides the code."""
    report = doctor.examine()
    versions = {
        name: report["versions"][name] for name in ("python", "torch", "transformers", "peft", "trl", "bitsandbytes")
    }
    machine = {name: report["machine"].get(name) for name in ("cpu", "cores", "cpu_flags", "onednn_gain")}
    return {"versions": versions, "machine": machine, "threads": torch.get_num_threads(), "date": f"{date.today()}"}


def table(results: dict) -> str:
    """The README's table, with the circumstances under which it was measured."""
    lines = ["| what | lorakit's share of the time (or memory), and its range |", "|---|---|"]
    for label, (name, arm) in ROWS.items():
        if name in results["found"]:
            each = results["found"][name]["arms"][arm]
            low, high = each["ratio_range"]
            digits = 2 if each["ratio"] > 0.095 else 4
            lines.append(f"| {label} | {each['ratio']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) |")
    found, where = results["found"], results["circumstances"]
    notes = []
    if "whole SQL training" in found:
        arms = found["whole SQL training"]["arms"]
        shares = "; ".join(f"{arm} {sum(a['accuracy']) / len(a['accuracy']):.1%}" for arm, a in arms.items())
        notes.append(f"Right answers on new tables after the trainings, means of seeds: {shares}.")
    for dtype in ("float32", "bfloat16"):
        if f"share of the products, {dtype}" in found:
            each = found[f"share of the products, {dtype}"]
            share, speed = each["arms"]["its products alone"]["ratio"], each["GFLOP_per_s"]
            notes.append(f"The matrix products alone are {share:.0%} of a {dtype} step ({speed:.0f} GFLOP/s).")
    if "gradients against PEFT" in found:
        worst = found["gradients against PEFT"]["worst"]
        notes.append(f"Gradients differ from PEFT's by at most {worst:.0e} of a tensor's norm.")
    machine, versions = where["machine"], where["versions"]
    notes.append(
        f"Measured with `python tests/benchmarks` on {where['threads']} threads of {machine['cpu']}: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )
    return "\n".join([*lines, "", *notes])


def main(names: list[str]) -> None:
    """Runs the named cases, all without names."""
    if unknown := set(names) - set(CASES):
        sys.exit(f"expected names from {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"found": {}}
    results["circumstances"] = circumstances()
    for name in names or CASES:
        print(name, flush=True)
        for label, record in CASES[name]().items():
            results["found"][label] = record
            for arm, each in record.get("arms", {"": record}).items():
                values = [f"{key} {value:.3g}" for key, value in each.items() if isinstance(value, float)]
                print(f"  {label}: {arm} {', '.join(values)}", flush=True)
        readme = README.read_text(encoding="utf-8")
        head, rest = readme.split(BEGIN)
        readme = head + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1]
        text = json.dumps(results, indent=1) + "\n"
        write_atomically({RESULTS: text.encode(), README: readme.encode()})


if __name__ == "__main__":
    main(sys.argv[1:])
