"""Exercises: each check takes its solution, refuses the stub, and tells plausible mistakes apart with a hint."""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import peft
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from peft.tuners.tuners_utils import check_target_module_exists
from scipy.stats import t
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorakit import cli, count, inject, remove
from lorakit.course import checks, exercises, lessons, outputs
from lorakit.course.checks import CheckFailed, grading, lesson_03_sft, lesson_04_qlora
from lorakit.experiments import stats
from lorakit.layers import nf4
from lorakit.models.quantize import quantize_model
from lorakit.models.targets import is_named
from lorakit.training.batch import collate

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SOLUTIONS = exercises.find_solutions(NOTEBOOKS)
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def is_measured(cell):
    """True for a cell that trains and measures: it takes seconds, and shows other numbers every time."""
    return "nbval-ignore-output" in cell.metadata.get("tags", [])


def answers_of(nb):
    """Yields (name of the check, the reader's function) for every exercise of a notebook."""
    names = {}
    exec("import torch\nfrom torch import nn", names)
    for cell in (cell for cell in nb.cells if cell.cell_type == "code" and not is_measured(cell)):
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


def masked(**wrong):
    """Right answers but for the parts in `wrong`: functions of the right ones, the prompt's and the text's length."""

    def mask(prompt_ids, completion_ids, length, pad):
        ids, seen, labels = SOLVED["check_mask"](prompt_ids, completion_ids, length, pad)
        t = SimpleNamespace(ids=ids, seen=seen, labels=labels, pad=pad)
        t.n, t.end = len(prompt_ids), len(prompt_ids + completion_ids)
        return tuple(wrong[name](t) if name in wrong else getattr(t, name) for name in ("ids", "seen", "labels"))

    return mask


def modern_but(change):
    """Right settings, changed by a function of them and of what was given."""

    def modern(settings):
        new = SOLVED["check_modern"](settings)
        changed = change(new, settings)
        return new if changed is None else changed

    return modern


def renamed(settings, **names):
    return {names.get(name, name): value for name, value in settings.items()}


def matching(in_list=is_named, in_string=re.fullmatch):
    def matches(name, targets):
        if isinstance(targets, str):
            return bool(in_string(targets, name))
        return any(in_list(name, target) for target in targets)

    return matches


def differing(different=lambda a, b: not torch.equal(a, b), mode=False, back=True, grad=False, switch=True):
    """A function that check_is_active refuses, for one reason."""

    def is_active(model, ids):
        was = model.training
        model.train(mode if mode is not None else was)
        with torch.set_grad_enabled(grad):
            on = model(ids).logits
            off = model.disable_adapter()
            off.__enter__()
            without = model(ids).logits
            if switch:
                off.__exit__(None, None, None)
        model.train(was if back else model.training)
        return different(on, without)

    return is_active


def compared(models=2, seed=0, adapt=True, thaw=False, spare=False, **wrong):
    """A comparison that check_compare refuses, for one reason; `wrong` makes other entries of the record."""

    def compare(make_model, examples):
        record, batch, bases = {}, collate(examples), [make_model() for _ in range(models)]
        for arm, model in zip(("LoRA", "full"), (bases * 2)[:2], strict=True):
            if seed is not None:
                torch.manual_seed(seed)
            if arm == "LoRA" and adapt:
                inject(model, rank=2, alpha=4)
            if arm == "full" or thaw:
                model.requires_grad_(True)
            if arm == "full" and spare:
                model.get_input_embeddings().requires_grad_(False)
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
            for _ in range(4):
                optimizer.zero_grad()
                losses.append(model(**batch).loss)
                losses[-1].backward()
                optimizer.step()
            n = sum(p.numel() for p in params)
            record[arm] = {"trained": n, "seconds": 1.0, "gradient_bytes": 4 * n, "optimizer_bytes": 8 * n}
            record[arm] |= {"first_loss": losses[0].item(), "final_loss": losses[-1].item()}
            record[arm] |= {name: make(record[arm], arm, model) for name, make in wrong.items()}
        return record

    return compare


def everything(model):
    return sum(p.numel() for p in model.parameters())


def base_of(model):
    return sum(p.numel() for name, p in model.named_parameters() if name[-2:] not in (".A", ".B"))


def sixteen(make, offset=None):
    """A codebook made of the quantiles below zero, without it, and above, with it, both ascending."""

    def codebook(given):
        below, above = (torch.special.ndtri(torch.linspace(0.5, offset or given, n)) for n in (8, 9))
        return make(-below[1:].flip(0), above)

    return codebook


def spread(offset):
    return torch.linspace(1 - offset, offset, 16)


def rounded(**wrong):
    """A round trip, right but for the parts in `wrong`: functions of what is known by then."""

    def round_trip(x, size):
        flat, n, book = x.flatten(), x.numel(), torch.tensor(nf4.NF4)
        t = SimpleNamespace(x=x, n=n, size=size, book=book, blocks=F.pad(flat, (0, -n % size)).view(-1, size))
        t.absmax, t.flat = t.blocks.abs().amax(1), F.pad(flat, (0, n % 2))
        t.each = t.absmax.repeat_interleave(size)[: len(t.flat)]
        t.each = F.pad(t.each, (0, len(t.flat) - len(t.each)))
        t.scaled = t.flat / t.each.clamp(min=1e-30)
        t.nearest = (t.scaled[:, None] - book).abs().argmin(1)
        t.pairs = wrong.get("nearest", lambda t: t.nearest)(t).view(-1, 2)
        t.codes = (t.pairs[:, 0] << 4 | t.pairs[:, 1]).to(torch.uint8)
        t.back = (book[t.nearest] * t.each)[:n].view(x.shape)
        return tuple(wrong[name](t) if name in wrong else getattr(t, name) for name in ("codes", "absmax", "back"))

    return round_trip


def in_blocks(name):
    return name.endswith("_proj.weight")


def stored(bits=None, four=in_blocks, plain=2, absmax_bytes=None, shorter=True, offset=4):
    """Bits and bytes, right but for one thing."""

    def storage(shapes, size, double, many):
        n_bytes = 0
        for name, shape in shapes.items():
            n = torch.Size(shape).numel()
            blocks = -(-n // size) if shorter else n // size
            absmax = blocks + 4 * -(-blocks // many) + offset if double and not absmax_bytes else 4 * blocks
            n_bytes += -(-n // 2) + absmax if four(name) else plain * n
        return bits(size, double, many) if bits else SOLVED["check_storage"](shapes, size, double, many)[0], n_bytes

    return storage


def by_the_formula(shapes, size, double, many):
    bits, _ = SOLVED["check_storage"](shapes, size, double, many)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return bits, sum(n * (bits / 8 if in_blocks(name) else 2) for name, n in sizes.items())


def stepped(saved=lambda W: (), attribute=lambda W: None, makes=(1, 1), always=False, **wrong):
    """A step that check_step refuses, for one reason; `wrong` makes other results out of what is known."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, A, B, make_weight, s):
            W = [make_weight() for _ in range(makes[0])][-1]
            ctx.save_for_backward(x, A, B, *saved(W))
            ctx.make_weight, ctx.s, ctx.W = make_weight, s, attribute(W)
            t = SimpleNamespace(x=x, W=W, base=x @ W.T, update=x @ A.T @ B.T, s=s)
            return wrong["y"](t) if "y" in wrong else t.base + s * t.update

        @staticmethod
        def backward(ctx, dy):
            x, A, B, *_ = ctx.saved_tensors
            t = SimpleNamespace(x=x.flatten(0, 1), dy=dy.flatten(0, 1), s=ctx.s, A=A, B=B, dx=None)
            t.dxa = t.s * t.dy @ B
            t.dA, t.dB = t.dxa.T @ t.x, t.s * t.dy.T @ (t.x @ A.T)
            if always or ctx.needs_input_grad[0]:
                t.W = [ctx.make_weight() for _ in range(makes[1])][-1]
                t.dx = (wrong["dx"](t) if "dx" in wrong else t.dy @ t.W + t.dxa @ A).view(x.shape)
            dA, dB = (wrong[name](t) if name in wrong else getattr(t, name) for name in ("dA", "dB"))
            return t.dx, dA, dB, None, None

    return lambda x, make_weight, A, B, s: Wrong.apply(x, A, B, make_weight, s)


def turned(W):
    """The transpose, where only the shapes of a square matrix allow it."""
    return W.T if W.shape[0] == W.shape[1] else W


def remembering(x, make_weight, A, B, s):
    remembering.W = make_weight()
    return SOLVED["check_step"](x, lambda: remembering.W, A, B, s)


def checkpointed(x, make_weight, A, B, s):
    """Right where x wants a gradient: W is made once a pass, and autograd does the rest."""
    formula = lambda x, A, B: x @ make_weight().T + s * (x @ A.T) @ B.T  # noqa: E731
    return checkpoint(formula, x, A, B, use_reentrant=False)


def in_four_bits(models=2, four=("QLoRA",), targets="all-linear", adapted="all-linear", thaw=False, late=False, **more):
    """A comparison that check_four_bits refuses, for one reason; `more` makes other entries of the record."""
    settings = {name: more.pop(name, default) for name, default in (("seeds", (0, 0)), ("steps", (4, 4)), ("taken", 0))}
    rates = more.pop("rates", (1e-2, 1e-2))

    def compare(make_model, examples):
        record, batch, bases = {}, collate(examples), [make_model() for _ in range(models)]
        for i, (arm, model) in enumerate(zip(("LoRA", "QLoRA"), (bases * 2)[:2], strict=True)):
            if arm in four and not late:
                quantize_model(model, targets)
            row = {"base_bytes": sum(t.nbytes for t in tensors_of(model)), "seconds": 1.0}
            torch.manual_seed(settings["seeds"][i])
            row["trained"] = count(inject(model, 2, 4, adapted)).trainable
            if arm in four and late:
                quantize_model(model, targets)
            model.get_input_embeddings().requires_grad_(thaw)
            optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rates[i]), []
            for _ in range(settings["steps"][i]):
                optimizer.zero_grad()
                losses.append(model(**batch).loss)
                losses[-1].backward()
                optimizer.step()
            row |= {"first_loss": losses[0].item(), "final_loss": losses[-1].item()}
            record[arm] = row | {name: make(row, model, record) for name, make in more.items()}
            if settings["taken"]:
                remove(model)
        return record

    return compare


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def buffer_bytes(model):
    return sum(buffer.nbytes for buffer in model.buffers())


def values_of(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.numel() for name, t in named if name[-2:] not in (".A", ".B"))


def dora_by(weight=None, start=None):
    """A wrong DoRA: `weight(W, V, m, U)` and `start(W, V, m)` for its parts, with U the update and V = W + U."""

    def dora(W, A, B, s, m):
        U = s * B @ A
        right = SOLVED["check_dora"](W, A, B, s, m)
        return weight(W, W + U, m, U) if weight else right[0], start(W, W + U, m) if start else right[1]

    return dora


def pissa_by(factors=None, residual=None, largest=True):
    """A wrong PiSSA: `factors(U, S, V, s)` for B and A; `residual(W, B, A, s)` for what is left."""

    def pissa(W, rank, s):
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        part = slice(rank) if largest else slice(-rank, None)
        U, S, V = U[:, part], S[part], V[part]
        B, A = factors(U, S, V, s) if factors else (U * (S / s).sqrt(), (S / s).sqrt()[:, None] * V)
        return A, B, residual(W, B, A, s) if residual else W - s * B @ A

    return pissa


def allocated(rule):
    return lambda importance, budget: {k: rule(v, budget, len(importance)) for k, v in importance.items()}


def mean(arm):
    return float(np.mean(arm["accuracy"]))


def better(other, arm):
    """In how many respects an arm is better than another; -1 if it is worse in one."""
    gaps = [round(mean(other) - mean(arm), 9), arm["seconds"] - other["seconds"], arm["bytes"] - other["bytes"]]
    return sum(gap > 0 for gap in gaps) if min(gaps) >= 0 else -1


def said(low, high):
    return "higher" if low > 0 else "lower" if high < 0 else "cannot be separated"


def scattered(a, b, factor, n):
    half = factor * np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / n)
    return said(np.mean(a) - np.mean(b) - half, np.mean(a) - np.mean(b) + half)


def overlapping(a, b):
    (_, low, high), (_, least, most) = stats.mean_interval(a), stats.mean_interval(b)
    return said(low - most, high - least)


def by_seed(arms, measure):
    return [arm | {"accuracy": [measure(arm["accuracy"]) + shift for shift in (0, -1e-9, 1e-9)]} for arm in arms]


def traded(beaten=None, rule=None):
    """A wrong trade-off: `beaten(arm, arms)` leaves out candidates; `rule(a, b)` gives the verdicts."""

    def tradeoff(arms):
        candidates, verdicts = SOLVED["check_tradeoff"](arms)
        if beaten:
            candidates = [arm["name"] for arm in arms if not beaten(arm, arms)]
        if rule:
            verdicts = {arm["name"]: rule(arm["accuracy"], arms[0]["accuracy"]) for arm in arms[1:]}
        return candidates, verdicts

    return tradeoff


def enough(width, least=2):
    """A wrong number of seeds: the first whose `width(n)` for a scatter of 1 is narrow enough."""
    return lambda scatter, half: next(n for n in range(least, 10_000) if scatter * width(n) <= half)


def tabled(pick=None, mean=np.mean, half=None, rows=None):
    """A wrong rank table: `pick(rates, all)` the runs of a rank; `half(values)` of the interval; `rows(table)`."""

    def rank_table(runs):
        accuracy = {rank: {} for rank in sorted({run["rank"] for run in runs})}
        for run in sorted(runs, key=lambda run: (run["lr"], run["seed"])):
            accuracy[run["rank"]].setdefault(run["lr"], []).append(run["correct"])
        table = []
        for rank, rates in accuracy.items():
            values = pick(rates, accuracy.values()) if pick else max(rates.values(), key=np.mean)
            wide = half(values) if half else stats.mean_interval(values)[2] - np.mean(values)
            table.append((rank, 1000 * rank, mean(values), np.mean(values) - wide, np.mean(values) + wide))
        return rows(table) if rows else table

    return rank_table


def common_rate(rates, everybody):
    return rates[max(rates, key=lambda lr: sum(np.mean(each[lr]) for each in everybody))]


def erred(values):
    return np.std(values, ddof=1) / np.sqrt(len(values))


def paired_by(interval=None, seeds=lambda a, b: [s for s in a if s in b], least=2, turn=1):
    """A wrong verdict: `interval(gaps)` of the differences of the `seeds`; with fewer than `least`, none."""

    def verdict(a, b):
        gaps = [turn * (a.get(s, 0) - b.get(s, 0)) for s in seeds(a, b)]
        if len(gaps) < least:
            return "cannot be separated"
        _, low, high = interval(gaps) if interval else stats.mean_interval(gaps)
        return "a is higher" if low > 0 else "b is higher" if high < 0 else "cannot be separated"

    return verdict


def verdict_by(rule, least=2):
    """A wrong verdict by two lists, whatever their seeds."""

    def verdict(a, b):
        if min(len(a), len(b)) < least:
            return "cannot be separated"
        said = rule(list(a.values()), list(b.values()))
        return {"higher": "a is higher", "lower": "b is higher"}.get(said, said)

    return verdict


def confounded(*without, **others):
    """A wrong list of confounds: without some names, or with another function of a run for some."""
    values = {
        "alpha": lambda run: run["alpha"],
        "scale": lambda run: run["alpha"] / run["rank"],
        "steps": lambda run: run["steps"],
        "epochs": lambda run: run["steps"] * run["batch_size"] / run["n"],
        "seeds": lambda run: run["seed"],
    } | others

    def confounds(a, b):
        found = [name for name, value in values.items() if set(map(value, a)) != set(map(value, b))]
        if "rates" not in values:
            found += ["rates"] if len({run["lr"] for run in a}) != len({run["lr"] for run in b}) else []
        return sorted(set(found) - set(without))

    return confounds


def designed(seeds=None, **changed):
    """A wrong design: `seeds(fit)` of the seeds that fit, not rounded; other entries of the grid."""

    def design(ranks, alphas, rates, seconds, minutes):
        fit = 60 * minutes / (seconds * len(ranks) * len(alphas) * len(rates))
        if seeds is None and fit < 3:
            raise ValueError("expected more minutes")
        values = seeds(fit) if seeds else range(int(fit))
        return {"rank": ranks, "alpha": alphas, "lr": rates, "seed": list(values)} | changed

    return design


def side_by_side(adapters, weights, scale_of):
    """`add_adapters` with another factor for B."""
    A = torch.cat([A for A, _, _ in adapters])
    return A, torch.cat([scale_of(s, w) * B for (_, B, s), w in zip(adapters, weights, strict=True)], dim=1)


def reweighted(A, B, rank, change):
    """`compress` with other singular values."""
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ T.T)
    rank = min(rank, len(S))
    return change(S[:rank, None]) * Vh[:rank] @ P.T, Q @ U[:, :rank]


def cut_whole(A, B, rank):
    """`compress` by the whole matrix, which a randomised SVD makes quick."""
    U, S, V = torch.svd_lowrank(B @ A, q=len(A) + 4, niter=6)
    return S[:rank, None] * V.T[:rank], U[:, :rank]


def flat(updates):
    return torch.stack([(B @ A).flatten() for A, B in updates])


def inners(left, right):
    return flat(left) @ flat(right).T


def cosines_with(updates, target):
    return inners(updates, [target])[:, 0] / flat(updates).norm(dim=1) / flat([target]).norm()


def solved_with_cosines(updates, target):
    long = flat(updates).norm(dim=1)
    return torch.linalg.solve(inners(updates, updates) / long / long[:, None], inners(updates, [target])[:, 0])


def normalised(w):
    return w / w.sum()


def nf4_rounded(x):
    return nf4.dequantize(*nf4.quantize(x), tuple(x.shape))


def arrived(W, D, start=nf4_rounded, size=lambda change, D: (change * D).sum() / D.square().sum()):
    """`arrives` with another start, or another measure."""
    served = nf4_rounded(nf4_rounded(W) + D), nf4_rounded(W + D)
    return tuple(size(each - start(W), D).item() for each in served)


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
    "check_mask": [
        (masked(ids=lambda t: t.ids[t.end :] + t.ids[: t.end]), "input_ids is padded on the left"),
        (masked(ids=lambda t: t.ids[: t.end]), "input_ids is not padded to `length`"),
        (masked(seen=lambda t: [1] * len(t.ids)), "is 1 on the padding"),
        (masked(seen=lambda t: [int(i != t.pad) for i in t.ids]), "pad_id 2: attention_mask goes by value"),
        (masked(seen=lambda t: [0] * t.n + t.seen[t.n :]), "is 0 on the prompt"),
        (masked(labels=lambda t: [*t.labels[1:], -100]), "is shifted: the model does that"),
        (
            masked(labels=lambda t: t.labels[: t.n] + [-100 if i == t.pad else i for i in t.ids[t.n :]]),
            "length 10, pad_id 2: labels goes by value: what equals pad_id may be the end",
        ),
        (masked(labels=lambda t: t.ids[: t.end] + t.labels[t.end :]), "counts the prompt: its labels are -100"),
        (masked(labels=lambda t: t.ids), "counts prompt and padding"),
        (masked(labels=lambda t: t.labels[: t.n] + t.ids[t.n :]), "counts the padding"),
        (masked(labels=lambda t: [-100 if i == t.pad else i for i in t.ids]), "counts the prompt, and goes by value"),
        (masked(labels=lambda t: t.ids[: t.n] + [-100] * (len(t.ids) - t.n)), "the prompt instead of the completion"),
        (
            masked(labels=lambda t: t.labels[: t.end - 1] + [-100] * (len(t.ids) - t.end + 1)),
            "leaves out the end token",
        ),
        (
            lambda prompt, reply, length, pad: prompt + reply,
            "`return input_ids, attention_mask, labels`, got list of 8",
        ),
    ],
    "check_modern": [
        (lambda settings: settings, "max_seq_length is still there"),
        (modern_but(lambda new, old: {**new, **old}), "max_seq_length is still there"),
        (modern_but(lambda new, old: new | {k: v for k, v in old.items() if k == "tokenizer"}), "tokenizer is still"),
        (modern_but(lambda new, old: old.clear()), "an argument was changed in place"),
        (modern_but(lambda new, old: renamed(new, max_length="max_len")), "the setting of 512 is lost; is it max_len?"),
        (modern_but(lambda new, old: {k: v for k, v in new.items() if v}), "False, 0 and None are values"),
        (modern_but(lambda new, old: {k: v for k, v in new.items() if k != "dataset_text_field"}), "'text' is lost"),
        (
            modern_but(lambda new, old: new | {"use_cpu": not new["use_cpu"]} if "use_cpu" in new else new),
            "use_cpu should be True: a new name, in the same sense",
        ),
        (
            modern_but(lambda new, old: new | {"warmup_steps": round(new.get("warmup_steps", 0) * 1000)}),
            "nobody asked for warmup_steps",
        ),
        (
            modern_but(lambda new, old: new | ({"warmup_steps": 30} if "warmup_ratio" in old else {})),
            "warmup_steps should be 0.03: below 1 it is a share",
        ),
        (modern_but(lambda new, old: new | {"processing_class": "x"}), "nobody asked for processing_class"),
        (modern_but(lambda new, old: new | {"learning_rate": 1e-4} if "learning_rate" in new else new), "as they are"),
        (modern_but(lambda new, old: list(new)), "expected a dict, got list"),
    ],
    "check_matches": [
        (matching(in_list=lambda name, target: target in name), "a part in the middle does not count"),
        (matching(in_list=lambda name, target: name.endswith(target)), "xq_proj is another layer"),
        (matching(in_list=lambda name, target: name.endswith("." + target)), "without a dot before"),
        (matching(in_list=lambda name, target: name.split(".")[-1] == target), "several last parts"),
        (
            matching(in_list=lambda name, target: re.search(rf"(^|\.){target}$", name)),
            "a name, not a regular expression",
        ),
        (matching(in_string=re.match), "fullmatch, not match"),
        (matching(in_string=re.search), "must match up to the end"),
        (matching(in_string=lambda target, name: re.search(f"{target}$", name)), "fullmatch, not search"),
        (matching(in_string=lambda target, name: is_named(name, target)), "a string is a regular expression"),
        (
            matching(in_string=lambda target, name: re.fullmatch(target, name) and ".xq" not in name),
            "this one takes any letters",
        ),
        (lambda name, targets: False, "should be True: the last part of the name is in the list"),
        (lambda name, targets: re.search("q", name), "expected True or False, got Match"),
    ],
    "check_is_active": [
        (lambda model, ids: bool(model.layer.B.any()), "alpha = 0: should be False: B is not zero, but the scale is"),
        (lambda model, ids: True, "a fresh adapter: should be False: B is zero"),
        (lambda model, ids: False, "a trained adapter: should be True: logits differ once it is off"),
        (differing(different=torch.equal), "a trained adapter: should be True"),
        (differing(different=lambda a, b: (a - b).abs().max() > 1e-2), "is there a tolerance that hides it?"),
        (differing(mode=None), "in training mode: should be False: dropout makes the difference"),
        (differing(back=False), "the model is left in eval mode"),
        (differing(mode=True), "a fresh adapter: should be False"),
        (differing(grad=True), "use torch.no_grad()"),
        (differing(switch=False), "the adapter is left switched off"),
        (differing(different=lambda a, b: a != b), "expected True or False, got Tensor"),
    ],
    "check_compare": [
        (
            lambda make, examples: {arm: dict.fromkeys(lesson_03_sft.FIELDS, 1) for arm in ("LoRA", "full")},
            "never called",
        ),
        (compared(models=1), "one model was made and trained twice"),
        (compared(adapt=False), "no model has an adapter"),
        (compared(thaw=True), "of the base changed: only the adapter may train"),
        (compared(spare=True), "full fine-tuning moved 19 of the model's 20 tensors"),
        (compared(trained=lambda row, arm, model: everything(model)), "LoRA: trained counts what is frozen"),
        (compared(trained=lambda row, arm, model: base_of(model)), "LoRA: trained is that of the base"),
        (
            compared(trained=lambda row, arm, model: row["trained"] + (384 if arm == "full" else 0)),
            "full: trained counts a shared weight twice",
        ),
        (compared(trained=lambda row, arm, model: 928), "full: trained is that of the adapter"),
        (
            compared(gradient_bytes=lambda row, arm, model: 4 * everything(model)),
            "gradient_bytes counts frozen parameters",
        ),
        (compared(gradient_bytes=lambda row, arm, model: row["trained"]), "a float32 takes four bytes"),
        (compared(gradient_bytes=lambda row, arm, model: 0), "measure before zero_grad"),
        (compared(gradient_bytes=lambda row, arm, model: 8 * row["trained"]), "has 8 bytes a number"),
        (compared(optimizer_bytes=lambda row, arm, model: 4 * row["trained"]), "AdamW keeps two for each number"),
        (
            compared(optimizer_bytes=lambda row, arm, model: 8 * everything(model)),
            "optimizer_bytes counts frozen parameters",
        ),
        (compared(optimizer_bytes=lambda row, arm, model: 2 * row["trained"]), "a float32 takes four bytes"),
        (compared(optimizer_bytes=lambda row, arm, model: 12 * row["trained"]), "has the gradients as well"),
        (compared(optimizer_bytes=lambda row, arm, model: 8 * row["trained"] + 4 * 28), "step counters as well"),
        (compared(seed=None), "set the seed before get_peft_model"),
        (compared(first_loss=lambda row, arm, model: row["first_loss"] + (arm == "full")), "so they should agree"),
        (compared(final_loss=lambda row, arm, model: row["first_loss"]), "it should fall"),
        (compared(seconds=lambda row, arm, model: 0), "seconds should be more than 0"),
        (compared(seconds=lambda row, arm, model: float("nan")), "expected a finite number for seconds"),
        (compared(final_loss=lambda row, arm, model: None), "final_loss should be a tensor or a number"),
        (lambda make_model, examples: {"LoRA": 3}, "expected a record, a dict, under 'LoRA', got int"),
        (lambda make_model, examples: [1, 2], "expected a dict of two records, got list"),
    ],
    "check_codebook": [
        (lambda offset: torch.linspace(-1, 1, 16), "has even steps: probabilities have them"),
        (sixteen(lambda below, above: torch.cat([below, above])), "is not scaled"),
        (sixteen(lambda below, above: -torch.cat([below, above]).flip(0) / above[-1]), "is upside down"),
        (lambda offset: torch.special.ndtri(spread(offset)) / torch.special.ndtri(spread(offset))[-1], "has no zero"),
        (sixteen(lambda below, above: torch.cat([below, 0 * above[:2], -below.flip(0)]) / above[-1]), "zero twice"),
        (sixteen(lambda below, above: torch.cat([-above[1:8].flip(0), above]) / above[-1]), "and loses one"),
        (sixteen(lambda below, above: torch.cat([-above.flip(0), above[1:]]) / above[-1]), "has 17 numbers"),
        (lambda offset: spread(offset) / offset, "holds probabilities"),
        (sixteen(lambda below, above: torch.cat([above, below]) / above[-1]), "in another order"),
        (
            sixteen(lambda below, above: torch.cat([below, above]) / above[-1], nf4.OFFSET),
            "is that of offset 0.9677083",
        ),
        (
            sixteen(lambda below, above: torch.cat([below, above]) / above[-1], 1.0),
            "is not finite: ndtri(1) is infinite",
        ),
    ],
    "check_round_trip": [
        (rounded(absmax=lambda t: t.x.abs().max()), "absmax is that of the whole tensor"),
        (rounded(absmax=lambda t: t.blocks.amax(1)), "absmax is the largest value"),
        (rounded(absmax=lambda t: t.absmax[:-1]), "leaves out the last block"),
        (rounded(absmax=lambda t: t.x.abs().amax(-1)), "absmax is that of rows"),
        (rounded(absmax=lambda t: t.absmax.where(t.absmax > 0, 1.0)), "is 1 where the block is zero"),
        (rounded(codes=lambda t: t.nearest[: t.n].to(torch.uint8)), "has a byte for each value"),
        (rounded(codes=lambda t: (t.pairs[:, 1] << 4 | t.pairs[:, 0]).to(torch.uint8)), "codes has the first value in"),
        (rounded(nearest=lambda t: (t.flat / t.each)[:, None].sub(t.book).abs().argmin(1)), "is 0 in a block of zeros"),
        (
            rounded(nearest=lambda t: torch.bucketize(t.flat / t.each, (t.book[1:] + t.book[:-1]) / 2)),
            "is 15 in a block of zeros",
        ),
        (rounded(nearest=lambda t: torch.bucketize(t.scaled, t.book)), "is rounded up"),
        (rounded(nearest=lambda t: torch.bucketize(t.scaled, t.book, right=True) - 1), "is rounded down"),
        (rounded(nearest=lambda t: ((t.scaled + 1) * 7.5).round().long()), "takes even steps"),
        (rounded(nearest=lambda t: (t.flat[:, None] - t.book).abs().argmin(1)), "divide each block by its absmax"),
        (rounded(codes=lambda t: t.codes.long()), "should be torch.uint8"),
        (rounded(codes=lambda t: t.codes[:-1]), "codes should have shape (144,), got (143,)"),
        (rounded(back=lambda t: t.x), "back is x itself"),
        (rounded(back=lambda t: t.book[t.nearest][: t.n].view(t.x.shape)), "is in units of absmax"),
        (
            rounded(back=lambda t: (t.book[t.nearest][: t.n] * t.absmax.repeat(t.size)[: t.n]).view(t.x.shape)),
            "takes other blocks' absmax",
        ),
        (
            rounded(back=lambda t: (t.book[t.pairs.flip(1).flatten()] * t.each)[: t.n].view(t.x.shape)),
            "back takes the low half",
        ),
        (rounded(back=lambda t: t.back.flatten()), "back should have shape (6, 48), got (288,)"),
        (lambda x, size: x, "expected `return codes, absmax, back`, got Tensor"),
    ],
    "check_storage": [
        (stored(bits=lambda size, double, many: 4), "is that of the codes alone"),
        (stored(bits=lambda size, double, many: 4 + 32 / size), "double_quant stores it in 8"),
        (stored(bits=lambda size, double, many: 4 + 8 / size), "has absmax in 8 bits: it has 32 here"),
        (
            stored(bits=lambda size, double, many: 4 + (8 if double else 32) / size),
            "has absmax in 8 bits, but not the 32 for absmax_block of them",
        ),
        (
            stored(bits=lambda size, double, many: 4 + (8 / size + 32 / many if double else 32 / size)),
            "they are for as many blocks",
        ),
        (lambda *given: (SOLVED["check_storage"](*given)[0] / 8, 1), "is in bytes"),
        (stored(four=lambda name: True), "has everything in four bits"),
        (stored(four=lambda name: in_blocks(name) or "embed" in name or "head" in name), "has embeddings and head"),
        (stored(four=lambda name: in_blocks(name) or "head" in name), "has the head in four bits"),
        (stored(four=lambda name: "_proj" in name), "has the bias in four bits"),
        (stored(plain=0), "leaves out what is not quantised"),
        (stored(plain=4), "has 32 bits for a number"),
        (stored(offset=0), "lacks the offset"),
        (stored(absmax_bytes=4), "has absmax in 4 bytes"),
        (stored(shorter=False), "leaves out each weight's last block"),
        (by_the_formula, "is bits times weights"),
        (lambda *given: SOLVED["check_storage"](*given)[0], "expected `return bits, n_bytes`, got float"),
    ],
    "check_step": [
        (stepped(y=lambda t: t.base + t.update), "y has the adapter unscaled"),
        (stepped(y=lambda t: t.base + 0 * t.update), "y is the base alone"),
        (stepped(y=lambda t: t.s * t.update), "y is the adapter alone"),
        (stepped(y=lambda t: t.x @ turned(t.W).T + t.s * t.update), "y has W for W'"),
        (lambda *inputs: SOLVED["check_step"](*inputs).detach(), "y has no backward pass"),
        (lambda x, make, A, B, s: x @ make().T + s * x @ A.T @ B.T, "of its size is kept"),
        (stepped(saved=lambda W: (W,)), "of its size is kept"),
        (stepped(saved=lambda W: (W.T,)), "of its size is kept"),
        (stepped(attribute=lambda W: W), "of its size is kept"),
        (stepped(attribute=lambda W: [W.T]), "of its size is kept"),
        (stepped(attribute=lambda W: W.clone()), "of its size is kept"),
        (remembering, "of its size is kept"),
        (stepped(makes=(2, 1)), "called 2 times in the forward pass"),
        (stepped(makes=(1, 2)), "make_weight was called 3 times, not 2"),
        (stepped(always=True), "x without a gradient: make_weight was called 2 times, not 1"),
        (checkpointed, "x without a gradient: make_weight was called 2 times, not 1"),
        (stepped(dx=lambda t: t.dy @ t.W), "the gradient of x lacks the adapter's path"),
        (stepped(dx=lambda t: t.dxa @ t.A), "the gradient of x lacks the path through W"),
        (stepped(dx=lambda t: t.dy @ t.W + t.dxa @ t.A / t.s), "has the adapter's path unscaled"),
        (stepped(dx=lambda t: t.dy @ turned(t.W) + t.dxa @ t.A), "the gradient of x has W' for W"),
        (stepped(dA=lambda t: t.dA / t.s), "the gradient of A lacks s"),
        (stepped(dA=lambda t: t.dA * t.s), "the gradient of A has s twice"),
        (stepped(dB=lambda t: t.dB / t.s), "the gradient of B lacks s"),
        (stepped(dB=lambda t: None), "B has no gradient"),
        (stepped(dA=lambda t: t.dB, dB=lambda t: t.dA), "your code raised RuntimeError"),
    ],
    "check_four_bits": [
        (lambda make, examples: {arm: {} for arm in ("LoRA", "QLoRA")}, "make_model was called 0 times"),
        (in_four_bits(models=1), "your code raised ValueError: expected a plain model"),
        (in_four_bits(late=True), "base_bytes is that of the other base"),
        (in_four_bits(models=3), "make_model was called 3 times"),
        (in_four_bits(four=()), "both bases are in float32"),
        (in_four_bits(four=("LoRA", "QLoRA")), "both bases are in four bits"),
        (in_four_bits(targets=["q_proj"]), "2 layers are in four bits"),
        (in_four_bits(targets=".*_proj|lm_head"), "15 layers are in four bits"),
        (in_four_bits(adapted=["q_proj", "v_proj"]), "4 layers have an adapter at the end"),
        (in_four_bits(taken=True), "0 layers have an adapter at the end"),
        (in_four_bits(thaw=True), "29 tensors train"),
        (in_four_bits(seeds=(0, 1)), "A differs between the arms at the start"),
        (in_four_bits(steps=(4, 5)), "4 passes for LoRA and 5 for QLoRA"),
        (in_four_bits(rates=(1e-2, 2e-2)), "moves a number by 0.01 and that of QLoRA by 0.02"),
        (in_four_bits(steps=(1, 1)), "a model ran less than two passes"),
        (
            in_four_bits(base_bytes=lambda row, model, record: sum(p.nbytes for p in tensors_of(model))),
            "the adapter too",
        ),
        (
            in_four_bits(base_bytes=lambda row, model, record: row["base_bytes"] - buffer_bytes(model)),
            "lacks model.buf",
        ),
        (in_four_bits(base_bytes=lambda row, model, record: buffer_bytes(model)), "lacks model.parameters()"),
        (in_four_bits(base_bytes=lambda row, model, record: values_of(model)), "is in values: ask for nbytes"),
        (
            in_four_bits(base_bytes=lambda row, model, record: 4 * values_of(model)),
            "QLoRA: base_bytes has 4 bytes a value",
        ),
        (
            in_four_bits(base_bytes=lambda row, model, record: record.get("LoRA", row)["base_bytes"]),
            "QLoRA: base_bytes is that of the other base",
        ),
        (in_four_bits(trained=lambda row, model, record: everything(model)), "trained counts frozen numbers"),
        (in_four_bits(trained=lambda row, model, record: 4 * row["trained"]), "trained is in bytes"),
        (
            in_four_bits(first_loss=lambda row, model, record: record.get("LoRA", row)["first_loss"]),
            "QLoRA: first_loss is that of the other base",
        ),
        (in_four_bits(final_loss=lambda row, model, record: row["first_loss"]), "should be below first_loss"),
        (in_four_bits(seconds=lambda row, model, record: 0), "seconds should be more than 0"),
        (in_four_bits(seconds=lambda row, model, record: None), "seconds should be a tensor or a number"),
        (
            lambda make, examples: [in_four_bits()(make, examples)],
            "expected a record, a dict, under 'LoRA', got NoneType",
        ),
    ],
    "check_dora": [
        (dora_by(lambda W, V, m, U: m[:, None] * V / V.norm(dim=0)), "has the norms of columns"),
        (dora_by(lambda W, V, m, U: m[:, None] * V / V.norm()), "is divided by one number"),
        (dora_by(lambda W, V, m, U: m[:, None] * V), "is not divided by the lengths"),
        (dora_by(lambda W, V, m, U: m[:, None] * V / W.norm(dim=1, keepdim=True)), "is divided by the lengths of W"),
        (lambda W, A, B, s, m: SOLVED["check_dora"](W, A, B, 1.0, m), "has no s"),
        (lambda W, A, B, s, m: SOLVED["check_dora"](W, A, B, s, torch.ones_like(m)), "has no m"),
        (dora_by(lambda W, V, m, U: W + m[:, None] * U / V.norm(dim=1, keepdim=True)), "has m on the update alone"),
        (dora_by(lambda W, V, m, U: m[:, None] * V / V.square().sum(1, keepdim=True)), "by the squares"),
        (dora_by(lambda W, V, m, U: V), "is LoRA's"),
        (lambda W, A, B, s, m: SOLVED["check_dora"](W, A, 0 * B, s, m), "is W alone, with new lengths"),
        (dora_by(start=lambda W, V, m: W.norm(dim=0)), "is that of columns"),
        (dora_by(start=lambda W, V, m: torch.ones(len(W))), "is of ones"),
        (dora_by(start=lambda W, V, m: m), "is the argument m"),
        (dora_by(start=lambda W, V, m: V.norm(dim=1)), "is that of the trained rows"),
        (dora_by(start=lambda W, V, m: W.square().sum(1)), "is squared"),
        (dora_by(start=lambda W, V, m: W.norm(dim=1, keepdim=True)), "without a second dimension"),
        (lambda W, A, B, s, m: W, "expected `return weight, start`"),
        (lambda W, A, B, s, m: (W.add_(s * B @ A), m), "an argument was changed in place"),
    ],
    "check_equivalent": [
        (lambda a, r, new: (r, a), "is rank: rsLoRA divides by its root"),
        (lambda a, r, new: (r**-0.5, a), "is upside down"),
        (lambda a, r, new: (1, a), "is 1: the scales differ"),
        (lambda a, r, new: (a / r**0.5, a), "is rsLoRA's scale"),
        (lambda a, r, new: (a / r, a), "is LoRA's scale"),
        (lambda a, r, new: (new**0.5, a), "is that of new_rank"),
        (lambda a, r, new: (r**0.5, a * new / r), "keeps s itself"),
        (lambda a, r, new: (r**0.5, a), "is alpha: then s falls"),
        (lambda a, r, new: (r**0.5, a / (r * new) ** 0.5), "is the scale: times new_rank"),
        (lambda a, r, new: (r**0.5, a * (r / new) ** 0.5), "is upside down"),
        (lambda a, r, new: (r**0.5, a * (new / r) ** 2), "grows with the square"),
    ],
    "check_pissa": [
        (pissa_by(lambda U, S, V, s: ((U * S.sqrt()) @ U.T @ U, S.sqrt()[:, None] * V)), "is W's part itself"),
        (pissa_by(lambda U, S, V, s: (U * S / s**0.5, S[:, None] * V / s**0.5)), "in both factors"),
        (pissa_by(lambda U, S, V, s: (U / s**0.5, V / s**0.5)), "has no singular values"),
        (pissa_by(lambda U, S, V, s: (U * S.sqrt() / s, S.sqrt()[:, None] * V / s)), "is divided by s twice"),
        (pissa_by(lambda U, S, V, s: (U * (S * s).sqrt(), (S * s).sqrt()[:, None] * V)), "is multiplied by s"),
        (pissa_by(lambda U, S, V, s: (U * S / s, V)), "do not share the singular values"),
        (pissa_by(lambda U, S, V, s: (U, S[:, None] * V / s)), "do not share the singular values"),
        (pissa_by(largest=False), "holds the smallest directions"),
        (pissa_by(residual=lambda W, B, A, s: W), "is W: take s B A off"),
        (pissa_by(residual=lambda W, B, A, s: W - B @ A), "lacks the scale"),
        (pissa_by(residual=lambda W, B, A, s: s * B @ A), "is the part that trains"),
        (pissa_by(residual=lambda W, B, A, s: W + s * B @ A), "is W + s B A"),
        (lambda W, rank, s: (lambda A, B, R: (B, A, R))(*SOLVED["check_pissa"](W, rank, s)), "mixed up"),
        (lambda W, rank, s: (*SOLVED["check_pissa"](W, rank, s)[:2], None), "residual should be a tensor"),
        (lambda W, rank, s: (*SOLVED["check_pissa"](W, rank, s)[:2], W[:2]), "residual should have shape"),
        (lambda W, rank, s: SOLVED["check_pissa"](W, rank, s)[:2], "expected `return A, B, residual`"),
    ],
    "check_allocate": [
        (allocated(lambda x, n, k: x.argsort(descending=True).argsort() < n // k), "every layer keeps as many"),
        (lambda d, n: SOLVED["check_allocate"]({k: -v for k, v in d.items()}, n), "the least important are kept"),
        (lambda d, n: {k: v >= torch.cat(list(d.values())).topk(n).values[-1] for k, v in d.items()}, "a threshold"),
        (lambda d, n: {k: v > torch.cat(list(d.values())).topk(n).values[-1] for k, v in d.items()}, "the budget is"),
        (lambda d, n: {k: int(v.sum()) for k, v in SOLVED["check_allocate"](d, n).items()}, "entries, True or False"),
        (lambda d, n: (d.clear(), {})[1], "an argument was changed in place"),
        (
            lambda d, n: {k: v for k, v in SOLVED["check_allocate"](d, n).items() if v.any()},
            "a dict with a mask for each layer",
        ),
        (allocated(lambda x, n, k: x == x), "everything is kept"),
        (lambda d, n: torch.cat(list(SOLVED["check_allocate"](d, n).values())), "a dict with a mask for each layer"),
        (
            lambda d, n: {
                k: v * m for (k, v), m in zip(d.items(), SOLVED["check_allocate"](d, n).values(), strict=True)
            },
            "entries, True or False",
        ),
        (allocated(lambda x, n, k: torch.arange(len(x)) < n), "is for all layers together"),
        (lambda d, n: {k: v.flip(0) for k, v in SOLVED["check_allocate"](d, n).items()}, "more important directions"),
    ],
    "check_tradeoff": [
        (traded(lambda arm, others: any(better(o, arm) >= 0 for o in others if o is not arm)), "drop equals"),
        (traded(lambda arm, others: any(better(o, arm) == 3 for o in others)), "keep arms that another beats"),
        (traded(lambda arm, others: any(mean(o) > mean(arm) for o in others)), "are the most accurate arm alone"),
        (traded(lambda arm, others: not any(better(o, arm) > 0 for o in others)), "are those that are beaten"),
        (traded(lambda arm, others: False), "are all arms"),
        (lambda arms: (SOLVED["check_tradeoff"](arms)[0][:-1], {}), "candidates are wrong about"),
        (lambda arms: (SOLVED["check_tradeoff"](arms)[0] * 2, {}), "is named twice"),
        (lambda arms: (3, {}), "a list of the arms' names"),
        (lambda arms: SOLVED["check_tradeoff"](by_seed(arms, max)), "by the best seed"),
        (lambda arms: SOLVED["check_tradeoff"](by_seed(arms, min)), "by the worst seed"),
        (lambda arms: SOLVED["check_tradeoff"](by_seed(arms, np.median)), "by the middle seed"),
        (traded(rule=lambda a, b: said(np.mean(a) - np.mean(b), np.mean(a) - np.mean(b))), "compare means alone"),
        (traded(rule=lambda a, b: scattered(a, b, 1.96, 3)), "have 1.96 for t"),
        (traded(rule=lambda a, b: scattered(a, b, 2.776, 1)), "take deviations for errors"),
        (traded(rule=lambda a, b: stats.difference(b, a).verdict), "more and less mixed up"),
        (traded(rule=lambda a, b: stats.difference(a, b, paired=True).verdict), "pair the runs by their places"),
        (traded(rule=overlapping), "two intervals overlap"),
        (traded(rule=lambda a, b: "equal"), "should be"),
        (lambda arms: (SOLVED["check_tradeoff"](arms)[0], {}), "one entry for each arm but the first"),
    ],
    "check_swallowed": [
        (lambda W, D: ((W.float() + D).to(W.dtype) == W).float().mean().item(), "counts weights that have no update"),
        (lambda W, D: (((W.float() + D).to(W.dtype) == W) & (D != 0)).float().mean().item(), "share of all weights"),
        (lambda W, D: 1 - SOLVED["check_swallowed"](W, D), "the share that moves"),
        (lambda W, D: (W.float() + D == W.float())[D != 0].float().mean().item(), "compares in float32"),
        (lambda W, D: (W + D.to(W.dtype) == W)[D != 0].float().mean().item(), "rounds twice"),
        (lambda W, D: 100 * SOLVED["check_swallowed"](W, D), "the share should be 0.46125, got 46.125"),
        (lambda W, D: torch.allclose((W.float() + D).to(W.dtype), W), "the share"),
    ],
    "check_add_adapters": [
        (lambda each, w: side_by_side(each, w, lambda s, w: w), "leaves the adapters' scales out"),
        (lambda each, w: side_by_side(each, w, lambda s, w: s), "leaves the weights out"),
        (lambda each, w: side_by_side(each, w, lambda s, w: s * s * w), "has the scales squared"),
        (
            lambda each, w: side_by_side(each, w, lambda s, w: s * w * w),
            "has the weights squared",
        ),
        (lambda each, w: side_by_side(each, w, lambda s, w: s * abs(w)), "without the signs"),
        (
            lambda each, w: (
                sum(A for A, _, _ in each),
                sum(x * s * B for (_, B, s), x in zip(each, w, strict=True)),
            ),
            "has cross terms",
        ),
        (lambda each, w: side_by_side(each, w, lambda s, w: s * w)[::-1], "expected A (rank, 7)"),
        (
            lambda each, w: (
                torch.eye(7, dtype=torch.float64),
                sum(x * s * B.double() @ A.double() for (A, B, s), x in zip(each, w, strict=True)),
            ),
            "expected the ranks to add up",
        ),
        (lambda each, w: torch.cat([A for A, _, _ in each]), "expected `return A, B`"),
    ],
    "check_compress": [
        (lambda A, B, rank: (A[:rank].clone(), B[:, :rank].clone()), "keeps the first columns"),
        (lambda A, B, rank: reweighted(A, B, rank, torch.ones_like), "without the singular values"),
        (lambda A, B, rank: reweighted(A, B, rank, torch.square), "has the singular values twice"),
        (lambda A, B, rank: reweighted(A, B, rank, torch.sqrt), "has the roots of the singular values"),
        (lambda A, B, rank: cut_whole(A, B, min(rank, len(A))), "B A is not needed"),
        (lambda A, B, rank: (A, B), "expected A (5, 1300)"),
        (lambda A, B, rank: SOLVED["check_compress"](A, B, rank)[::-1], "expected A (5, 1300)"),
        (lambda A, B, rank: SOLVED["check_compress"](A, B, max(1, rank - 1)), "expected A"),
    ],
    "check_best_weights": [
        (lambda each, target: inners(each, each).diagonal() ** -1 * inners(each, [target])[:, 0], "as orthogonal"),
        (lambda each, target: inners(each, [target])[:, 0], "still have to be solved for"),
        (lambda each, target: inners(each, each) @ inners(each, [target])[:, 0], "turned round"),
        (lambda each, target: cosines_with(each, target), "the cosines with the target"),
        (lambda each, target: solved_with_cosines(each, target), "has cosines in G"),
        (lambda each, target: normalised(SOLVED["check_best_weights"](each, target)), "adds up to one"),
        (lambda each, target: SOLVED["check_best_weights"](each, target)[:, None], "should have shape"),
    ],
    "check_arrives": [
        (lambda W, D: SOLVED["check_arrives"](W, D)[::-1], "in the other order"),
        (lambda W, D: arrived(W, D, start=lambda W: W), "is measured from W"),
        (lambda W, D: arrived(W, D, size=lambda c, D: c.norm() / D.norm()), "a ratio of norms"),
        (lambda W, D: arrived(W, D, size=lambda c, D: (c * D).sum() / c.norm() / D.norm()), "is a cosine"),
        (lambda W, D: arrived(W, D, size=lambda c, D: (c != 0).float().mean()), "values that change"),
        (lambda W, D: (SOLVED["check_arrives"](W, D)[0],) * 2, "not to the original"),
        (lambda W, D: SOLVED["check_arrives"](W, D)[0], "expected `return requantised, original`"),
    ],
    "check_seeds_needed": [
        (enough(lambda n: 1.959964 / n**0.5), "has z = 1.96"),
        (enough(lambda n: t.ppf(0.975, n) / n**0.5), "n degrees of freedom"),
        (enough(lambda n: 2 * t.ppf(0.975, n - 1) / n**0.5), "the whole width for half of it"),
        (enough(lambda n: t.ppf(0.95, n - 1) / n**0.5), "a 90 % interval"),
        (enough(lambda n: 1 / n**0.5), "where is t?"),
        (enough(lambda n: t.ppf(0.975, n - 1) / n), "divides by n: "),
        (enough(lambda n: t.ppf(0.975, n - 1) / (n - 1) ** 0.5), "sqrt(n), not sqrt(n - 1)"),
        (lambda scatter, half: SOLVED["check_seeds_needed"](scatter, half) + 1, "one too many"),
        (lambda scatter, half: SOLVED["check_seeds_needed"](scatter, half) - 1, "the last one that is too few"),
        (lambda scatter, half: 1, "one run has no scatter"),
        (lambda scatter, half: (1.96 * scatter / half) ** 2, "should be"),
        (lambda scatter, half: str(SOLVED["check_seeds_needed"](scatter, half)), "should be a tensor or a number"),
    ],
    "check_rank_table": [
        (tabled(mean=max), "the best single run"),
        (tabled(lambda rates, _: [value for values in rates.values() for value in values]), "the mean over all rates"),
        (tabled(lambda rates, _: max(rates.values(), key=max)), "at the rate with the best single run"),
        (
            tabled(lambda rates, _: max(rates.values(), key=lambda values: values[0])),
            "the rate that is best for seed 0",
        ),
        (tabled(common_rate), "at one rate for all ranks"),
        (tabled(lambda rates, _: next(iter(rates.values()))), "at the smallest rate"),
        (tabled(lambda rates, _: list(rates.values())[-1]), "at the largest rate"),
        (tabled(lambda rates, _: list(map(max, zip(*rates.values(), strict=True)))), "each seed's best rate"),
        (tabled(mean=np.median), "is the median"),
        (tabled(half=lambda values: 1.959964 * erred(values)), "that of the normal distribution"),
        (tabled(half=erred), "one standard error away"),
        (tabled(half=lambda values: np.std(values, ddof=1)), "one standard deviation away"),
        (tabled(half=lambda values: t.ppf(0.975, 2) * np.std(values) / 3**0.5), "the population's standard deviation"),
        (tabled(half=lambda values: t.ppf(0.975, 3) * erred(values)), "n degrees of freedom"),
        (tabled(half=lambda values: t.ppf(0.95, 2) * erred(values)), "a 90 % interval"),
        (tabled(half=lambda values: t.ppf(0.975, 2) * np.std(values, ddof=1)), "t times the standard deviation"),
        (tabled(half=lambda values: -t.ppf(0.975, 2) * erred(values)), "first low, then high"),
        (tabled(half=lambda values: np.mean(values) - min(values)), "the worst or best seed"),
        (tabled(rows=lambda table: [(*row[:3], row[4] - row[2], row[4]) for row in table]), "is the half width"),
        (tabled(rows=lambda table: [(row[0], row[0], *row[2:]) for row in table]), "is the rank: `trainable`"),
        (tabled(rows=lambda table: table[::-1]), "sorted by rank"),
        (tabled(rows=lambda table: table[:1]), "rows, one a rank"),
        (tabled(rows=lambda table: [row[1:] for row in table]), "tuples of five numbers"),
        (tabled(rows=lambda table: {row[0]: row[1:] for row in table}), "tuples of five numbers"),
    ],
    "check_verdict": [
        (verdict_by(lambda a, b: stats.difference(a, b).verdict), "seed by seed"),
        (verdict_by(overlapping), "seed by seed"),
        (verdict_by(lambda a, b: said(np.mean(a) - np.mean(b), np.mean(a) - np.mean(b)), least=1), "holds zero"),
        (paired_by(lambda gaps: (0, np.mean(gaps), np.mean(gaps))), "holds zero"),
        (paired_by(lambda gaps: (0, min(gaps), max(gaps))), "holds zero"),
        (
            paired_by(lambda gaps: (0, np.mean(gaps) - 1.96 * erred(gaps), np.mean(gaps) + 1.96 * erred(gaps))),
            "Student",
        ),
        (paired_by(lambda gaps: stats.mean_interval(gaps, 0.9)), "both sides"),
        (paired_by(turn=-1), "turned round"),
        (paired_by(seeds=lambda a, b: sorted({*a, *b})), "it should be"),
        (paired_by(lambda gaps: (0, gaps[0], gaps[0]), least=1), "it should be"),
        (lambda a, b: "equal", "expected one of"),
        (lambda a, b: "higher", "expected one of"),
        (lambda a, b: "cannot be separated", "what a seed does to both arms cancels"),
    ],
    "check_confounds": [
        (confounded("scale"), "scale differs, and is not in the answer"),
        (confounded("alpha"), "alpha differs, and is not in the answer"),
        (confounded(scale=lambda run: run["alpha"]), "it is alpha / rank of each run"),
        (confounded(rates=lambda run: run["lr"]), "how many learning rates were tried, not which"),
        (confounded("rates"), "rates differs, and is not in the answer"),
        (confounded(epochs=lambda run: run["steps"] / run["n"]), "steps * batch_size / n"),
        (confounded(epochs=lambda run: run["steps"]), "steps * batch_size / n"),
        (confounded(epochs=lambda run: run["steps"] * run["batch_size"]), "steps * batch_size / n"),
        (confounded("seeds"), "which seeds there are"),
        (lambda a, b: SOLVED["check_confounds"](a[:1], b[:1]), "rates differs, and is not in the answer"),
        (lambda a, b: SOLVED["check_confounds"](a, b)[::-1], "a sorted list"),
        (lambda a, b: SOLVED["check_confounds"](a, b) * 2, "each once"),
        (lambda a, b: [*SOLVED["check_confounds"](a, b), "rank"], "expected names out of"),
        (lambda a, b: ",".join(SOLVED["check_confounds"](a, b)), "expected a list of names"),
        (lambda a, b: [], "is not in the answer"),
    ],
    "check_design": [
        (designed(lambda fit: range(max(3, int(fit)))), "expected a ValueError"),
        (designed(lambda fit: range(int(fit))), "three are needed"),
        (designed(lambda fit: range(int(np.ceil(fit)))), "round down"),
        (designed(lambda fit: range(int(fit) - 1)), "one more fits"),
        (designed(lambda fit: range(1, int(fit) + 1)), "seeds should be 0 to"),
        (designed(lambda fit: [int(fit)]), "a number is one seed"),
        (designed(seed=5), "a number is one seed"),
        (designed(lambda fit: range(int(12 * fit))), "ranks times alphas times rates"),
        (designed(lambda fit: range(3)), "seeds should be 0 to"),
        (designed(alpha="2r"), "alpha should be all that was given"),
        (designed(lr=[1e-3]), "lr should be all that was given"),
        (designed(steps=[300]), "expected exactly rank, alpha, lr and seed"),
        (lambda *inputs: [SOLVED["check_design"](*inputs)], "expected a grid"),
    ],
}
EACH_MISTAKE = [(check, *mistake) for check, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.long
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


def test_a_comparison_may_use_adapters_of_any_library():
    checks.check_compare(compared())


def test_codes_of_the_solution_are_bitsandbytes_own_and_either_search_is_taken():
    for seed, shape in enumerate([(40, 96), (300, 257), (5,)]):
        x = grading.random_matrix(*shape, seed=seed)
        codes, absmax, back = SOLVED["check_round_trip"](x, 64)
        want, scales = nf4.quantize(x)
        assert torch.equal(codes, want)
        assert torch.equal(absmax, scales)
        assert torch.equal(back, nf4.dequantize(want, scales, x.shape))
    checks.check_round_trip(rounded())
    checks.check_round_trip(rounded(nearest=lambda t: torch.bucketize(t.scaled, (t.book[1:] + t.book[:-1]) / 2)))
    torch.testing.assert_close(SOLVED["check_codebook"](nf4.OFFSET), nf4.nf4_codebook(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_the_solution_are_those_of_a_quantised_model(double):
    model = lesson_04_qlora._llama([]).to(torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    quantize_model(model, double_quant=double)
    kept = sum(p.nbytes for p in model.parameters()) + sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "rotary" not in name
    )
    assert SOLVED["check_storage"](shapes, 64, double)[1] == kept


def test_a_step_may_also_be_recomputed_by_a_checkpoint():
    *steps, without = lesson_04_qlora.STEPS
    assert not without[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson_04_qlora, "STEPS", steps)
        checks.check_step(checkpointed)
    checks.check_step(stepped())


def test_a_comparison_in_four_bits_may_be_written_otherwise():
    checks.check_four_bits(in_four_bits())


@pytest.mark.parametrize(("name", "targets", "want"), [row[:3] for row in lesson_03_sft.NAMES])
def test_names_match_as_peft_has_it(name, targets, want):
    config = peft.LoraConfig(target_modules=targets)
    assert bool(check_target_module_exists(config, name)) == want


def test_an_adapter_of_peft_is_seen_to_act(capsys):
    is_active, ids = SOLVED["check_is_active"], torch.tensor([[1, 5, 7, 2]])
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(lesson_03_sft._small_llama(), config).train()
    assert not is_active(model, ids)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(p, 0.01)
    assert is_active(model, ids)
    assert model.training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
def test_settings_are_those_of_the_installed_trl():
    import trl

    fields = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    old = {*lesson_03_sft.RENAMED, *lesson_03_sft.GONE}
    assert not old & fields
    for settings in lesson_03_sft.SETTINGS:
        assert SOLVED["check_modern"](settings).keys() <= fields
    config = trl.SFTConfig(output_dir="unused", warmup_steps=0.03, use_cpu=True, bf16=False)
    assert config.get_warmup_steps(1000) == 30, "below 1 it is a share"


def test_a_wrong_answer_without_a_known_reason_is_described():
    want = grading.random_matrix(3, 3, seed=0)
    for got, words in [
        (-2 * want, "is off by exactly the factor -2"),
        (want.T, "is the transpose of the right one"),
        (want / 0, "is not finite"),
        (want + 0.1 * want.norm() * torch.eye(3) / 3**0.5, "is off by 10.0% of its norm"),
        (want[:2], "should have shape (3, 3), got (2, 3)"),
    ]:
        with pytest.raises(CheckFailed, match=re.escape(f"small input: it {words}")):
            grading.judge(got, want, {}, "small input", "it")


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
    assert result.wall_seconds < 300
    fresh, committed = read(result.path), read(path)
    for new, old in zip(fresh.cells, committed.cells, strict=True):
        assert is_measured(old) or new.get("outputs") == old.get("outputs")


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
