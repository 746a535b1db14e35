"""Exercises: each check takes its solution, refuses the stub, and tells plausible mistakes apart with a hint."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from torch import nn
from torch.nn import functional as F

from lorakit import answers, checks, cli, exercises, lessons, outputs
from lorakit.checks import CheckFailed

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOLUTIONS = exercises.find_solutions(NOTEBOOKS)
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def answers_of(nb):
    """Yields (name of the check, the reader's function) for every exercise of a notebook."""
    names = {}
    exec("import torch\nfrom torch import nn", names)
    for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
        asked = re.fullmatch(r"checks\.(check_\w+)\((\w+)\)", cell.source)
        if asked:
            yield asked[1], names[asked[2]]
        else:
            exec(cell.source, names)


SOLVED = {check: answer for path in SOLUTIONS for check, answer in answers_of(read(path))}
STUBS = {check: answer for path in SOLUTIONS for check, answer in answers_of(exercises.derive(read(path)))}
EACH_CHECK = sorted(name for name in checks.__all__ if name.startswith("check_"))


# ---- the checks ----


def test_every_check_has_its_exercise():
    assert sorted(SOLVED) == sorted(STUBS) == EACH_CHECK == sorted(MISTAKES)
    assert all(len(mistakes) >= 3 for mistakes in MISTAKES.values())


@pytest.mark.parametrize("check", EACH_CHECK)
def test_a_solution_is_right(check, capsys):
    state = torch.random.get_rng_state()
    getattr(checks, check)(SOLVED[check])
    assert re.fullmatch(r"right: .+\n", capsys.readouterr().out), "one line"
    assert torch.equal(torch.random.get_rng_state(), state), "a check leaves the random state as it was"


@pytest.mark.parametrize("check", EACH_CHECK)
def test_a_stub_is_not(check, capsys):
    hint = "both gradients are zero for ever" if check == "check_layer" else "not written yet: your turn"
    with pytest.raises(CheckFailed, match=hint):
        getattr(checks, check)(STUBS[check])
    assert capsys.readouterr().out == ""


ODD_ANSWERS = {
    "nothing": None,
    "an ellipsis": ...,
    "a word": "word",
    "a number": 3,
    "not a number": float("nan"),
    "a scalar tensor": torch.tensor(2.0),
    "an empty tensor": torch.empty(0),
    "a tensor of three dimensions": torch.ones(2, 2, 2),
    "a pair": (torch.ones(3, 3), "b"),
    "a triple": (torch.ones(3, 3), None, 1.0),
    "zeros": (torch.zeros(2), torch.zeros(2, 2)),
    "a layer": nn.Linear(3, 3),
    "a class": dict,
}


@pytest.mark.parametrize("check", EACH_CHECK)
@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=list(ODD_ANSWERS))
def test_odd_answers_get_a_message_and_never_an_error(check, answer):
    with pytest.raises(CheckFailed) as caught:
        getattr(checks, check)(lambda *inputs: copy.deepcopy(answer))
    assert len(str(caught.value)) > 30


@pytest.mark.parametrize("check", EACH_CHECK)
def test_what_is_no_function_is_said_to_be_none(check):
    with pytest.raises(CheckFailed, match=r"expected a function, got int: pass its name, without calling it"):
        getattr(checks, check)(3)


@pytest.mark.parametrize("check", EACH_CHECK)
def test_an_exception_is_reported_with_the_line_it_came_from(check):
    def answer(*inputs):
        numbers = [1]
        return numbers[7]

    with pytest.raises(CheckFailed, match=r"your code raised IndexError: .*\n    in your line `return numbers\[7\]`"):
        getattr(checks, check)(answer)


def wrong_layer(frozen=True, wide_a=1.0, wide_b=0.0, scale=None, before="x", on_output=False):
    """A class that check_layer refuses, for one reason."""

    class Wrong(nn.Module):
        def __init__(self, base, rank, alpha, dropout):
            super().__init__()
            self.base = base.requires_grad_(not frozen)
            self.A = nn.Parameter(wide_a * torch.randn(rank, base.in_features))
            self.B = nn.Parameter(wide_b * torch.randn(base.out_features, rank))
            self.scale = {None: alpha / rank, "one": 1.0, "alpha": alpha}[scale]
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            if before == "both":
                x = self.dropout(x)
            inner = (self.dropout(x) if before == "x" else x) @ self.A.T
            inner = self.dropout(inner) if before == "B" else inner
            update = self.scale * inner @ self.B.T
            return self.base(x) + (self.dropout(update) if on_output else update)

    return Wrong


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def in_place(base, A, B, alpha):
    base.weight.data += alpha / len(A) * B @ A
    return base


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def counted(layers=None, full=False, square=False, matrices=2, percent=100.0, whole=1):
    def count(config, total, rank):
        width = config.hidden_size
        d_value = width if square else width // config.num_attention_heads * config.num_key_value_heads
        q, v = (width * width, width * d_value) if full else (rank * 2 * width, rank * (width + d_value))
        trainable = (layers or config.num_hidden_layers) * (q + v if matrices == 2 else q)
        return trainable, percent * trainable / (total + whole * trainable)

    return count


def approximated(cut=lambda U, S, Vh, k: (U[:, :k] * S[:k]) @ Vh[:k], frobenius=None, spectral=None):
    def best(matrix, k):
        U, S, Vh = svd(matrix)
        tail = S[k:].norm()
        return cut(U, S, Vh, k), frobenius(S, k) if frobenius else tail, spectral(S, k) if spectral else S[k]

    return best


def energy_rank(values=lambda S: S.square(), share=lambda x: x, plus=1):
    def rank_for_energy(matrix, wanted):
        captured = values(torch.linalg.svdvals(matrix)).cumsum(0)
        return int((captured / captured[-1] < share(wanted)).sum()) + plus

    return rank_for_energy


def normed(matrix, update):
    return matrix * update.norm() / matrix.norm()


def thin(update, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = update.shape
    return torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)


def cosines(A1, A2):
    return torch.linalg.svdvals(torch.linalg.qr(A1.T).Q.T @ torch.linalg.qr(A2.T).Q)


def shared(B, A, left, right):
    U, S, Vh = svd(B @ A)
    r = B.shape[1]
    return U[:, :r] * S[:r] ** left, S[:r, None] ** right * Vh[:r]


def grown(A, B, alpha, new_rank, rows=torch.randn, columns=torch.zeros, power=1.0):
    more = new_rank - len(A)
    A_new = torch.cat([A, rows(more, A.shape[1])])
    return A_new, torch.cat([B, columns(len(B), more)], dim=1), alpha * (new_rank / len(A)) ** power


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_largest_rank": [
        (lambda d_out, d_in: d_in // 2, "exactly as many numbers as the matrix"),
        (lambda d_out, d_in: d_in // 2 - 1, "right only for square matrices"),
        (lambda d_out, d_in: d_out * d_in // (d_out + d_in), "exactly as many numbers as the matrix"),
        (lambda d_out, d_in: -(-d_out * d_in // (d_out + d_in)), "exactly as many"),
        (lambda d_out, d_in: round((d_out * d_in - 0.01) / (d_out + d_in)), "exactly as many"),
        (lambda d_out, d_in: (d_out * d_in - 1) / (d_out + d_in), "should be 287, got 287.999"),
        (lambda d_out, d_in: min(d_out, d_in), "the largest rank that such a matrix can have"),
        (lambda d_out, d_in: 2047, "a matrix (576, 576): your rank should be 287, got 2,047"),
    ],
    "check_best_approximation": [
        (approximated(lambda U, S, Vh, k: U[:, :k] @ Vh[:k]), "leaves out the singular values"),
        (approximated(lambda U, S, Vh, k: (U[:, -k:] * S[-k:]) @ Vh[-k:]), "keeps the smallest"),
        (approximated(lambda U, S, Vh, k: (U * S) @ Vh), "is the matrix itself"),
        (approximated(lambda U, S, Vh, k: (U[:, : k + 1] * S[: k + 1]) @ Vh[: k + 1]), "has rank k + 1"),
        (approximated(lambda U, S, Vh, k: (Vh[:k].T * S[:k]) @ U[:, :k].T), "got (9, 6); is it transposed?"),
        (approximated(frobenius=lambda S, k: S[k:].square().sum()), "take the root"),
        (approximated(frobenius=lambda S, k: S[k:].sum()), "square, add, take the root"),
        (approximated(frobenius=lambda S, k: S[k:].norm() / S.norm()), "do not divide"),
        (approximated(spectral=lambda S, k: S[k - 1]), "the error is the first one left out"),
        (approximated(spectral=lambda S, k: S[0]), "not of the difference"),
        (approximated(spectral=lambda S, k: S[k:].norm()), "is the Frobenius one"),
    ],
    "check_rank_for_energy": [
        (energy_rank(values=lambda S: S), "energy is their square"),
        (energy_rank(plus=0), "is one too small: after cumsum"),
        (energy_rank(plus=2), "is one too large"),
        (energy_rank(share=lambda x: x**2), "energy is the norm squared"),
        (energy_rank(share=lambda x: 1 - x), "instead of capturing it"),
        (lambda matrix, share: 5, "your k should be 10, got 5"),
    ],
    "check_similarity": [
        (lambda A1, A2: (A1 @ A2.T).norm() ** 2 / min(len(A1), len(A2)), "make rows orthonormal"),
        (lambda A1, A2: (F.normalize(A1) @ F.normalize(A2).T).norm() ** 2 / min(len(A1), len(A2)), "not orthogonal"),
        (lambda A1, A2: cosines(A1, A2).square().sum(), "not divided by the smaller rank"),
        (lambda A1, A2: cosines(A1, A2).square().sum() / max(len(A1), len(A2)), "divided by the larger rank"),
        (lambda A1, A2: cosines(A1, A2).norm() / min(len(A1), len(A2)), "the norm, not its square"),
        (lambda A1, A2: cosines(A1, A2).mean(), "add their squares"),
        (lambda A1, A2: cosines(A1, A2).square().mean().sqrt(), "the root of the right one"),
        (lambda A1, A2: torch.linalg.qr(A1).Q.T @ torch.linalg.qr(A2).Q, "should have shape ()"),
    ],
    "check_control": [
        (lambda update, rank, seed: normed(torch.randn(update.shape), update), "multiply two thin ones"),
        (lambda update, rank, seed: thin(update, rank, seed), "divide by its own norm first"),
        (
            lambda update, rank, seed: (
                thin(update, rank, seed)
                * (torch.linalg.matrix_norm(update, 2) / torch.linalg.matrix_norm(thin(update, rank, seed), 2))
            ),
            "match the Frobenius norm, not the spectral one",
        ),
        (lambda update, rank, seed: -update, "of the update's input directions"),
        (lambda update, rank, seed: update[:, torch.randperm(update.shape[1])], "update's output directions"),
        (lambda update, rank, seed: normed(thin(update, rank, 0), update), "two seeds give the same matrix"),
        (lambda update, rank, seed: normed(thin(update, 1, seed), update), "has rank 1, not 3"),
        (lambda update, rank, seed: normed(thin(update.T, rank, seed), update), "should have shape (40, 60)"),
    ],
    "check_balance": [
        (lambda B, A: shared(B, A, 1, 0), "share the singular values equally"),
        (lambda B, A: shared(B, A, 1, 1), "counts the singular values twice"),
        (lambda B, A: shared(B, A, 0, 0), "has lost the singular values"),
        (lambda B, A: (B, A), "share the singular values equally"),
        (lambda B, A: (B * (A.norm() / B.norm()).sqrt(), A * (B.norm() / A.norm()).sqrt()), "one factor for all"),
        (lambda B, A: (A, B), "is it (A, B)?"),
        (lambda B, A: svd(B @ A)[::2], "cut U, S and Vh after r"),
    ],
    "check_count": [
        (counted(layers=1), "multiply by num_hidden_layers"),
        (counted(square=True), "SmolLM2-135M, r = 4: trainable takes V for a square matrix"),
        (counted(matrices=1), "V has an adapter too"),
        (counted(full=True), "an adapter has rank * (d_in + d_out)"),
        (counted(percent=1.0), "is a share, not in percent"),
        (counted(whole=0), "leaves the adapter out of the whole"),
        (
            lambda config, total, rank: (8_388_608, 0.124335),
            "r = 4: trainable should be 230,400, got 8,388,608",
        ),
        (lambda config, total, rank: 8_388_608, "expected `return trainable, percent`, got int"),
    ],
    "check_merge": [
        (lambda base, A, B, alpha: linear(base.weight + B @ A, base.bias), "did you forget the scale?"),
        (lambda base, A, B, alpha: linear(base.weight + alpha * B @ A, base.bias), "divide alpha by the rank"),
        (lambda base, A, B, alpha: linear(alpha / len(A) * B @ A, base.bias), "add it to the base's weight"),
        (lambda base, A, B, alpha: linear(base.weight, base.bias), "the update was not added"),
        (lambda base, A, B, alpha: linear(base.weight + alpha / len(A) * B @ A), "the base's bias is lost"),
        (lambda base, A, B, alpha: linear(base.weight + alpha / len(A) * B @ A, torch.zeros(len(B))), "use bias=False"),
        (lambda base, A, B, alpha: base.weight + alpha / len(A) * B @ A, "expected an nn.Linear, got Tensor"),
        (lambda base, A, B, alpha: base.weight + alpha / len(A) * A @ B, "your code raised RuntimeError: mat1"),
        (in_place, "an argument was changed in place"),
    ],
    "check_layer": [
        (wrong_layer(frozen=False), "base.bias, base.weight would train too"),
        (wrong_layer(wide_a=0.0), "both gradients are zero for ever"),
        (wrong_layer(wide_b=1.0), "B must start at zero"),
        (wrong_layer(scale="one"), "off by exactly alpha / r"),
        (wrong_layer(scale="alpha"), "divide alpha by the rank"),
        (wrong_layer(before="both"), "dropout may only touch the adapter's input"),
        (wrong_layer(before="nowhere"), "dropout does nothing in training mode"),
        (wrong_layer(before="B"), "dropout is at the wrong place"),
        (wrong_layer(before="nowhere", on_output=True), "dropout is at the wrong place"),
        (lambda base, rank, alpha, dropout: base, "two nn.Parameter named A and B"),
    ],
    "check_swap": [
        (lambda W, old, new: W + new[2] / len(new[0]) * new[1] @ new[0], "still holds the old adapter"),
        (lambda W, old, new: W - old[2] / len(old[0]) * old[1] @ old[0], "not got the new one"),
        (lambda W, old, new: 2 * W - SOLVED["check_swap"](W, old, new), "has the signs reversed"),
        (lambda W, old, new: W - old[1] @ old[0] + new[1] @ new[0], "is unscaled"),
        (lambda W, old, new: W + old[2] / len(old[0]) * (new[1] @ new[0] - old[1] @ old[0]), "the old adapter's scale"),
        (lambda W, old, new: W + new[2] / len(new[0]) * (new[1] @ new[0] - old[1] @ old[0]), "the new adapter's scale"),
    ],
    "check_first_update": [
        (lambda grad_W, A, alpha, lr: -lr * alpha / len(A) * grad_W @ A.T @ A, "has s once"),
        (lambda grad_W, A, alpha, lr: lr * (alpha / len(A)) ** 2 * grad_W @ A.T @ A, "the wrong sign"),
        (lambda grad_W, A, alpha, lr: -lr * grad_W, "is full fine-tuning's step"),
        (lambda grad_W, A, alpha, lr: -lr * (alpha / len(A)) ** 2 * grad_W, "not projected on the rows of A"),
        (lambda grad_W, A, alpha, lr: -lr * alpha / len(A) * grad_W @ A.T, "is the new B"),
        (lambda grad_W, A, alpha, lr: -lr * grad_W @ A.T @ A, "s = alpha / r comes twice"),
        (lambda grad_W, A, alpha, lr: -lr * (alpha / len(A)) ** 2 * A.T @ A @ grad_W, "your code raised RuntimeError"),
        (lambda grad_W, A, alpha, lr: -2 * lr * (alpha / len(A)) ** 2 * grad_W @ A.T @ A, "exactly the factor 2"),
    ],
    "check_grow": [
        (lambda *inputs: grown(*inputs, power=0.0), "alpha must grow as r does"),
        (lambda *inputs: grown(*inputs, power=0.5), "the square root is rsLoRA's rule"),
        (lambda *inputs: grown(*inputs, power=2.0), "is off by exactly the factor 2.5"),
        (lambda *inputs: grown(*inputs, rows=torch.zeros), "nothing will ever be learned"),
        (lambda *inputs: grown(*inputs, columns=torch.randn), "has grown by what was added"),
        (lambda *inputs: grown(*inputs, rows=lambda n, d: inputs[0][:1].expand(n, d)), "the new rows repeat the old"),
        (lambda A, B, alpha, r: (A, B, alpha), "A and B should have shapes (5, 9) and (7, 5)"),
        (lambda A, B, alpha, r: grown(A, B, alpha, r)[:2], "expected `return A, B, alpha`, got tuple of 2"),
    ],
}
EACH_MISTAKE = [(check, *mistake) for check, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize(("check", "answer", "hint"), EACH_MISTAKE, ids=[f"{c}: {hint}" for c, _, hint in EACH_MISTAKE])
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    with pytest.raises(CheckFailed, match=re.escape(hint)) as caught:
        getattr(checks, check)(answer)
    assert ": " in str(caught.value), "expected the input, then the message"
    assert "right" not in capsys.readouterr().out


def test_numbers_and_matrices_are_taken_in_any_form():
    checks.check_largest_rank(lambda *sizes: np.int64(SOLVED["check_largest_rank"](*sizes)))
    checks.check_swap(lambda *inputs: SOLVED["check_swap"](*inputs).double().numpy())
    checks.check_similarity(lambda A1, A2: SOLVED["check_similarity"](A1.requires_grad_(), A2))


def test_a_wrong_answer_without_a_known_reason_is_described():
    want = answers.random_matrix(3, 3, seed=0)
    for got, words in [
        (-2 * want, "is off by exactly the factor -2"),
        (want.T, "is the transpose of the right one"),
        (want / 0, "is not finite"),
        (want + 0.1 * want.norm() * torch.eye(3) / 3**0.5, "is off by 10.0% of its norm"),
        (want[:2], "should have shape (3, 3), got (2, 3)"),
    ]:
        with pytest.raises(CheckFailed, match=re.escape(f"small input: it {words}")):
            answers.judge(got, want, {}, "small input", "it")


def test_jupyter_shows_the_message_without_a_traceback():
    assert CheckFailed("off by one")._render_traceback_() == ["CheckFailed: off by one"]


# ---- the notebooks ----


@each_solution
def test_exercises_are_current(path):
    written = (NOTEBOOKS / "exercises" / path.name).read_bytes()
    assert written == exercises.render(path), "run `lorakit exercises`"


def test_every_notebook_of_exercises_has_solutions_and_a_lesson_number():
    names = {path.name for path in SOLUTIONS}
    assert names == {path.name for path in (NOTEBOOKS / "exercises").glob("*.ipynb")}
    assert len({name[:2] for name in names}) == len(names) >= 2


@each_solution
def test_exercises_are_whole(path):
    nb = read(NOTEBOOKS / "exercises" / path.name)
    nbformat.validate(nb)
    prose = [cell for cell in nb.cells if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    assert 3 <= len(prose) <= 6
    levels = []
    for task in prose:
        level, minutes = re.search(r"Difficulty (\d) of 3, about (\d+) minutes", task.source).groups()
        levels.append(int(level))
        assert 5 <= int(minutes) <= 30
        for part in ("<details><summary>Hint</summary>\n\n", "\n\n</details>\n\n", "**Common mistake:** "):
            assert part in task.source
        stub, check = nb.cells[nb.cells.index(task) + 1 :][:2]
        assert check.source.startswith("checks.check_")
        assert 3 <= len(stub.source.splitlines()) <= 20
    assert levels == sorted(levels), "expected rising difficulty"
    assert "# ---" not in "".join(cell.source for cell in nb.cells), "a mark was left"


@each_solution
def test_committed_solutions_are_one_clean_run(path):
    nb = read(path)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert outputs.find_litter(nb) == []
    tidy = copy.deepcopy(nb)
    assert outputs.clean(tidy) == []
    assert tidy == nb, "run `lorakit exercises --refresh`"
    for cell in code:
        if cell.source.startswith("checks."):
            assert "".join(map(outputs.output_text, cell.outputs)).startswith("right: ")


@pytest.mark.slow
@each_solution
def test_solutions_run(path, tmp_path):
    result = lessons.run_lesson(path, {}, tmp_path / path.name)
    assert not result.error
    assert result.wall_seconds < 60
    fresh, committed = read(result.path), read(path)
    assert [cell.get("outputs") for cell in fresh.cells] == [cell.get("outputs") for cell in committed.cells]


@pytest.mark.slow
@each_solution
def test_an_exercise_fails_with_a_message_and_no_traceback(path, tmp_path):
    result = lessons.run_lesson(NOTEBOOKS / "exercises" / path.name, {}, tmp_path / path.name)
    assert result.error.startswith("CheckFailed: not written yet")
    (failed,) = [out for cell in read(result.path).cells for out in cell.get("outputs", []) if "traceback" in out]
    assert failed.traceback == ["CheckFailed: not written yet: your turn"]


# ---- the generator ----


SOURCE = """\
def f(x):
    y = 2 * x
    # --- solution
    return y + 1
    # --- stub
    # if y:
    #     return y  # wrong
    #
    # --- end


def g():
    # --- solution
    return 1
    # --- end"""
STUB = """\
def f(x):
    y = 2 * x
    if y:
        return y  # wrong



def g():
    raise NotImplementedError("your turn")"""


def test_a_region_becomes_its_stub():
    assert exercises.stub_source(SOURCE) == STUB
    assert exercises.stub_source("x = 1  # --- solution in words") == "x = 1  # --- solution in words"


@pytest.mark.parametrize(
    ("marks", "got"),
    [
        (["# --- end"], "got '# --- end'"),
        (["# --- solution", "# --- solution", "# --- end"], "got '# --- solution'"),
        (["# --- stub", "# --- end"], "got '# --- stub'"),
        (["# --- solution"], "got the end of the cell"),
        (["# --- solution", "# --- stub"], "got the end of the cell"),
    ],
)
def test_marks_out_of_order_are_refused(marks, got):
    with pytest.raises(ValueError, match=got):
        exercises.stub_source("\n".join(marks))


def test_derived_notebooks_keep_ids_and_lose_outputs_and_answers(tmp_path, monkeypatch, capsys):
    cells = [
        new_markdown_cell("# Title"),
        new_markdown_cell("**Why.**", metadata={"tags": ["solution"]}),
        new_code_cell("def f():\n    # --- solution\n    return 1\n    # --- end"),
        new_code_cell("print(f())"),
    ]
    for folder in ("profiles", "solutions"):
        (tmp_path / "notebooks" / folder).mkdir(parents=True)
    path = tmp_path / "notebooks" / "solutions" / "07_x.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["exercises", "--refresh"]) == 0
    assert "07_x" in capsys.readouterr().out
    solved, derived = read(path), read(tmp_path / "notebooks" / "exercises" / path.name)
    assert solved.cells[3].outputs[0].text == "1\n"
    assert [cell.id for cell in derived.cells] == [cells[i].id for i in (0, 2, 3)]
    assert derived.cells[1].source == 'def f():\n    raise NotImplementedError("your turn")'
    assert all(cell.outputs == [] and cell.execution_count is None for cell in derived.cells[1:])
    path.write_text(path.read_text().replace("return 1", "return 1 / 0"))
    assert cli.main(["exercises", "--refresh"]) == 1, "a solution that fails is not saved"


def test_exercises_are_in_style():
    folders = [NOTEBOOKS / "exercises", NOTEBOOKS / "solutions"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *folders], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
