"""What the outputs of a notebook may hold: the headline of a lesson, and the laws for outputs that are committed."""

import re

from nbformat import NotebookNode, from_dict

from lorakit._progress import MIME_METADATA

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LITTER = {  # what no committed output may hold
    "a machine path": re.compile(r"/(home|root|Users|tmp|usr|opt|mnt)/|\b[A-Z]:\\|site-packages|file:/{2}"),
    "a timestamp": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
    "a memory address": re.compile(r"\b0x[0-9a-f]{8,}"),
    "a warning": re.compile(r"Warning:"),
    "a progress bar": re.compile(r"\d%\||\r|\d(it/s|s/it)\b"),
    "a terminal colour": ANSI,
}


def headline(nb: NotebookNode) -> str:
    """Returns the beginning of what the cell tagged `headline` printed, in one line."""
    cells = [cell for cell in nb.cells if "headline" in cell.metadata.get("tags", [])]
    texts = [output_text(output) for cell in cells for output in cell.get("outputs", [])]
    return " ".join(" ".join(texts).split())[:100]


def output_text(output: NotebookNode) -> str:
    """Returns the text of one output: a stream's, or that of its text and SVG representations."""
    data = output.get("data", {})
    return output.get("text", "") + "\n".join(data[key] for key in data if key.startswith("text/") or "svg" in key)


def clean(nb: NotebookNode) -> list[str]:
    """Removes from a notebook what differs between machines and runs; returns what only its author can mend."""
    complaints = []
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata = from_dict({"kernelspec": kernelspec, "language_info": {"name": "python"}})
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = from_dict({"tags": tags} if tags else {})
        bars = [out for out in cell.get("outputs", []) if MIME_METADATA.items() <= out.get("metadata", {}).items()]
        if bars and "nbval-ignore-output" not in tags:
            complaints.append(f"cell {cell.execution_count} draws a progress bar: tag it nbval-ignore-output")
        if bars:
            cell.outputs = [out for out in cell.outputs if out not in bars]
    return complaints


def find_litter(nb: NotebookNode) -> list[str]:
    """Returns a complaint for each output that must not be committed."""
    complaints = []
    for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            text = output_text(output)
            matches = {name: pattern.search(text) for name, pattern in LITTER.items()}
            found = [f"{name}: {text[max(m.start() - 20, 0) : m.end() + 40]!r}" for name, m in matches.items() if m]
            found += ["an error"] * (output.output_type == "error")
            found += [f"stderr: {text[:60]!r}"] * (output.get("name") == "stderr")
            complaints += [f"cell {cell.execution_count} shows {what}" for what in found]
    return complaints
