"""The checks of lesson 04's exercises: shares of codes, a round trip, stored bytes, a step by hand, a project."""

import math
import weakref
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lorakit._optional import need, quiet
from lorakit.course.checks.exercise import Case, exercise, in_parts
from lorakit.course.checks.grading import as_tensor, ask, judge, parts, random_matrix, require
from lorakit.course.checks.lesson_03_sft import EXAMPLES
from lorakit.layers import nf4
from lorakit.layers.nf4_linear import NF4Linear
from lorakit.models.inject import adapters
from lorakit.models.merge import remove
from lorakit.training.batch import collate

CODES = torch.tensor(nf4.NF4, dtype=torch.float32)
TENSORS = [((6, 48), 32), ((5, 27), 16), ((70,), 64)]  # shape, block size; the second block of each is zero
SMALL = {"embed_tokens.weight": (50, 9), "q_proj.weight": (5, 9), "q_proj.bias": (5,), "up_proj.weight": (41, 9)}
LARGE = {"embed_tokens.weight": (32_000, 4096), "up_proj.weight": (11_008, 4096), "lm_head.weight": (32_000, 4096)}
BASES = [  # in words, shapes, block size, double quantisation, absmax values that share theirs
    ("a small Llama", SMALL, 64, False, 256),
    ("a small Llama", SMALL, 8, True, 4),
    ("some of Llama 2", LARGE, 64, True, 256),
]
STEPS = [  # d_out, d_in, rank, s, the other dimensions of x, whether x wants a gradient
    (24, 40, 3, 1.5, (2, 3), True),
    (32, 32, 4, 0.5, (5,), True),
    (24, 40, 3, 1.5, (2, 3), False),
]
LAYERS = 14  # linear ones in the blocks of the project's model


def _shares(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    shares, n = as_tensor(got, case.on, "the shares"), len(case.inputs[0])
    inside = shares.shape == (n - 2,)
    require(not inside, case.on, f"{n - 2} shares for {n} numbers: what lies beyond the outermost borders counts, too")
    yield "the shares", shares


@exercise("right: the probability of each number, with what lies beyond the outermost", _shares)
def check_code_shares() -> Iterator[Case]:
    """Checks `code_shares(codebook, absmax) -> shares`: of a normal distribution, for each number of a codebook."""
    even = torch.linspace(-1, 1, 9, dtype=torch.float32)
    for name, codebook, absmax in (("NF4", CODES, 2.6), ("NF4", CODES, 1.4), ("nine even steps", even, 2.0)):
        borders = (codebook[1:] + codebook[:-1]) / 2
        want, ends = _between(absmax * borders), torch.special.ndtr(absmax * codebook[[0, -1]])
        inside = want.clone()
        inside[0] -= ends[0]
        inside[-1] -= 1 - ends[1]
        density = (-((absmax * codebook) ** 2) / 2).exp()
        hints = {
            "are all equal, as the tutorials say: compute them": torch.full_like(want, 1 / len(want)),
            "are those of rounding down: the borders lie midway between neighbours": _between(absmax * codebook[1:]),
            "are those of rounding up: the borders lie midway between neighbours": _between(absmax * codebook[:-1]),
            "lack absmax: the borders times absmax are in standard deviations": _between(borders),
            "are divided by absmax: times absmax, the borders are in standard deviations": _between(borders / absmax),
            "lack what lies beyond the outermost numbers": inside,
            "are densities at the numbers: a share lies between two borders": density / density.sum(),
            "are those below each border, added up: take differences": want.cumsum(0),
            "are in the opposite order": want.flip(0),
        }
        yield Case(f"{name}, absmax {absmax}", (codebook, absmax), want, hints)


def _between(borders: Tensor) -> Tensor:
    """The shares of a standard normal distribution between neighbouring borders, and beyond the outermost."""
    return nn.functional.pad(nn.functional.pad(torch.special.ndtr(borders), (1, 0)), (0, 1), value=1).diff()


def _trip(got: Any, case: Case) -> Iterator[tuple[str, Any]]:
    codes, absmax, back = parts(got, "codes, absmax, back", case.on)
    yield "absmax", absmax
    yield "codes", codes
    byte = getattr(codes, "dtype", 0) is torch.uint8
    require(byte, case.on, "codes should be torch.uint8: one byte each, not eight")
    yield "back", back


@exercise("right: codes, absmax and values are lorakit.layers.nf4's, with a block of zeros and a shorter one", _trip)
def check_round_trip() -> Iterator[Case]:
    """Checks `round_trip(x, block_size) -> (codes, absmax, back)`: each against `lorakit.layers.nf4`."""
    for seed, (shape, size) in enumerate(TENSORS):
        n = math.prod(shape)
        x = random_matrix(n, seed=seed) * torch.linspace(0.5, 3, n, dtype=torch.float32)
        x[size : 2 * size] = 0
        want, scales = nf4.quantize(x, block_size=size)
        blocks = nn.functional.pad(x, (0, -n % size)).view(-1, size)
        absmax = {
            "is that of the whole tensor: each block has its own": x.abs().max(),
            "is the largest value: the largest magnitude may be that of a negative one": blocks.amax(1),
            "leaves out the last block, which is shorter": scales[:-1],
            "is that of rows: blocks run through the flattened values": x.view(-1, shape[-1]).abs().amax(1),
            "is 1 where the block is zero: guard the division alone": scales.where(scales > 1e-30, 1.0),
        }
        each = scales.repeat_interleave(size)[:n]
        scaled = x / each.clamp(min=1e-38)
        above, nearest = torch.bucketize(scaled, CODES), torch.stack([want >> 4, want & 15], 1)
        rows, turned = nearest.flatten()[:n].int(), nearest.flip(1).flatten().int()
        codes = {
            "has a byte for each value: two codes of four bits fit in one": rows,
            "has the first value in the low half of a byte: it belongs in the high half": _packed(turned),
            "is 0 in a block of zeros, not 7: 0 / 0 is not a number": _packed(rows.where(each > 1e-30, 0)),
            "is 15 in a block of zeros, not 7: 0 / 0 is not a number": _packed(rows.where(each > 1e-30, 15)),
            "is rounded up: take the nearest": _packed(above),
            "is rounded down: take the nearest": _packed(above - (CODES[above] > scaled).int()),
            "takes even steps for the codebook's": _packed(((scaled + 1) * 7.5).round().int()),
            "is that of x: divide each block by its absmax first": _packed((x[:, None] - CODES).abs().argmin(1)),
        }
        back = {
            "is x itself: make it from codes and absmax alone, and something is lost": x,
            "is in units of absmax: multiply each block by its own": CODES[rows],
            "takes other blocks' absmax: use repeat_interleave(block_size)": CODES[rows] * scales.repeat(size)[:n],
            "takes the low half of a byte first": CODES[turned[:n]] * each,
        }
        whole = (CODES[rows] * each).view(shape), {hint: wrong.view(shape) for hint, wrong in back.items()}
        on = f"x {shape}, blocks of {size}"
        yield Case(on, (x.view(shape), size), *in_parts((want, codes), (scales, absmax), whole))


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte; zero's, 7, beside the last of an odd number."""
    codes = nn.functional.pad(codes, (0, len(codes) % 2), value=7)
    return codes[::2] * 16 + codes[1::2]


@exercise("right: 4.5 and 4.127 bits a weight in blocks of 64, and every byte that NF4Linear keeps", "bits, n_bytes")
def check_storage() -> Iterator[Case]:
    """Checks `storage(shapes, block_size, double_quant, absmax_block) -> (bits, n_bytes)`."""
    for base, shapes, size, double, many in BASES:
        want = 4 + 8 / size + 32 / (size * many) if double else 4 + 32 / size
        eight = f"has absmax in 8 bits{', but not the 32 for absmax_block of them' if double else ': it has 32 here'}"
        bits = {
            "is that of the codes alone: each block has an absmax": 4.0,
            "has absmax in 32 bits: double_quant stores it in 8": 4 + 32 / size,
            eight: 4 + 8 / size,
            "has 32 bits for absmax_block weights: they are for as many blocks": 4 + 8 / size + 32 / many,
            "is in bytes: a byte has 8 bits": want / 8,
        }
        count = partial(_stored, shapes, size, double, many)
        n_bytes = {
            "has everything in four bits: only *_proj.weight is": count(""),
            "has embeddings and head in four bits": count(("_proj.weight", "tokens.weight", "head.weight")),
            "has the head in four bits": count(("_proj.weight", "head.weight")),
            "has the bias in four bits": count(("_proj.weight", "bias")),
            "leaves out what is not quantised": count(rest=0),
            "has 32 bits for a number that is not quantised: it has 16": count(rest=4),
            "lacks the offset: double_quant also stores a float32 for each weight, the mean absmax": count(offset=0),
            "has absmax in 4 bytes: double_quant stores it in one": _stored(shapes, size, False, many),
            "leaves out each weight's last block, which is shorter": count(last=math.floor),
            "is bits times weights: count the blocks of each, and round up": count(offset=0, up=float, last=float),
        }
        on = f"{base}, block_size {size}, double_quant {double}, absmax_block {many}"
        yield Case(on, (shapes, size, double, many), *in_parts((want, bits), (count(), n_bytes)))


def _stored(shapes, size, double, many, four="_proj.weight", rest=2, offset=4, up=math.ceil, last=math.ceil):
    """Bytes of a base; what stands after `many` makes mistakes."""
    total = 0
    for name, shape in shapes.items():
        n, blocks = math.prod(shape), last(math.prod(shape) / size)
        absmax = blocks + 4 * up(blocks / many) + offset if double else 4 * blocks
        total += up(n / 2) + absmax if name.endswith(four) else rest * n
    return total


def check_step(step: Any) -> None:
    """Checks `step(x, make_weight, A, B, s) -> y`: values, gradients, what is kept, and how often W is made."""
    for d_out, d_in, rank, s, many, wants in STEPS:
        on = f"W ({d_out}, {d_in}), x {(*many, d_in)}, r = {rank}, s = {s}{'' if wants else ', x without a gradient'}"
        shapes = (d_out, d_in), (*many, d_in), (rank, d_in), (d_out, rank), (*many, d_out)
        W, x, A, B, dy = (random_matrix(*shape, seed=seed) for seed, shape in enumerate(shapes))
        made: list[weakref.ref] = []
        given: list[Any] = []
        kept: list[int] = []

        def make_weight(W=W, made=made):
            memory = W.numpy().copy()
            made.append(weakref.ref(memory))  # dead once no tensor needs it
            return torch.from_numpy(memory)

        def forward(*inputs, given=given, kept=kept):
            given += [each for each in inputs if isinstance(each, Tensor)]
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t.detach(), lambda t: t):
                return step(*inputs)

        leaves = [each.clone().requires_grad_(each is not x or wants) for each in (x, A, B)]
        call = wraps(step, updated=())(forward) if callable(step) else step  # errors show the reader's lines
        y = ask(call, leaves[0], make_weight, *leaves[1:], s, on=on)
        update = s * x @ A.T @ B.T
        hints = {"has the adapter unscaled": x @ W.T + update / s, "is the base alone: add s (x A') B'": x @ W.T}
        hints |= {"is the adapter alone": update, "has W for W'": update + (x @ W if d_out == d_in else 0)}
        judge(y, x @ W.T + update, hints, on, "y")
        require(getattr(y, "grad_fn", None) is not None, on, "y has no backward pass: return Step.apply(...) itself")
        require(len(made) == 1, on, f"make_weight was called {len(made)} times in the forward pass: once will do")
        kept += [each.numel() for each in getattr(y.grad_fn, "__dict__", {}).values() if isinstance(each, Tensor)]
        alive = made[0]() is not None or max(kept, default=0) >= W.numel()
        require(not alive, on, "W or something of its size is kept for the backward pass: keep make_weight instead")
        ask(wraps(step, updated=())(lambda y=y, dy=dy: y.backward(dy) or True), on=on)
        x, dy = x.flatten(0, -2), dy.flatten(0, -2)
        dxa = s * dy @ B
        hints = {"lacks the adapter's path, s dy B A": dy @ W, "lacks the path through W, dy W": dxa @ A}
        hints |= {"has the adapter's path unscaled": dy @ W + dxa @ A / s}
        hints["has W' for W"] = dxa @ A + (dy @ W.T if d_out == d_in else 0)
        for name, leaf, want in zip("xAB", given, (dy @ W + dxa @ A, dxa.T @ x, s * dy.T @ (x @ A.T)), strict=True):
            if leaf.requires_grad:
                require(leaf.grad is not None, on, f"{name} has no gradient: return one for each input, in their order")
                hints |= {"lacks s": want / s, "has s twice": want * s}
                judge(leaf.grad.view(want.shape), want, hints, on, f"the gradient of {name}")
        why = "the backward pass needs W once, and not at all where x wants no gradient (ctx.needs_input_grad)"
        require(len(made) == 1 + wants, on, f"make_weight was called {len(made)} times, not {1 + wants}: {why}")
    print("right: values and gradients; W is made once a pass, and nothing of its size is kept")


def check_four_bits(compare: Any) -> None:
    """Checks `compare(make_model, examples) -> {"LoRA": record, "QLoRA": record}`: equal terms, and honest bytes."""
    on, arms = "a Llama of two layers", {}
    made: list[tuple[nn.Module, list[list[Tensor]]]] = []
    record = ask(compare, lambda: _llama(made), EXAMPLES, on=on)
    require(len(made) == 2, on, f"make_model was called {len(made)} times, expected 2: each arm has its own model")
    for model, passes in made:
        four, found = sum(isinstance(m, NF4Linear) for m in model.modules()), len(adapters(model))
        require(four in (0, LAYERS), on, f"{four} layers are in four bits: expected the {LAYERS} of the blocks")
        require(found == LAYERS, on, f"{found} layers have an adapter at the end: expected the {LAYERS} of the blocks")
        require(len(passes) > 1, on, "a model ran less than two passes: train both")
        require(len(passes[-1]) == 2 * LAYERS, on, f"{len(passes[-1])} tensors train: expected A and B of each adapter")
        arms["QLoRA" if four else "LoRA"] = model, passes
    require("LoRA" in arms, on, "both bases are in four bits: LoRA's stays in float32")
    require("QLoRA" in arms, on, "both bases are in float32: call quantize_model before inject")
    a, b = (arms[arm][1] for arm in ("LoRA", "QLoRA"))
    require(len(a) == len(b), on, f"{len(a)} passes for LoRA and {len(b)} for QLoRA: both take the same steps")
    same_start = all(map(torch.equal, a[0], b[0]))
    require(same_start, on, "A differs between the arms at the start: take one rank, and one seed before each inject")
    moved = [max((p - q).abs().max().item() for p, q in zip(*run[:2], strict=True)) for run in (a, b)]
    rates = f"the first step of LoRA moves a number by {moved[0]:.2g} and that of QLoRA by {moved[1]:.2g}"
    require(max(moved) < 1.5 * min(moved), on, f"{rates}: with AdamW that is the learning rate, the same for both")
    named = {arm: [*remove(model).parameters(), *model.buffers()] for arm, (model, _) in arms.items()}
    bases = []
    for arm, tensors in named.items():
        model, size = arms[arm][0], sum(t.nbytes for t in tensors)
        weights, loss = sum(p.nbytes for p in model.parameters()), model(**collate(EXAMPLES)).loss.item()
        bases.append((arm, size, weights, sum(t.numel() for t in tensors), loss))
    bases, n = sorted(bases), sum(p.numel() for p in a[0])
    for (arm, *_, loss), case in zip(bases, _records.cases(bases, n), strict=True):
        here = case.on
        row: Any = record.get(arm) if isinstance(record, dict) else None
        require(isinstance(row, dict), here, f"expected a record, a dict, under {arm!r}, got {type(row).__name__}")
        _records.judge([row.get(name) for name in ("base_bytes", "trained", "first_loss")], case)
        final, seconds = (as_tensor(row.get(name), here, name) for name in ("final_loss", "seconds"))
        require(bool((final < loss).all()), here, "final_loss should be below first_loss")
        require(bool((seconds > 0).all()), here, "seconds should be more than 0")
    print("right: the same start, steps and learning rate; each base's bytes, buffers included")


@exercise("", "base_bytes, trained, first_loss")
def _records(bases: Any = (("LoRA", 90, 80, 23, 3.0), ("QLoRA", 40, 24, 16, 3.1)), n: int = 7) -> Iterator[Case]:
    """What records have of bases (arm, bytes, those of parameters, values, loss) whose adapters have n numbers."""
    for (arm, size, weights, values, loss), (_, other, *_, others_loss) in zip(bases, bases[::-1], strict=True):
        n_bytes = {"counts the adapter too": size + 4 * n, "is that of the other base": other}
        n_bytes |= {
            "lacks model.buffers(): codes and absmax are there": weights,
            "is in values: ask for nbytes": values,
        }
        n_bytes |= {"lacks model.parameters()": size - weights, "has 4 bytes a value: ask for nbytes": 4 * values}
        trained = {"counts frozen numbers": n + weights // 4, "is in bytes": 4 * n}
        row = (size, n_bytes), (n, trained), (loss, {"is that of the other base": others_loss})
        yield Case(f"a Llama of two layers, {arm}", (), *in_parts(*row))


def _llama(made: list) -> nn.Module:
    """A Llama whose weights are so wide that four bits show in its loss; it notes what trains, at each pass."""
    transformers, passes = need("transformers"), []
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    config = transformers.LlamaConfig(**sizes)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.register_forward_pre_hook(lambda m, _: passes.append([p.clone() for p in m.parameters() if p.requires_grad]))
    made.append((model, passes))
    return model
