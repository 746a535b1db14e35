"""The table of symbols: every symbol of the lessons and exercises stands in it, once."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
EACH = sorted([*NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"), *NOTEBOOKS.glob("solutions/[0-9][0-9]_*.ipynb")])
SYMBOLS = (NOTEBOOKS / "notation.md").read_text(encoding="utf-8")
GREEK = {"alpha", "beta", "gamma", "delta", "Delta", "epsilon", "eta", "theta", "lambda", "Lambda", "mu", "nu", "phi"}
GREEK |= {"pi", "rho", "sigma", "Sigma", "tau", "chi", "psi", "omega", "Omega"}
NAMES = r"\\(?:text|texttt|mathrm|operatorname)\{[^}]*\}|\bd(?:x|y|xa|A|B)\b"  # words, and gradients named as in code


def symbols(text):
    """The letters in the formulas of a markdown text, Greek ones by name."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", " ", text, flags=re.DOTALL)
    found = set()
    for formula in re.findall(r"\$\$?([^$]+)\$\$?", prose):
        letters = re.sub(NAMES, " ", formula)
        found |= GREEK & set(re.findall(r"\\([A-Za-z]+)", letters))
        found |= set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", letters)))
    return found


def test_letters_are_found_and_words_are_not():
    text = r"$s\,BA$, $\Delta W_\text{in}$ and `$k$`, $dxa = s\,dy\,B$, $$\frac{\alpha}{r} \quad \texttt{no}$$"
    assert symbols(text) == {"s", "B", "A", "Delta", "W", "alpha", "r"}


@pytest.mark.parametrize("path", EACH, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_symbol_is_in_the_table(path):
    prose = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    strange = sorted(symbols(prose) - symbols(SYMBOLS))
    assert strange == [], "add it to notebooks/notation.md, or take the symbol that is there"


def test_no_symbol_is_explained_twice():
    rows = [row.split("|")[1] for row in SYMBOLS.splitlines() if row.startswith("| $")]
    each = [symbol for row in rows for symbol in re.findall(r"\$([^$]+)\$", row)]
    assert len(each) == len(set(each)) > 30
