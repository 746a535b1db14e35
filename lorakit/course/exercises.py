"""Exercise notebooks out of their solutions: what a reader should write is replaced by a stub, the rest stays."""

import copy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lorakit._atomic import write_atomically
from lorakit.course.outputs import clean

SOLUTION, STUB, END = "# --- solution", "# --- stub", "# --- end"  # lines around what the reader should write
DEFAULT_STUB = 'raise NotImplementedError("your turn")'
TAG = "solution"  # of a cell that only the solutions have


def stub_source(source: str) -> str:
    """Replaces every region of a code cell that a reader should write.

    A region runs from `# --- solution` to `# --- end`. What replaces it are the commented lines after its
    `# --- stub`, uncommented; without them, a line that raises NotImplementedError.

    Raises:
        ValueError: the three marks do not come in this order.
    """
    lines: list[str] = []
    stub: list[str] = []
    state = END
    for line in source.split("\n"):
        text = line.strip()
        if text in (SOLUTION, STUB, END):
            if (state, text) not in {(END, SOLUTION), (SOLUTION, STUB), (SOLUTION, END), (STUB, END)}:
                raise ValueError(f"expected {SOLUTION!r}, {STUB!r} if any, {END!r}, got {text!r} after {state!r}")
            state, indent = text, line[: line.index("#")]
            if text == END:
                lines += stub or [indent + DEFAULT_STUB]
                stub = []
        elif state == STUB:
            stub.append(line.replace("# ", "", 1) if text != "#" else "")
        elif state == END:
            lines.append(line)
    if state != END:
        raise ValueError(f"expected {END!r} after {state!r}, got the end of the cell")
    return "\n".join(lines)


def derive(solutions: NotebookNode) -> NotebookNode:
    """Returns the exercises of a notebook of solutions: stubs, no outputs, no cells tagged `solution`, the same ids."""
    nb = copy.deepcopy(solutions)
    nb.cells = [cell for cell in nb.cells if TAG not in cell.metadata.get("tags", [])]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = stub_source(cell.source), [], None
    clean(nb)
    return nb


def render(solutions: Path) -> bytes:
    """Returns the file of exercises that belongs to a file of solutions; the same bytes each time."""
    return (nbformat.writes(derive(nbformat.read(solutions, as_version=4))) + "\n").encode()


def generate(notebooks: Path) -> list[Path]:
    """Writes `exercises/NN_*.ipynb` for every `solutions/NN_*.ipynb` of the course's notebooks; returns their paths."""
    files = {notebooks / "exercises" / path.name: render(path) for path in find_solutions(notebooks)}
    (notebooks / "exercises").mkdir(exist_ok=True)
    write_atomically(files)
    return list(files)


def find_solutions(notebooks: Path) -> list[Path]:
    """Returns the notebooks of solutions, in order."""
    return sorted((notebooks / "solutions").glob("[0-9][0-9]_*.ipynb"))
