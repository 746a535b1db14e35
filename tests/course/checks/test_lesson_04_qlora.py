"""The checks of lesson 04, four bits: what they say to answers that they do not know themselves."""

from types import SimpleNamespace

import pytest
import torch
from helpers.exercises import SOLVED, assert_refused, changed, each_mistake, everything
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorakit import count, inject, remove
from lorakit.course import checks
from lorakit.course.checks import grading, lesson_04_qlora
from lorakit.layers import nf4
from lorakit.models.quantize import quantize_model
from lorakit.training.batch import collate


def searched(x, size):
    """Right, by the middles between the numbers; an odd value gets a zero beside it."""
    book, blocks = torch.tensor(nf4.NF4), F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp(min=1e-30)[:, None]).flatten()[: x.numel() + x.numel() % 2]
    nearest = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2)
    back = (book[nearest] * absmax.repeat_interleave(size)[: len(nearest)])[: x.numel()].view(x.shape)
    return (nearest[::2] << 4 | nearest[1::2]).to(torch.uint8), absmax, back


def by_the_formula(shapes, size, double, many):
    bits, _ = SOLVED["check_storage"](shapes, size, double, many)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return bits, sum(n * (bits / 8 if name.endswith("_proj.weight") else 2) for name, n in sizes.items())


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
            t = SimpleNamespace(x=x.flatten(0, -2), dy=dy.flatten(0, -2), s=ctx.s, A=A, B=B, dx=None)
            t.dxa = t.s * t.dy @ B
            t.dA, t.dB = t.dxa.T @ t.x, t.s * t.dy.T @ (t.x @ A.T)
            if always or ctx.needs_input_grad[0]:
                t.W = [ctx.make_weight() for _ in range(makes[1])][-1]
                t.dx = (wrong["dx"](t) if "dx" in wrong else t.dy @ t.W + t.dxa @ A).view(x.shape)
            dA, dB = (wrong[name](t) if name in wrong else getattr(t, name) for name in ("dA", "dB"))
            return t.dx, dA, dB, None, None

    return lambda x, make_weight, A, B, s: Wrong.apply(x, A, B, make_weight, s)


def in_batches(x, make_weight, A, B, s):
    """Right for x of three dimensions alone."""
    return SOLVED["check_step"](torch.einsum("bnd->bnd", x), make_weight, A, B, s)


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
            record[arm] = row | {name: make(row, model) for name, make in more.items()}
            if settings["taken"]:
                remove(model)
        return record

    return compare


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def buffer_bytes(model):
    return sum(buffer.nbytes for buffer in model.buffers())


MISTAKES = {  # check -> a wrong answer, and the words of its hint
    "check_code_shares": [
        (lambda codebook, absmax: torch.full_like(codebook, 1 / len(codebook)), "are all equal"),
        (lambda codebook, absmax: SOLVED["check_code_shares"](codebook, 1.0), "lack absmax"),
        (lambda codebook, absmax: SOLVED["check_code_shares"](codebook, absmax)[1:-1], "14 shares for 16 numbers"),
        (lambda codebook, absmax: SOLVED["check_code_shares"](codebook, 2.6), "absmax 1.4: the shares"),
    ],
    "check_round_trip": [
        (changed("check_round_trip", 0, lambda codes: codes.long()), "should be torch.uint8"),
        (changed("check_round_trip", 0, lambda codes: codes[:-1]), "codes should have shape (144,), got (143,)"),
        (changed("check_round_trip", 2, torch.flatten), "back should have shape (6, 48), got (288,)"),
        (lambda x, size: SOLVED["check_round_trip"](x, x.numel()), "absmax should have shape (9,), got (1,)"),
        (lambda x, size: x, "expected `return codes, absmax, back`, got Tensor"),
    ],
    "check_storage": [
        (lambda *given: SOLVED["check_storage"](*given)[0], "expected `return bits, n_bytes`, got float"),
        (by_the_formula, "is bits times weights"),
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
        (in_batches, "x (5, 32), r = 4, s = 0.5: your code raised RuntimeError"),
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
        (in_four_bits(base_bytes=lambda row, model: buffer_bytes(model)), "LoRA: base_bytes lacks model.parameters()"),
        (in_four_bits(trained=lambda row, model: everything(model)), "LoRA: trained counts frozen numbers"),
        (in_four_bits(first_loss=lambda row, model: 1.0), "LoRA: first_loss should be"),
        (in_four_bits(final_loss=lambda row, model: row["first_loss"]), "should be below first_loss"),
        (in_four_bits(seconds=lambda row, model: 0), "seconds should be more than 0"),
        (in_four_bits(seconds=lambda row, model: None), "seconds should be a tensor or a number"),
        (lambda *given: [in_four_bits()(*given)], "expected a record, a dict, under 'LoRA', got NoneType"),
    ],
}


@each_mistake("04_qlora", MISTAKES)
def test_a_mistake_is_refused_with_its_hint(check, answer, hint, capsys):
    assert_refused(check, answer, hint, capsys)


def test_codes_of_the_solution_are_bitsandbytes_own_and_either_search_is_taken():
    for seed, shape in enumerate([(40, 96), (300, 257), (5,)]):
        x = grading.random_matrix(*shape, seed=seed)
        codes, absmax, back = SOLVED["check_round_trip"](x, 64)
        want, scales = nf4.quantize(x)
        assert torch.equal(codes, want)
        assert torch.equal(absmax, scales)
        assert torch.equal(back, nf4.dequantize(want, scales, x.shape))
    checks.check_round_trip(searched)


def test_shares_of_the_solution_are_what_is_counted():
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    codes, (absmax,) = nf4.quantize(x, block_size=len(x))
    counted = torch.stack([codes >> 4, codes & 15], 1).flatten().bincount(minlength=16) / len(x)
    shares = SOLVED["check_code_shares"](torch.tensor(nf4.NF4), absmax.item())
    torch.testing.assert_close(shares, counted, rtol=0, atol=3e-3)


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
