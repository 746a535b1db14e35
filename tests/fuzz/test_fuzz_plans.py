"""Whatever a plan says, `lorakit sweep --dry-run` counts its runs or says in one line what is wrong."""

import contextlib
import io

import yaml
from helpers.fuzz import fuzz
from hypothesis import strategies as st

from lorakit import cli
from lorakit.experiments.plan import FORMS

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4)
)
KEYS = st.one_of(st.sampled_from([*FORMS, "x", "y"]), SCALARS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
FUNCTIONS = st.sampled_from(["runs.py:run", "runs.py:nothing", "bad.py:run", "json:dumps", ":", ".json:x", "runs.py"])
GRIDS = st.dictionaries(st.sampled_from(["x", "y", ""]), VALUES, max_size=2)
PLANS = st.fixed_dictionaries({"function": FUNCTIONS | VALUES, "grid": GRIDS | VALUES}).flatmap(
    lambda plan: st.dictionaries(KEYS, VALUES, max_size=2).map(lambda more: plan | more)
)
MARKS = st.sampled_from(
    ["[", "]", "{", "}", ": ", "- ", "&a ", "*a", "!!set ", "\t", "\0", "---\n", "'", '"', "\u2028", "? "]
)


def test_plans(tmp_path):
    (tmp_path / "runs.py").write_text("def run(x, y=0):\n    return {}\n")
    (tmp_path / "bad.py").write_text("1 / 0\n")

    def check(text):
        (tmp_path / "plan.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["sweep", str(tmp_path / "plan.yaml"), "--dry-run"])
        assert code in (0, 2)
        assert err.getvalue().count("\n") == (code == 2), err.getvalue()
        assert {path.name for path in tmp_path.iterdir()} <= {"plan.yaml", "runs.py", "bad.py", "__pycache__"}

    written = PLANS.map(lambda plan: yaml.safe_dump(plan, allow_unicode=True))
    torn = st.tuples(written, st.integers(0, 80), st.integers(0, 9), MARKS).map(
        lambda edit: edit[0][: edit[1]] + edit[3] + edit[0][edit[1] + edit[2] :]
    )
    fuzz("plans", check, st.one_of(written, torn, st.text(max_size=40)))
