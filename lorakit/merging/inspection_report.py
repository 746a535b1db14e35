"""An inspected adapter as a report: for people one row a kind of layer and what is worth a look, for programs all."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from lorakit.merging.against_base import AgainstBase, Compared
from lorakit.merging.inspection import Inspection, Layer

NAMED = 3  # of a longer list
SHARES = ("relative_norm", "nf4_share")
BEFORE_FOUR_BITS = 1.0  # of the update's norm: what rounding a weight to four bits may move


def describe(found: Inspection, compared: Compared | None = None) -> str:
    """The short report: what it is, its layers by kind, warnings, and who serves it."""
    parts = [_head(found)]
    if found.layers:
        parts.append(_table(found.layers, compared))
    elif found.settings.get("peft_type") != "LORA":
        parts.append("\n".join(f"  {key} = {value}" for key, value in found.settings.items() if key != "peft_type"))
        parts.append("layers, norms and ranks are told of LoRA only")
    if notes := warnings(found, compared):
        parts.append("\n".join(notes))
    parts.append(_served(found))
    return "\n\n".join(parts)


def warnings(found: Inspection, compared: Compared | None = None) -> list[str]:
    """What is worth a look, one line each; `is_broken` says which adapters cannot be used."""
    notes = [f"broken: {problem}" for problem in found.problems]
    if found.not_finite:
        notes.append(f"broken: NaN or infinity in {_some(found.not_finite)}")
    if compared is not None:
        notes += [f"broken: {misfit}" for misfit in compared.misfits[:NAMED]]
        if len(compared.misfits) > NAMED:
            notes.append(f"broken: {len(compared.misfits) - NAMED} more layers do not fit")
    if found.idle:
        what = "turn nothing" if "DoRA" in found.method else "do nothing"
        notes.append(f"{len(found.idle)} of {len(found.layers)} layers {what} (zero update): {_some(found.idle)}")
    for kind in dict.fromkeys(part.kind for part in found.extra if found.layers):
        keys = [part.key for part in found.extra if part.kind == kind]
        numbers = sum(part.numbers for part in found.extra if part.kind == kind)
        notes.append(f"beside LoRA, {kind}: {numbers:,} numbers in {_some(keys)}")
    return notes + (_against_base(compared) if compared is not None else [])


def is_broken(found: Inspection, compared: Compared | None = None) -> bool:
    """True if something keeps the adapter from being used: damage, values that are not finite, another base."""
    return bool(found.problems or found.not_finite or (compared is not None and compared.misfits))


def as_record(found: Inspection, compared: Compared | None = None) -> dict[str, Any]:
    """Everything as plain values for JSON, which has no infinity and no NaN: such a number is None."""
    record: dict[str, Any] = asdict(found) | {"idle": found.idle, "warnings": warnings(found, compared)}
    if compared is not None:
        layers = [asdict(each) | {name: getattr(each, name) for name in SHARES} for each in compared.layers]
        record["against_base"] = asdict(compared) | {"layers": layers}
    return _finite(record)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head(found: Inspection) -> str:
    size = f"{found.numbers:,} numbers, {', '.join(found.dtypes)}, {found.bytes / 1e6:.2f} MB"
    lines = [f"{found.folder}: {found.method}, saved by {found.saved_by}; {size}"]
    if found.base:
        lines.append(f"for {found.base}")
    return "\n".join(lines)


def _table(layers: Sequence[Layer], compared: Compared | None) -> str:
    there = {each.name: each for each in compared.layers} if compared is not None else {}
    head = ["layers", "number", "out x in", "rank", "alpha", "scale", "norm", "effective rank"]
    rows = [head + (["norm / W", "intruders", "NF4 error / norm"] if there else [])]
    for kind in dict.fromkeys(layer.kind for layer in layers):
        group = [layer for layer in layers if layer.kind == kind]
        row = [kind, str(len(group)), _span((f"{a} x {b}" for a, b in (layer.shape for layer in group)), "various")]
        row += [_numbers(getattr(layer, name) for layer in group) for name in ("rank", "alpha", "scale", "norm")]
        row.append(_numbers(layer.effective_rank for layer in group))
        if there:
            row += _compared_cells([there[layer.name] for layer in group if layer.name in there])
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([*lines, "three numbers: the least, the median and the largest of these layers"])


def _compared_cells(group: Sequence[AgainstBase]) -> list[str]:
    counts = [each.intruders for each in group if each.intruders is not None]
    intruders = f"{sum(counts)} in {sum(count > 0 for count in counts)}" if any(counts) else "0" if counts else "-"
    return [_numbers(each.relative_norm for each in group), intruders, _numbers(each.nf4_share for each in group)]


def _against_base(compared: Compared) -> list[str]:
    notes = []
    counts = [each.intruders for each in compared.layers if each.intruders]
    if counts:
        notes.append(
            f"{sum(counts)} intruder dimensions in {len(counts)} of {len(compared.layers)} layers: of the first "
            f"{compared.k} left singular vectors, those with a cosine below {compared.epsilon:g} to all of the base's"
        )
    lost = [each.name for each in compared.layers if BEFORE_FOUR_BITS < each.nf4_share < float("inf")]
    if lost:
        notes.append(
            f"before a merge into four bits: in {len(lost)} of {len(compared.layers)} layers NF4 rounds the weight "
            "by more than the update moves it; merge into 16 bits, or keep the adapter apart"
        )
    return notes


def _served(found: Inspection) -> str:
    width = max(len(each.engine) for each in found.served)
    lines = ["served as it is by"]
    for each in found.served:
        reason = f": {each.reason}" if each.reason else ""
        lines.append(f"  {each.engine.ljust(width)}  {'yes' if each.able else 'no'}{reason}")
        if not each.able:
            lines.append(f"  {' ' * width}      {each.source}")
    return "\n".join(lines)


def _numbers(values: Iterable[float | None]) -> str:
    """One number if all are it, else least, median and largest; what is not finite is left out."""
    known = sorted(value for value in values if value is not None and value < float("inf"))
    if not known:
        return "-"
    if f"{known[0]:.3g}" == f"{known[-1]:.3g}":
        return f"{known[0]:.3g}"
    return " ".join(f"{value:.2g}" for value in (known[0], median(known), known[-1]))


def _span(values: Iterable[str], otherwise: str) -> str:
    known = set(values)
    return known.pop() if len(known) == 1 else otherwise


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
